"""A directory being read, in pieces; and what accounts are called.

Runs in the agent. Entries come from one ``scandir`` as they are asked for, so that a directory of
any size needs no more memory than a piece of it.
"""

from __future__ import annotations

import grp
import os
import pwd
from typing import TYPE_CHECKING

from conchkernel.remote import filewire as fw
from conchkernel.remote.filecalls import pack_status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conchkernel.remote.paths import Host, Jail

#: A name is told once for a stream; so many are remembered as told.
_MAX_TOLD = 1024


class Directory:
    """An open directory.

    :param fd: its descriptor; it is closed here.
    :param told: the owners whose names were told before: (whether a group, number).
    """

    def __init__(self, fd: int, paths: Host | Jail, told: set[tuple[bool, int]]) -> None:
        self._fd = fd
        self._paths = paths
        self._told = told
        self._entries = self._scan()

    def _scan(self) -> Iterator[tuple[bytes, os.stat_result]]:
        fd = self._fd
        own = os.fstat(fd)
        yield b".", own
        yield b"..", own if self._paths.is_root(own) else os.stat(b"..", dir_fd=fd)
        with os.scandir(fd) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    continue  # removed meanwhile, or not for this account
                yield os.fsencode(entry.name), status

    def piece(self) -> bytes:
        """The next entries and the names of their owners, as READDIR is answered."""
        entries: list[bytes] = []
        fresh: tuple[dict[int, bytes], dict[int, bytes]] = ({}, {})
        size = 0
        while size < fw.LISTING_BYTES:
            found = next(self._entries, None)
            if found is None:
                break
            name, status = found
            entry = fw.U16.pack(len(name)) + name + pack_status(status)
            entries.append(entry)
            size += len(entry)
            self._introduce(False, status.st_uid, fresh[0])
            self._introduce(True, status.st_gid, fresh[1])
        parts = [fw.COUNTS.pack(*map(len, fresh))]
        for names in fresh:
            for number, text in names.items():
                parts.append(fw.U32.pack(number) + fw.U16.pack(len(text)) + text)
        return b"".join(parts + entries)

    def _introduce(self, group: bool, number: int, fresh: dict[int, bytes]) -> None:
        if (group, number) not in self._told and len(self._told) < _MAX_TOLD:
            self._told.add((group, number))
            fresh[number] = group_name(number) if group else account_name(number)

    def close(self) -> None:
        """Stop reading."""
        self._entries.close()  # type: ignore[attr-defined]
        os.close(self._fd)


def account_name(uid: int) -> bytes:
    try:
        return os.fsencode(pwd.getpwuid(uid).pw_name)[:255]
    except (KeyError, OverflowError):
        return b""


def group_name(gid: int) -> bytes:
    try:
        return os.fsencode(grp.getgrgid(gid).gr_name)[:255]
    except (KeyError, OverflowError):
        return b""
