"""Asking ahead: what a client asks of one name of a listing after another.

``get dir/*`` asks for each file of a directory by itself and waits each time: LSTAT for all of
them, then STAT and OPEN for one after another. Whoever has listed a directory, and asks the same of
two of its neighbours, gets the answers for those that follow with the second one's.

An answer from before its question may be wrong. So it is told once, at most
:data:`EARLY_SECONDS` after it came, and only while nothing happened that could have changed a file
or told of a change as far as this gateway knows: see
:attr:`conchkernel.jupyter.link.Link.stirred`. A problem is never told early but asked for anew.
Nothing is opened early but what the listing said to be a small regular file.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, succeed

from conchkernel.jupyter.agenthandles import AgentFile
from conchkernel.remote import filewire as fw

if TYPE_CHECKING:
    from collections.abc import Sequence

    from twisted.internet.interfaces import IDelayedCall
    from twisted.python.failure import Failure

    from conchkernel.files import Entry
    from conchkernel.jupyter.agentfiles import AgentFileStore

#: An answer may be so much older than its question.
EARLY_SECONDS = 0.1
#: How many names are asked ahead: 16 small files are 512 KiB.
_DEPTHS = {fw.OPEN: 16, fw.STAT: 32, fw.LSTAT: 32}
#: After answers that nobody wanted, or wanted too late, none are asked for early for so long.
_PAUSE_SECONDS = 1.0
#: Listings that are remembered, and names of each.
_MAX_LISTINGS = 8
_MAX_NAMES = 16384

_Order = tuple[list[bytes], dict[bytes, int]]


class Foresight:
    """What one store asks ahead.

    :param clock: tells the time, and calls later.
    """

    def __init__(self, store: AgentFileStore, clock: Any) -> None:
        self._store = store
        self._clock = clock
        self._listings: dict[bytes, Listing] = {}
        self._early: dict[tuple[int, bytes], _Early] = {}
        self._expiry: IDelayedCall | None = None

    def listing(self, path: bytes) -> Listing:
        """A directory is read: it is to be told its entries."""
        directory = path.rstrip(b"/")
        self._listings.pop(directory, None)
        if len(self._listings) >= _MAX_LISTINGS:
            del self._listings[next(iter(self._listings))]
        listing = self._listings[directory] = Listing()
        return listing

    def take(self, operation: int, path: bytes) -> Deferred[Any] | None:
        """The answer to what the client asks now, if it was asked for early and may be told."""
        early = self._early.pop((operation, path), None)
        if early is None:
            if operation == fw.STAT and (opened := self._early.get((fw.OPEN, path))) is not None:
                return self._attributes(opened)
            return None
        if not self._isFresh(early):
            self._discard(early)
            return None
        if early.answer is not None:
            return succeed(early.answer)
        early.waiting = Deferred(early.forsake)
        return early.waiting

    def _attributes(self, opened: _Early) -> Deferred[Any] | None:
        """What a STAT is told of a file that is open already, once."""
        file = opened.answer
        if file is None or opened.told or not self._isFresh(opened):
            return None
        opened.told = True
        return None if file.attributes is None else succeed(file.attributes)

    def asked(self, operation: int, path: bytes) -> None:
        """The client has asked this: ask ahead what it will ask next."""
        directory, _, name = path.rpartition(b"/")
        listing = self._listings.get(directory.rstrip(b"/"))
        if listing is None or (operation == fw.STAT and (fw.OPEN, path) in self._early):
            return
        walk = listing.walk(operation)
        for following in walk.following(name, self._clock.seconds()):
            self._ask(walk, operation, directory + b"/" + following)

    def forget(self) -> None:
        """Something is about to change: nothing that was asked before holds."""
        early, self._early = self._early, {}
        for one in early.values():
            self._discard(one)

    def stop(self) -> None:
        """The store is lost, and what was open with it."""
        self._early.clear()
        self._listings.clear()
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    # --- what was asked ----------------------------------------------------------------------

    def _ask(self, walk: _Walk, operation: int, path: bytes) -> None:
        key = operation, path
        if key in self._early or (operation == fw.STAT and (fw.OPEN, path) in self._early):
            return
        early = self._early[key] = _Early(walk, operation, path, self._store.stirred)
        early.request = self._store.askNow(operation, path)
        early.request.addCallbacks(
            self._came, self._failed, callbackArgs=(early,), errbackArgs=(early,)
        )
        if self._expiry is None:
            self._expiry = self._clock.callLater(EARLY_SECONDS, self._expire)

    def _isFresh(self, early: _Early) -> bool:
        store = self._store
        return (
            store.isOpen
            and early.stirred == store.stirred
            and self._clock.seconds() <= early.until
        )

    def _came(self, answer: Any, early: _Early) -> None:
        early.answer = answer
        early.until = self._clock.seconds() + EARLY_SECONDS
        waiting = early.waiting
        if waiting is None:
            if early.claimed:
                self._close(early)
        elif self._isFresh(early):
            waiting.callback(answer)
        else:
            self._close(early)
            self._again(early, waiting)

    def _failed(self, reason: Failure, early: _Early) -> None:
        if early.waiting is not None:
            self._again(early, early.waiting)
        elif self._early.get((early.operation, early.path)) is early:
            del self._early[early.operation, early.path]

    def _again(self, early: _Early, waiting: Deferred[Any]) -> None:
        self._store.askNow(early.operation, early.path).chainDeferred(waiting)

    def _close(self, early: _Early) -> None:
        if isinstance(early.answer, AgentFile):
            self._store.dropSoon(early.answer.handle)

    def _discard(self, early: _Early) -> None:
        early.walk.pause(self._clock.seconds())
        if early.answer is not None:
            self._close(early)
        elif early.request is not None:
            early.request.cancel()

    def _expire(self) -> None:
        self._expiry = None
        now = self._clock.seconds()
        for key in [key for key, early in self._early.items() if early.until < now]:
            self._discard(self._early.pop(key))
        if self._early:
            self._expiry = self._clock.callLater(EARLY_SECONDS, self._expire)


class _Early:
    """One answer that was asked for early.

    :ivar until: when it is too old; not before it has come.
    :ivar waiting: fires for the client, who has asked meanwhile.
    :ivar told: whether its attributes have been.
    """

    __slots__ = (
        "answer", "claimed", "operation", "path", "request", "stirred", "told", "until",
        "waiting", "walk",
    )  # fmt: skip

    def __init__(self, walk: _Walk, operation: int, path: bytes, stirred: int) -> None:
        self.walk = walk
        self.operation = operation
        self.path = path
        self.stirred = stirred
        self.until = float("inf")
        self.answer: Any = None
        self.request: Deferred[Any] | None = None
        self.waiting: Deferred[Any] | None = None
        self.claimed = False
        self.told = False

    def forsake(self, _: Deferred[Any]) -> None:
        """The client that waited does not any more."""
        self.waiting = None
        self.claimed = True


class Listing:
    """The names of a directory, as they were listed."""

    def __init__(self) -> None:
        self._names: list[bytes] = []
        self._small: list[bytes] = []
        self._complete = False
        self._walks: dict[int, _Walk] = {}

    def add(self, entries: Sequence[Entry]) -> None:
        """The next ones; none at the end."""
        self._complete = not entries
        for entry in entries[: _MAX_NAMES - len(self._names)]:
            self._names.append(entry.name)
            told = entry.attributes
            if stat.S_ISREG(told.mode or 0) and 0 < (told.size or 0) <= fw.MAX_AHEAD:
                self._small.append(entry.name)

    def walk(self, operation: int) -> _Walk:
        """Where a client is who asks this of one name after another."""
        walk = self._walks.get(operation)
        if walk is None:
            walk = _Walk([], 0)
            if self._complete:
                names = self._small if operation == fw.OPEN else self._names
                orders = [_order(names), _order(sorted(names))]
                walk = self._walks[operation] = _Walk(orders, _DEPTHS[operation])
        return walk


def _order(names: list[bytes]) -> _Order:
    return names, {name: place for place, name in enumerate(names)}


class _Walk:
    """Where a client is who asks one thing of one name after another.

    :param orders: in which that may be: as listed, or sorted.
    :param most: how many names it may be ahead.
    """

    def __init__(self, orders: list[_Order], most: int) -> None:
        self._orders = orders
        self._most = most
        self._last: bytes | None = None
        self._lastTime = 0.0
        self._notBefore = 0.0
        self._names: list[bytes] = []
        self._asked = 0  # up to here in these names
        self._depth = 1

    def following(self, name: bytes, now: float) -> Sequence[bytes]:
        """The names to ask ahead for, now that a client asks for ``name``."""
        previous, self._last = self._last, name
        pace, self._lastTime = max(now - self._lastTime, 0.001), now
        for names, places in self._orders:
            place = places.get(name, 0)
            if place and names[place - 1] == previous:
                break
        else:
            self._depth = 1
            return ()
        if names is not self._names:
            self._names, self._asked = names, 0
        # Those who are slow get no more than they will have asked for in time.
        depth = self._depth = min(2 * self._depth, self._most, int(EARLY_SECONDS / 2 / pace))
        first = max(self._asked, place + 1)
        end = place + 1 + depth
        if now < self._notBefore or first - place - 1 > depth // 2:
            return ()
        self._asked = max(end, first)
        return names[first:end]

    def pause(self, now: float) -> None:
        """What was asked for early was not wanted in time."""
        self._depth = 1
        self._asked = 0
        self._notBefore = now + _PAUSE_SECONDS
