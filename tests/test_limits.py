"""Who is refused, for how long, and who never is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.logger import globalLogPublisher

from conchkernel.ssh.checkers import AnonymousOwnerChecker, TokenChecker
from conchkernel.ssh.fields import string
from conchkernel.ssh.limits import Limits, Offence, Penalties, PenaltyRules, dropProbability
from tests.rawclient import VERSION, RawClient

RULE = (10, 30, 100)
NOBODY = (TokenChecker("tok"),)


@pytest.mark.parametrize(
    ("startups", "chance"), [(0, 0), (9, 0), (10, 0.3), (55, 0.65), (99, 0.9922), (5000, 1)]
)
def test_maxStartups(startups: int, chance: float) -> None:
    """sshd's straight line between its two ends."""
    assert dropProbability(RULE, startups) == pytest.approx(chance, abs=1e-4)


def test_maxStartupsWithoutALine() -> None:
    """FULL alone: none below, all from there on."""
    assert dropProbability((5, 100, 5), 4) == 0
    assert dropProbability((5, 100, 5), 5) == 1


@given(st.integers(1, 50), st.integers(1, 100), st.integers(0, 50), st.integers(0, 200))
def test_maxStartupsIsAProbability(begin: int, rate: int, more: int, startups: int) -> None:
    """Whatever the rule."""
    assert 0 <= dropProbability((begin, rate, begin + more), startups) <= 1


# --- penalties -------------------------------------------------------------------------------


def test_penaltiesAddUp() -> None:
    """One failed login refuses nobody; three in a row do, until the sum has worn off."""
    penalties = Penalties(Limits())
    for _ in range(2):
        penalties.punish("192.0.2.1", Offence.AUTH_FAIL, 100)
    assert penalties.refusedFor("192.0.2.1", 100) == 0
    penalties.punish("192.0.2.1", Offence.AUTH_FAIL, 100)
    assert penalties.refusedFor("192.0.2.1", 100) == 15
    assert penalties.refusedFor("192.0.2.1", 101) == 0
    assert penalties.refusedFor("192.0.2.2", 100) == 0


def test_penaltiesHaveAMaximum() -> None:
    """Ten minutes, whatever came."""
    penalties = Penalties(Limits())
    for _ in range(1000):
        penalties.punish("192.0.2.1", Offence.CRASH, 0)
    assert penalties.refusedFor("192.0.2.1", 0) == 600
    assert penalties.refusedFor("192.0.2.1", 600) == 0


def test_netblocks() -> None:
    """One source is as many bits as told; an IPv4 address within IPv6 is itself."""
    penalties = Penalties(Limits(perSourceNetBlockSize=(24, 64)))
    penalties.punish("192.0.2.1", Offence.CRASH, 0)
    penalties.punish("2001:db8::1", Offence.CRASH, 0)
    assert penalties.refusedFor("192.0.2.200", 0) == 90
    assert penalties.refusedFor("::ffff:192.0.2.9", 0) == 90
    assert penalties.refusedFor("192.0.3.1", 0) == 0
    assert penalties.refusedFor("2001:db8::ffff:1", 0) == 90
    assert penalties.refusedFor("2001:db8:0:1::1", 0) == 0
    assert penalties.refusedFor("fe80::1%eth0", 0) == 0


def test_exempt() -> None:
    """Never refused, by address and by network."""
    penalties = Penalties(
        Limits(perSourcePenaltyExemptList=("192.0.2.1", "10.0.0.0/8", "2001:db8::/32"))
    )
    for host in ("192.0.2.1", "10.1.2.3", "2001:db8::1", "192.0.2.2"):
        penalties.punish(host, Offence.CRASH, 0)
    refused = [penalties.refusedFor(host, 0) for host in ("192.0.2.1", "10.1.2.3", "2001:db8::1")]
    assert refused == [0, 0, 0]
    assert penalties.refusedFor("192.0.2.2", 0) == 90


def test_disabled() -> None:
    """``no`` means no."""
    penalties = Penalties(Limits(perSourcePenalties=PenaltyRules(enabled=False)))
    penalties.punish("192.0.2.1", Offence.CRASH, 0)
    assert penalties.refusedFor("192.0.2.1", 0) == 0


def test_noAddress() -> None:
    """A peer on a unix socket has no address to punish."""
    penalties = Penalties(Limits())
    penalties.punish("", Offence.CRASH, 0)
    assert penalties.refusedFor("", 0) == 0


def test_sourcesAreBounded() -> None:
    """A full table forgets who has served his time, and no one else."""
    penalties = Penalties(Limits(perSourcePenalties=PenaltyRules(maxSources=3)))
    for n in range(5):
        penalties.punish(f"192.0.2.{n}", Offence.CRASH, 0)
    assert [bool(penalties.refusedFor(f"192.0.2.{n}", 0)) for n in range(5)] == [True] * 3 + [
        False
    ] * 2
    penalties.punish("192.0.2.4", Offence.CRASH, 95)
    assert penalties.refusedFor("192.0.2.4", 95) == 90


# --- the factory at work ---------------------------------------------------------------------


def another(raw: RawClient, host: str = "127.0.0.2") -> RawClient:
    return RawClient(factory=raw.factory, host=host)


def test_randomEarlyDrop() -> None:
    """Ten may wait; of the next some are told so and closed; who logs in makes room."""
    first = RawClient((AnonymousOwnerChecker(),))
    factory = first.factory
    factory.random = lambda: 0.29
    waiting = [first, *(another(first) for _ in range(9))]
    assert len(factory._startups) == 10
    refused = factory.buildProtocol(None)
    refused.makeConnection(first.tcp.__class__("127.0.0.2"))
    assert refused.transport.written == [b"Exceeded MaxStartups\r\n"]
    assert refused.transport.closed == "lost"
    factory.random = lambda: 0.31
    lucky = another(first)
    lucky.login()
    waiting[0].login()
    waiting[1].drop()
    assert len(factory._startups) == 8


def refusal(raw: RawClient) -> Any:
    raw.write(VERSION + b"\r\n")
    raw.sendKexInit()
    return raw.disconnected()


def test_guessersArePunished() -> None:
    """Who fails again and again is refused for a while; others are not."""
    raw = RawClient(NOBODY)
    for patient in (True, False, True, False):
        guesser = another(raw)
        guesser.start()
        guesser.requestAuth()
        guesser.auth(b"nonsense")
        # Not to wait for the answer helps nobody.
        guesser.clock.advance(0.01 if patient else 0)
        assert bool(guesser.read()) is patient
        guesser.drop()
    assert refusal(another(raw)) == (12, b"too many offences from this address")
    assert refusal(another(raw, "127.0.0.3")) is None


def test_knockingWhileRefusedIsNoOffence() -> None:
    """A client that tries again and again is let in when its time is over, and not kept out by
    having tried."""
    raw = RawClient(NOBODY)
    raw.factory.penalties.punish("127.0.0.2", Offence.CRASH, 0)
    answers = []
    for _ in range(20):
        knocking = another(raw)
        answers.append(refusal(knocking))
        knocking.drop()
        raw.clock.advance(5)
    # 90 seconds wear off, of which the last 15 refuse nobody.
    assert answers[:16] == [(12, b"too many offences from this address")] * 16
    assert answers[16:] == [None] * 4


def test_whoOnlyLooksIsNotPunished() -> None:
    """A balancer that looks every second whether the port is open may go on."""
    raw = RawClient(NOBODY)
    for _ in range(100):
        another(raw).drop()
    assert refusal(another(raw)) is None


def test_refusalsAreNotLoggedOneByOne() -> None:
    """A flood of refused connections makes one line a minute."""
    lines: list[Any] = []

    def observe(event: Any) -> None:
        if event["log_level"].name in ("info", "warn"):
            lines.append(event)

    raw = RawClient(NOBODY)
    for _ in range(5):
        raw.factory.penalties.punish("127.0.0.2", Offence.CRASH, 0)
    globalLogPublisher.addObserver(observe)
    try:
        for _ in range(50):
            refused = another(raw)
            assert refusal(refused) is not None
            refused.drop()
            assert refused.factory._startups.keys() == {raw.server}
        assert len(lines) == 1
        raw.clock.advance(60)
        assert refusal(another(raw)) is not None
    finally:
        globalLogPublisher.removeObserver(observe)
    assert lines[-1]["count"] == 50


def test_scannersArePunishedLittle() -> None:
    """ssh-keyscan and ssh-audit come some ten times, and still get through."""
    raw = RawClient(NOBODY)
    for _ in range(14):
        scanner = another(raw)
        scanner.start()
        scanner.drop()
    assert refusal(another(raw)) is None
    assert refusal(another(raw, "127.0.0.3")) is None


def test_successIsNoOffence() -> None:
    """A busy jump host with a mistyped password now and then is welcome."""
    raw = RawClient(NOBODY)
    for _ in range(50):
        user = another(raw)
        user.start()
        user.requestAuth()
        user.auth(b"nonsense")
        user.clock.advance(0.005)
        user.read()
        user.password(b"tok")
        assert user.read() == [(52, b"")]
        user.drop()
    assert refusal(another(raw)) is None


def test_crashesArePunished(loggedFailures: Any) -> None:
    """Whoever makes our code fail is not let in again at once."""
    raw = RawClient((AnonymousOwnerChecker(),)).login()

    def broken(number: int, payload: bytes) -> None:
        raise RuntimeError("bug")

    raw.server._receive = broken
    raw.send(94, string(b""))
    raw.drop()
    assert refusal(another(raw)) == (12, b"too many offences from this address")
    loggedFailures.flush(RuntimeError)


def test_perSourceMaxStartups() -> None:
    """One address cannot take all the places."""
    raw = RawClient(NOBODY, perSourceMaxStartups=2)
    assert refusal(raw) is None
    assert refusal(another(raw)) is None
    assert refusal(another(raw)) == (12, b"too many connections from this address")
    assert refusal(another(raw, "127.0.0.3")) is None
    raw.drop()


def test_addressIsAskedForLate() -> None:
    """Behind a proxy the peer's address is right only after the first bytes."""
    raw = RawClient(NOBODY)
    for _ in range(2):
        raw.factory.penalties.punish("198.51.100.1", Offence.CRASH, 0)
    proxied = another(raw, "127.0.0.1")
    proxied.tcp.host = "198.51.100.1"
    assert refusal(proxied) == (12, b"too many offences from this address")
