"""How much of a client's window is used: of near clients, far ones, and odd ones."""

from __future__ import annotations

import pytest
from twisted.internet.task import Clock

from conchkernel.ssh import flight as module
from conchkernel.ssh.flight import Flight

STEP = 98304  # how OpenSSH gives its window back


class Client:
    """A client that gives back ``step`` bytes at a time, ``lag`` seconds after they were sent."""

    def __init__(self, step: int = STEP, lag: float = 0.0005) -> None:
        self.clock = Clock()
        self.resumed = 0
        self.flight = Flight(self.clock, self._resume)
        self.step = step
        self.lag = lag

    def _resume(self) -> None:
        self.resumed += 1

    def exchange(self, times: int = 1) -> None:
        """It is sent so much, and gives it back."""
        for _ in range(times):
            self.flight.sent(self.step)
            self.clock.advance(self.lag)
            self.flight.returned(self.step)


def test_a_near_client() -> None:
    """From the first sign of nearness on it is sent less than its window."""
    client = Client()
    assert client.flight.most > 2**32
    client.exchange()
    assert client.flight.most == module.NEAR_BYTES
    client.lag = 5.0  # its program reads slowly: it is no farther for that
    client.exchange()
    assert client.flight.most == module.NEAR_BYTES


def test_a_far_client() -> None:
    """Its window is used whole."""
    client = Client(lag=0.01)
    client.exchange(100)
    assert client.flight.most > 2**32


def test_a_late_sign_of_nearness() -> None:
    """What was slow for another reason is measured again."""
    client = Client(lag=100.0)
    client.exchange(3)
    client.lag = 0.001
    client.exchange()
    assert client.flight.most == module.NEAR_BYTES


def test_large_pieces() -> None:
    """Who gives back a MiB at a time is sent four of them."""
    client = Client(step=2**20)
    client.exchange()
    assert client.flight.most == 4 * 2**20


def test_without_a_clock_nothing_is_limited() -> None:
    """As in a connection that is made without a factory."""
    flight = Flight(None, lambda: None)
    flight.sent(STEP)
    flight.returned(STEP)
    assert flight.most > 2**32


def test_a_window_that_grows() -> None:
    """What a client gives beyond what it was sent is no debt of ours."""
    client = Client()
    client.exchange()
    client.flight.returned(10 * STEP)
    assert client.flight.bytes == 0


def filled() -> Client:
    """A near client that has been sent all that it is sent."""
    client = Client()
    client.exchange()
    client.flight.sent(module.NEAR_BYTES)
    client.flight.full()
    return client


def test_a_client_that_waits_for_more_gets_it() -> None:
    """Its window is open and it says nothing: we are wrong about it."""
    client = filled()
    client.clock.advance(module.PATIENCE_SECONDS)
    assert client.resumed == 1
    assert client.flight.most > 2**32
    client.flight.returned(STEP)
    assert client.flight.most == module.NEAR_BYTES


def test_one_that_is_heard_is_not_taken_for_such() -> None:
    """However long it goes on; when it is silent, the time counts from then."""
    client = filled()
    for _ in range(5):
        client.clock.advance(module.PATIENCE_SECONDS / 2)
        client.flight.returned(STEP)
        client.flight.sent(STEP)
        client.flight.full()
    assert client.resumed == 0
    client.clock.advance(module.PATIENCE_SECONDS)
    client.clock.advance(module.PATIENCE_SECONDS)
    assert client.resumed == 1


def test_after_some_mistakes_no_more_are_made() -> None:
    """It is then sent what its window allows."""
    client = filled()
    for mistake in range(1, module.MISTAKES + 1):
        client.clock.advance(module.PATIENCE_SECONDS)
        assert client.resumed == mistake
        client.flight.returned(STEP)
        client.flight.sent(STEP)
        if mistake < module.MISTAKES:
            client.flight.full()
    assert client.flight.most > 2**32


@pytest.mark.parametrize("waits", [False, True])
def test_nothing_is_left_behind(waits: bool) -> None:
    """Neither a timer nor what it would do."""
    client = filled() if waits else Client()
    client.flight.close()
    assert not client.clock.getDelayedCalls()
