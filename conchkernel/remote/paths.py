"""Where a path leads: on the whole host, or within a jail that it cannot leave.

Runs in the agent. A :class:`Place` is what system calls are given instead of a path: a directory's
descriptor and a name in it. In a jail each component is opened on its own without following links,
and links are read and walked by us as text, absolute ones from the jail's root (as under chroot).
So neither ``..`` nor a link nor a directory exchanged between two calls leads outside, and the
kernel never follows anything for us.
"""

from __future__ import annotations

import errno
import os
from typing import Any

#: As Linux has it (path_resolution(7)).
MAX_LINKS = 40
_DIRECTORY = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW
_PIN = getattr(os, "O_PATH", os.O_RDONLY | os.O_NONBLOCK) | os.O_NOFOLLOW


class Place:
    """A name in a directory. A context manager: the directory is open inside only.

    :ivar dir_fd: the directory; ``None`` for the whole host, where ``name`` is a path.
    :ivar follow: whether a system call may follow ``name`` if it is a link.
    """

    __slots__ = ("_owned", "dir_fd", "follow", "name")

    def __init__(self, dir_fd: int | None, name: bytes, follow: bool, owned: bool) -> None:
        self.dir_fd = dir_fd
        self.name = name
        self.follow = follow
        self._owned = owned

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._owned and self.dir_fd is not None:
            os.close(self.dir_fd)

    def open(self, flags: int, mode: int = 0) -> int:
        """open(2) at this place."""
        if not self.follow:
            flags |= os.O_NOFOLLOW
        return os.open(self.name, flags, mode, dir_fd=self.dir_fd)

    def pin(self) -> int:
        """A descriptor of the very file, good for asking and for its name in ``/proc``."""
        return os.open(self.name, _PIN & ~os.O_NOFOLLOW if self.follow else _PIN,
                       dir_fd=self.dir_fd)  # fmt: skip

    def stat(self) -> os.stat_result:
        """stat(2) or lstat(2), as :attr:`follow` has it."""
        return os.stat(self.name, dir_fd=self.dir_fd, follow_symlinks=self.follow)

    def refuse_itself(self) -> None:
        """For what removes or renames a name: a jail's own root has none.

        :raises OSError: EBUSY.
        """
        if self.name == b".":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


class Host:
    """Every path of the host, as the account may use it.

    :param home: where relative paths begin.
    """

    def __init__(self, home: bytes) -> None:
        self.home = home

    def at(self, path: bytes, follow: bool) -> Place:
        """Where ``path`` leads."""
        return Place(None, self._whole(path), follow, owned=False)

    def _whole(self, path: bytes) -> bytes:
        if not path:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return path if path.startswith(b"/") else os.path.join(self.home, path)

    def real(self, path: bytes) -> bytes:
        """The canonical form; the last component need not exist."""
        resolved = os.path.realpath(os.path.join(self.home, path))
        if os.path.islink(resolved):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if len(resolved) > 1:
            os.stat(os.path.dirname(resolved))
        return resolved

    def inside(self, path: bytes) -> bytes | None:
        """How the client calls this path of the host; ``None`` if it cannot."""
        return path

    def is_root(self, status: os.stat_result) -> bool:
        """Whether the directory above this one is not for the client."""
        return False

    def close(self) -> None:
        """Nothing is held."""


class Jail:
    """A directory as ``/``, which no path leaves.

    :param root: its path on the host.
    :raises OSError: if it is no directory that can be entered.
    """

    def __init__(self, root: bytes) -> None:
        self.home = b"/"
        self._path = os.path.realpath(root)
        self._fd = os.open(self._path, _DIRECTORY)
        found = os.fstat(self._fd)
        self._identity = (found.st_dev, found.st_ino)

    def at(self, path: bytes, follow: bool) -> Place:
        """Where ``path`` leads."""
        names: list[bytes] = []
        return self._walk(path, follow, names)

    def real(self, path: bytes) -> bytes:
        """The canonical form as the client sees it; the last component need not exist."""
        names: list[bytes] = []
        with self._walk(path or b"/", True, names):
            return b"/" + b"/".join(names)

    def _walk(self, path: bytes, follow: bool, names: list[bytes]) -> Place:
        """Resolve; ``names`` is left as the canonical path."""
        if not path:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if len(path) > 4095:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        if not path.startswith(b"/"):
            path = self.home.rstrip(b"/") + b"/" + path
        todo = [part for part in reversed(path.split(b"/")) if part not in (b"", b".")]
        here = os.dup(self._fd)
        entered = True  # ``here`` is the directory that ``names`` say, not the one above
        links = 0
        try:
            while todo:
                part = todo.pop()
                if part == b"..":
                    # From the root again: a directory that was moved meanwhile has another "..".
                    todo.extend(reversed(names[:-1]))
                    names.clear()
                    here, entered = self._instead(here, os.dup(self._fd)), True
                    continue
                link: bytes | None = None
                if todo:
                    try:
                        here = self._instead(here, os.open(part, _DIRECTORY, dir_fd=here))
                    except OSError as error:
                        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                            raise
                        link = _link(part, here)
                        if link is None:
                            raise
                elif follow:
                    link = _link(part, here)
                if link is None:
                    names.append(part)
                    entered = bool(todo)
                    continue
                links += 1
                if links > MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                if link.startswith(b"/"):
                    names.clear()
                    here = self._instead(here, os.dup(self._fd))
                todo.extend(p for p in reversed(link.split(b"/")) if p not in (b"", b"."))
        except BaseException:
            os.close(here)
            raise
        return Place(here, b"." if entered else names[-1], False, owned=True)

    @staticmethod
    def _instead(former: int, fresh: int) -> int:
        os.close(former)
        return fresh

    def inside(self, path: bytes) -> bytes | None:
        """How the client calls this path of the host; ``None`` if it lies outside."""
        path = os.path.realpath(path)
        if self._path == b"/":
            return path
        if not (path + b"/").startswith(self._path + b"/"):
            return None
        return path[len(self._path) :] or b"/"

    def is_root(self, status: os.stat_result) -> bool:
        """Whether the directory above this one is not for the client."""
        return (status.st_dev, status.st_ino) == self._identity

    def close(self) -> None:
        """Give the root's descriptor back."""
        os.close(self._fd)


def _link(name: bytes, dir_fd: int) -> bytes | None:
    """What a link says; ``None`` if there is none of this name."""
    try:
        return os.readlink(name, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return None
        raise
