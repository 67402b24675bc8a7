"""Who is logged in, and their use of a kernel."""

from __future__ import annotations

import pytest
from twisted.conch.interfaces import IConchUser
from twisted.cred.checkers import ANONYMOUS
from twisted.cred.portal import IRealm
from twisted.internet.defer import CancelledError, Deferred, fail
from zope.interface.verify import verifyObject

from conchkernel.avatars import KernelAvatar, KernelRealm
from conchkernel.errors import JupyterUnreachable
from conchkernel.interfaces import IBackend, IKernelLink, IStream, IStreamReceiver, ProcessRequest
from conchkernel.ssh.channel import ChannelRefused
from conchkernel.ssh.sessions import SessionChannel
from conchkernel.testing import MemoryBackend, MemoryLink, MemoryStream


@pytest.fixture
def backend() -> MemoryBackend:
    backend = MemoryBackend()
    backend.slow = True
    return backend


@pytest.fixture
def avatar(backend: MemoryBackend) -> KernelAvatar:
    return KernelAvatar(backend, "joe")


def results(*waiting: Deferred[IKernelLink]) -> list[object]:
    """What the Deferreds came to so far; ``None`` for those that wait."""
    found: list[object] = [None] * len(waiting)
    for number, deferred in enumerate(waiting):
        deferred.addCallbacks(
            lambda link, n=number: found.__setitem__(n, link),
            lambda reason, n=number: found.__setitem__(n, reason.type),
        )
    return found


def test_interfaces(backend: MemoryBackend, avatar: KernelAvatar) -> None:
    """Everybody keeps the contract."""
    verifyObject(IRealm, KernelRealm(backend))
    verifyObject(IBackend, backend)
    verifyObject(IKernelLink, MemoryLink())
    channel = SessionChannel(avatar=avatar)
    verifyObject(IStreamReceiver, channel)
    verifyObject(IStream, MemoryStream(ProcessRequest(), channel))
    assert IConchUser.providedBy(avatar) or IConchUser(avatar, None) is not None


@pytest.mark.parametrize(
    ("avatarId", "user"),
    [(b"joe", "joe"), ("joe", "joe"), (ANONYMOUS, "anonymous"), (b"j\xf6e", "j\udcf6e")],
)
def test_realmKnowsTheUser(backend: MemoryBackend, avatarId: object, user: str) -> None:
    """A kernel is asked for by the name that the checker gave."""
    interface, avatar, logout = KernelRealm(backend).requestAvatar(avatarId, None, IConchUser)  # type: ignore[arg-type]
    assert interface is IConchUser
    assert logout == avatar.logout  # type: ignore[attr-defined]
    avatar.warmUp()  # type: ignore[attr-defined]
    assert backend.users == [user]


def test_realmForOthers(backend: MemoryBackend) -> None:
    """Only SSH users live here."""
    with pytest.raises(NotImplementedError):
        KernelRealm(backend).requestAvatar(b"joe", None, IRealm)


def test_kernelPerConnection(backend: MemoryBackend) -> None:
    """On request every connection has a kernel to itself."""
    realm = KernelRealm(backend, kernelPer="connection", acceptEnv=["X"])
    for name in (b"joe", b"joe", b"ann"):
        avatar = realm.requestAvatar(name, None, IConchUser)[1]
        avatar.warmUp()  # type: ignore[attr-defined]
        assert avatar.acceptEnv == ("X",)  # type: ignore[attr-defined]
    assert backend.users == ["joe#1", "joe#2", "ann#3"]


def test_oneLinkForAll(backend: MemoryBackend, avatar: KernelAvatar) -> None:
    """All who need the link, early or late, share one."""
    avatar.warmUp()
    early = results(avatar.link(), avatar.link())
    backend.answer()
    late = results(avatar.link())
    assert early == [backend.links[0]] * 2
    assert late == [backend.links[0]]
    assert backend.users == ["joe"]


def test_oneWhoWaitsMayLeave(backend: MemoryBackend, avatar: KernelAvatar) -> None:
    """Cancelling is one caller's business; the others still get their link."""
    leaving, staying = avatar.link(), avatar.link()
    found = results(leaving, staying)
    leaving.cancel()
    backend.answer()
    assert found == [CancelledError, backend.links[0]]


def test_failureIsNotForEver(backend: MemoryBackend, avatar: KernelAvatar) -> None:
    """All who wait learn of a failure; the next one makes another attempt."""
    found = results(avatar.link(), avatar.link())
    backend.answer(JupyterUnreachable("nobody there"))
    assert found == [JupyterUnreachable] * 2
    again = results(avatar.link())
    backend.answer()
    assert again == [backend.links[0]]


def test_warmUpFailsQuietly(backend: MemoryBackend, avatar: KernelAvatar) -> None:
    """Nobody asked yet, so nobody is told; who asks later has an attempt of their own."""
    avatar.warmUp()
    backend.answer(JupyterUnreachable("nobody there"))
    found = results(avatar.link())
    backend.answer()
    assert found == [backend.links[0]]


def test_surpriseIsLogged(avatar: KernelAvatar, loggedFailures: object) -> None:
    """A backend that breaks in an unforeseen way is an error for the log, and for who asked."""
    avatar._backend.connect = lambda user: fail(ZeroDivisionError())  # type: ignore[method-assign]
    assert results(avatar.link()) == [ZeroDivisionError]
    assert loggedFailures.flush(ZeroDivisionError)  # type: ignore[attr-defined]


def test_logoutGivesTheLinkBack(backend: MemoryBackend, avatar: KernelAvatar) -> None:
    """Once, also if it is called twice."""
    results(avatar.link())
    backend.answer()
    avatar.logout()
    avatar.logout()
    assert backend.links[0].released


def test_logoutWhileConnecting(backend: MemoryBackend, avatar: KernelAvatar) -> None:
    """A kernel that nobody waits for any more is not waited for."""
    found = results(avatar.link())
    avatar.logout()
    assert backend.waiting == []
    assert found == [CancelledError]
    assert results(avatar.link()) == [CancelledError]


def test_linkThatComesTooLate(avatar: KernelAvatar) -> None:
    """A backend that cannot be stopped in time has its link given back."""
    answer: Deferred[IKernelLink] = Deferred(lambda deferred: deferred.callback(link))
    link = MemoryLink()
    avatar._backend.connect = lambda user: answer  # type: ignore[method-assign]
    avatar.warmUp()
    avatar.logout()
    assert link.released


def test_channelsAndRequests(avatar: KernelAvatar) -> None:
    """What the tables name, and nothing else."""
    channel = avatar.lookupChannel(b"session", 100, 32768, b"")
    assert isinstance(channel, SessionChannel)
    assert channel.avatar is avatar
    with pytest.raises(ChannelRefused):
        avatar.lookupChannel(b"tun@openssh.com", 100, 32768, b"")
    assert not avatar.gotGlobalRequest(b"ours@example.org", b"")
    avatar.globalRequestLookup[b"ours@example.org"] = lambda data: (1, data)
    assert avatar.gotGlobalRequest(b"ours@example.org", b"x") == (1, b"x")
