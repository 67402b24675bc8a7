"""Where an agent lives: a directory that only its account can enter, and in it a socket.

Runs in the agent; the standard library only.
"""

from __future__ import annotations

import os
import re
import socket
import stat
import time

#: A directory younger than this may be of an agent that does not listen yet.
_YOUNG_SECONDS = 60.0


def private_directory(path: str) -> None:
    """Make ``path`` a directory of this account that nobody else can enter.

    :raises OSError: if something that is not ours is in its place.
    """
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise OSError(f"{path} is not a directory of this account") from None
        os.chmod(path, 0o700)


def listen(path: str) -> socket.socket:
    """A listening socket at ``path``, mode 0600, in place of a dead one.

    :raises OSError: if a live agent listens there, or it cannot be made.
    """
    private_directory(os.path.dirname(path))
    listener = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        try:
            listener.bind(path)
        except OSError:
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(path) == 0:
                    raise
            os.unlink(path)
            listener.bind(path)
    finally:
        os.umask(mask)
    listener.listen(16)
    return listener


def leave(path: str, inode: int | None = None) -> None:
    """Take the socket and its directory away, as far as they are there.

    :param inode: of the socket that may be taken away. Where somebody has emptied the directory for
        temporary files, the next agent's is in the place of ours.
    """
    try:
        if inode is not None and os.lstat(path).st_ino != inode:
            return
    except OSError:
        pass  # it has gone already
    for remove, what in ((os.unlink, path), (os.rmdir, os.path.dirname(path))):
        try:
            remove(what)
        except OSError:
            pass


def sweep(path: str) -> None:
    """Take away what killed agents have left beside ``path``: an agent at work cleans up itself.

    Only what is this account's, has an agent's name, and has nobody listening.
    """
    parent, own = os.path.split(os.path.dirname(path))
    agents = re.compile(rf"conchkernel-{os.getuid()}-[0-9a-f]{{16}}")
    if not agents.fullmatch(own):
        return
    try:
        with os.scandir(parent) as entries:
            others = [e.path for e in entries if agents.fullmatch(e.name) and e.name != own]
    except OSError:
        return
    for directory in others:
        try:
            if _abandoned(directory):
                leave(os.path.join(directory, os.path.basename(path)))
        except OSError:
            pass  # went away by itself, or is not ours to look into


def _abandoned(directory: str) -> bool:
    found = os.lstat(directory)
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not private or abs(time.time() - found.st_mtime) < _YOUNG_SECONDS:
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # one that is too busy to answer is alive
        try:
            probe.connect(os.path.join(directory, "s"))
        except (ConnectionRefusedError, FileNotFoundError):
            return True
    return False
