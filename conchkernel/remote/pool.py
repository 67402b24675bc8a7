"""A few threads for calls that may take their time: looking up a name, a full socket's connect.

Runs in the agent, whose loop must never wait for a name server. Threads come as they are needed
and go when nothing is left to do.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from conchkernel.remote.service import CannotServe

#: Calls that wait at the same time; a name server that is gone keeps each for some ten seconds.
MAX_THREADS = 16


class Pool:
    """Runs calls beside the loop.

    :param post: has a callable called by the loop; safe to call on any thread.
    """

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        self._post = post
        self._lock = threading.Lock()
        self._calls: deque[tuple[Callable[[], None], Callable[[], None]]] = deque()
        self._threads = 0

    def run(self, work: Callable[[], None], then: Callable[[], None]) -> None:
        """Have ``work()`` called on a thread, then ``then()`` by the loop.

        ``work`` must not raise, and keeps its result where ``then`` finds it. There is one call
        for each stream at most, so the session's bound on streams is that of the queue.

        :raises CannotServe: if there is no thread for it, nor one to be had.
        """
        call = work, then
        with self._lock:
            self._calls.append(call)
            if self._threads >= MAX_THREADS:
                return
            self._threads += 1
        try:
            # A daemon: what hangs in a system call does not keep the agent.
            threading.Thread(target=self._serve, daemon=True).start()
        except RuntimeError:
            with self._lock:
                self._threads -= 1
                if self._threads:
                    return  # those that there are come to it
                self._calls.remove(call)
            raise CannotServe("the kernel's host has no thread to spare") from None

    def _serve(self) -> None:
        while True:
            with self._lock:
                if not self._calls:
                    self._threads -= 1
                    return
                work, then = self._calls.popleft()
            work()
            self._post(then)
