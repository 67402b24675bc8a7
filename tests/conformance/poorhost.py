"""A host whose system and Python have less than Linux and CPython of today.

Near to what macOS has and Linux of old; on these the suite has not run.
"""

from __future__ import annotations

#: Takes away, in the agent's process, what its code must be able to do without.
PRELUDE = """
import builtins, os, select, selectors, socket, sys
for module, names in (
    (os, "O_PATH O_TMPFILE copy_file_range eventfd memfd_create pidfd_open posix_fadvise "
         "posix_fallocate preadv pwritev sendfile splice"),
    (select, "epoll"),
    (socket, "MSG_NOSIGNAL SOCK_CLOEXEC SOCK_NONBLOCK SO_PEERCRED TCP_QUICKACK"),
):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
selectors.DefaultSelector = selectors.PollSelector
sys.platform = "darwin"
def without_proc(path, *others, _open=builtins.open, **named):
    if str(path).startswith("/proc"):
        raise FileNotFoundError(path)
    return _open(path, *others, **named)
builtins.open = without_proc
"""
