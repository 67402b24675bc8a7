"""What a store asks before its client does: what it tells of that, and when it asks anew."""

from __future__ import annotations

import stat
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from conchkernel.files import Attributes, Entry, FileProblem, FileStoreError
from conchkernel.jupyter.agentahead import Ahead
from conchkernel.jupyter.agenthandles import AgentFile
from conchkernel.jupyter.foresight import EARLY_SECONDS, Foresight
from conchkernel.remote import filewire as fw

NAMES = [b"e", b"b", b"d", b"a", b"c", b"h", b"g", b"f"]


class Store:
    """Answers when the test says so."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.isOpen = True
        self.stirred = 0
        self.asked: list[tuple[int, bytes]] = []
        self.waiting: list[tuple[int, Deferred[Any]]] = []
        self.dropped: list[int] = []
        self.cancelled: list[tuple[int, bytes]] = []
        self._seen = 0
        self.foresight = Foresight(self, clock)  # type: ignore[arg-type]

    def askNow(self, operation: int, path: bytes) -> Deferred[Any]:
        self.asked.append((operation, path))
        answer: Deferred[Any] = Deferred(lambda _: self.cancelled.append((operation, path)))
        self.waiting.append((len(self.asked), answer))
        return answer

    def dropSoon(self, handle: int) -> None:
        self.dropped.append(handle)

    def isFresh(self, ahead: Ahead) -> bool:
        return ahead.isFresh(self.stirred, self.clock.seconds())

    def list(self, names: list[bytes], mode: int = stat.S_IFREG, size: int = 10) -> None:
        listing = self.foresight.listing(b"/dir/")
        listing.add([Entry(name, Attributes(mode=mode, size=size)) for name in names])
        listing.add([])

    def client(self, operation: int, name: bytes) -> Deferred[Any]:
        """As a store does it."""
        answer = self.foresight.take(operation, b"/dir/" + name)
        if answer is None:
            answer = self.askNow(operation, b"/dir/" + name)
        self.foresight.asked(operation, b"/dir/" + name)
        return answer

    def answer(self) -> None:
        """Answer all that was asked."""
        waiting, self.waiting = self.waiting, []
        for number, one in waiting:
            if one.called:
                continue
            if self.asked[number - 1][0] != fw.OPEN:
                one.callback(Attributes(size=number))
                continue
            ahead = Ahead(Attributes(size=7), b"content", self.stirred, 1e9)
            one.callback(AgentFile(self, number, True, ahead))  # type: ignore[arg-type]

    def new(self) -> list[bytes]:
        """The names that were asked for since the last call."""
        names = [path.rpartition(b"/")[2] for _, path in self.asked]
        fresh, self._seen = names[self._seen :], len(names)
        return fresh


def got(answer: Deferred[Any]) -> Any:
    """What came, if it came."""
    found: list[Any] = [None]

    def keep(came: Any) -> Any:
        found[0] = came
        return came

    answer.addBoth(keep)
    return found[0]


@pytest.fixture
def store() -> Store:
    made = Store(Clock())
    made.list(NAMES)
    return made


def walk(store: Store, operation: int, *names: bytes) -> None:
    """A client asks for some of them, at a good pace."""
    for name in names:
        store.clock.advance(0.001)
        store.client(operation, name)
        store.answer()


@pytest.mark.parametrize("operation", [fw.STAT, fw.LSTAT, fw.OPEN])
@pytest.mark.parametrize("names", [NAMES, sorted(NAMES)])
def test_neighbours_are_asked_ahead(store: Store, operation: int, names: list[bytes]) -> None:
    """In the order of the listing, or sorted; nothing is asked for twice."""
    walk(store, operation, names[0])
    assert store.new() == names[:1]
    walk(store, operation, names[1])
    assert store.new() == names[1:4]
    walk(store, operation, *names[2:])
    assert store.new() == names[4:]
    assert not store.dropped


@pytest.mark.parametrize("names", [[b"a", b"e", b"h"], [b"h", b"h", b"h"], [b"x", b"y", b"a"]])
def test_others_are_not(store: Store, names: list[bytes]) -> None:
    """Who asks here and there gets what was asked for."""
    walk(store, fw.STAT, *names)
    assert store.new() == names


def test_an_answer_is_told_once(store: Store) -> None:
    """Who asks again wants to know whether it has changed."""
    walk(store, fw.LSTAT, b"a", b"b")
    store.new()
    assert got(store.client(fw.LSTAT, b"c")) is not None
    assert store.new() == [b"e", b"f", b"g"]
    assert got(store.client(fw.LSTAT, b"c")) is None
    assert store.new() == [b"c"]


def test_an_answer_gets_old(store: Store) -> None:
    """What came a while ago is asked for anew, and nothing ahead for the time being."""
    walk(store, fw.LSTAT, b"a", b"b")
    store.new()
    store.clock.advance(EARLY_SECONDS + 0.01)
    walk(store, fw.LSTAT, b"c", b"d", b"e")
    assert store.new() == [b"c", b"d", b"e"]


def test_a_slow_client_gets_nothing_ahead(store: Store) -> None:
    """It would be too old when it is asked for."""
    for name in sorted(NAMES):
        store.clock.advance(EARLY_SECONDS)
        store.client(fw.OPEN, name)
        store.answer()
    assert store.new() == sorted(NAMES)
    assert not store.dropped


def test_what_may_have_changed_is_asked_anew(store: Store) -> None:
    """Something was said by a process, or asked for that changes something."""
    walk(store, fw.OPEN, b"a", b"b")
    store.new()
    store.stirred += 1
    assert got(store.client(fw.OPEN, b"c")) is None
    assert store.new() == [b"c"]
    assert len(store.dropped) == 1
    store.foresight.forget()
    assert len(store.dropped) == 2


def test_a_question_that_is_under_way(store: Store) -> None:
    """It is not asked twice, unless something happened meanwhile."""
    walk(store, fw.OPEN, b"a")
    store.clock.advance(0.001)
    store.client(fw.OPEN, b"b")
    asked = store.client(fw.OPEN, b"c"), store.client(fw.OPEN, b"d")
    assert store.new() == [b"a", b"b", b"c", b"d", b"e", b"f", b"g", b"h"]
    store.waiting[1][1].callback(AgentFile(store, 3, True, None))  # type: ignore[arg-type]
    assert got(asked[0]).handle == 3
    store.stirred += 1
    store.waiting[2][1].callback(AgentFile(store, 4, True, None))  # type: ignore[arg-type]
    assert got(asked[1]) is None
    assert store.new() == [b"d"]
    assert store.dropped == [4]
    store.waiting[-1][1].callback("new")
    assert got(asked[1]) == "new"


def test_a_problem_is_not_told_early(store: Store) -> None:
    """It may be over."""
    walk(store, fw.OPEN, b"a")
    store.clock.advance(0.001)
    store.client(fw.OPEN, b"b")
    asked = store.client(fw.OPEN, b"c")
    store.new()
    for _, waiting in store.waiting[1:3]:
        waiting.errback(FileStoreError(FileProblem.NOT_FOUND))
    assert store.new() == [b"c"]
    store.waiting[-1][1].callback("file")
    assert got(asked) == "file"
    assert got(store.client(fw.OPEN, b"d")) is None
    assert store.new()[0] == b"d"


def test_what_nobody_asks_for_is_closed(store: Store) -> None:
    """After a while; what is under way is cancelled where it is certain that nobody asks."""
    walk(store, fw.OPEN, b"a", b"b")
    store.clock.pump([EARLY_SECONDS] * 3)
    assert len(store.dropped) == 2
    assert not store.clock.getDelayedCalls()
    store.clock.advance(10)
    walk(store, fw.OPEN, b"e")
    store.clock.advance(0.001)
    store.client(fw.OPEN, b"f")
    store.foresight.forget()
    assert store.cancelled == [(fw.OPEN, b"/dir/g"), (fw.OPEN, b"/dir/h")]


def test_a_client_that_does_not_wait_any_more(store: Store) -> None:
    """What comes for it is closed."""
    walk(store, fw.OPEN, b"a")
    store.clock.advance(0.001)
    store.client(fw.OPEN, b"b")
    asked = store.client(fw.OPEN, b"c")
    asked.addErrback(lambda _: None)
    asked.cancel()
    store.answer()
    assert store.dropped == [3]


def test_a_stat_of_what_is_open_already(store: Store) -> None:
    """It is told what the file said of itself when it was opened, once."""
    walk(store, fw.OPEN, b"a", b"b")
    store.new()
    assert got(store.client(fw.STAT, b"c")) == Attributes(size=7)
    assert store.new() == []
    assert got(store.client(fw.STAT, b"c")) is None
    assert got(store.client(fw.OPEN, b"c")).read(0, 10) == b"content"


@pytest.mark.parametrize(
    ("mode", "size"),
    [(stat.S_IFREG, 0), (stat.S_IFREG, fw.MAX_AHEAD + 1), (stat.S_IFIFO, 10), (stat.S_IFLNK, 10)],
)
def test_only_small_files_are_opened(mode: int, size: int) -> None:
    """To open anything else could mean something, or take long."""
    store = Store(Clock())
    store.list(NAMES, mode, size)
    walk(store, fw.OPEN, *sorted(NAMES))
    assert store.new() == sorted(NAMES)
    walk(store, fw.STAT, b"a", b"b")
    assert store.new() == [b"a", b"b", b"c", b"d"]


def test_a_listing_is_followed_when_it_is_whole() -> None:
    """And as long as it is one of the last few."""
    store = Store(Clock())
    listing = store.foresight.listing(b"/dir")
    listing.add([Entry(name, Attributes()) for name in NAMES])
    walk(store, fw.STAT, b"a", b"b")
    assert store.new() == [b"a", b"b"]
    listing.add([])
    walk(store, fw.STAT, b"a", b"b")
    assert store.new() == [b"a", b"b", b"c", b"d"]
    for number in range(8):
        store.foresight.listing(b"/%d" % number)
    store.clock.advance(10)
    walk(store, fw.STAT, b"e", b"f", b"g")
    assert store.new() == [b"e", b"f", b"g"]


def test_a_store_that_is_lost(store: Store) -> None:
    """Nothing is told, and nothing asked ahead."""
    walk(store, fw.STAT, b"a", b"b")
    store.isOpen = False
    store.foresight.stop()
    assert store.foresight.take(fw.STAT, b"/dir/c") is None
    store.foresight.asked(fw.STAT, b"/dir/c")
    assert not store.clock.getDelayedCalls()
