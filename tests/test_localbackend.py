"""This host as a backend: what the suite for all backends (tests/conformance) does not ask."""

from __future__ import annotations

import errno
import gc
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.process import reapProcessHandlers
from zope.interface.verify import verifyObject

from conchkernel.errors import LinkLost, StreamRefused
from conchkernel.files import Attributes, FileProblem, FileStoreError, OpenFlag
from conchkernel.interfaces import (
    ExitSignal,
    ExitStatus,
    IBackend,
    IKernelLink,
    IStream,
    ProcessRequest,
    PtyRequest,
    WindowSize,
)
from conchkernel.localbackend import LocalBackend

from .collector import Collector

TERMINAL = PtyRequest(b"vt100", WindowSize(80, 24))


@pytest.fixture
def backend():
    made = LocalBackend(reactor)
    yield made
    pytest_twisted.blockon(Deferred.fromCoroutine(made.stop()))


@pytest.fixture
def link(backend):
    return pytest_twisted.blockon(backend.connect("owner"))


async def run(link: Any, command: bytes, pty: PtyRequest | None = None) -> Collector:
    """Run a command to its end."""
    collector = Collector()
    collector.start(link, ProcessRequest(command, pty))
    await collector.untilClosed()
    return collector


@pytest_twisted.ensureDeferred
async def test_itIsWhatTheInterfacesSay(backend: Any, link: Any) -> None:
    """Backend, link and stream have what the contract names."""
    verifyObject(IBackend, backend)
    verifyObject(IKernelLink, link)
    collector = Collector()
    verifyObject(IStream, collector.start(link, ProcessRequest(b"true")))
    await collector.untilClosed()


@pytest.mark.parametrize("pty", [None, TERMINAL])
@pytest_twisted.ensureDeferred
async def test_theGatewayStaysWhereItIs(link: Any, tmp_path: Path, pty: Any) -> None:
    """Programs begin in the account's home; this process keeps its directory, and its errors."""
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        done = await run(link, b"pwd", pty)
        assert os.getcwd() == str(tmp_path)
        with pytest.raises(OSError, match="nowhere"):
            os.chdir("nowhere")
    finally:
        os.chdir(before)
    assert bytes(done.out).strip() == os.path.realpath(os.path.expanduser("~")).encode()


@pytest_twisted.ensureDeferred
async def test_nothingStaysOpen(link: Any) -> None:
    """Fifty programs later there are no more descriptors than before, and nobody is waited for."""
    await run(link, b"true")
    gc.collect()
    before = len(os.listdir("/dev/fd"))
    for number in range(25):
        assert (await run(link, b"exit %d" % number)).exit == ExitStatus(number)
        assert (await run(link, b"exit %d" % number, TERMINAL)).exit == ExitStatus(number)
    gc.collect()
    # What earlier tests have left may go meanwhile.
    assert len(os.listdir("/dev/fd")) <= before
    assert not reapProcessHandlers


@pytest_twisted.ensureDeferred
async def test_aStatusThatSomebodyElseTookIsNotInvented(link: Any) -> None:
    """An application that waits for all children takes the status: the stream says that it ends,
    and not how."""
    collector = Collector()
    stream = collector.start(link, ProcessRequest(b"echo ready; read x"))
    await collector.untilOutput(b"ready")
    assert collector.opened is not None
    pid = int(str(collector.opened["pid"]))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    # The next program's end has the reactor look for everybody.
    await run(link, b"true")
    await collector.untilClosed()
    assert collector.exit is None
    assert isinstance(collector.reason, LinkLost)
    stream.write(b"late")
    stream.close()


@pytest_twisted.ensureDeferred
async def test_aDefectCostsItsStreamOnly(link: Any, loggedFailures: Any) -> None:
    """A receiver that raises loses its stream, is logged, and nobody else is concerned."""

    class Broken(Collector):
        def streamData(self, data: Any) -> None:
            raise ZeroDivisionError

    broken = Broken()
    broken.start(link, ProcessRequest(b"echo x; exec sleep 1000", TERMINAL))
    await broken.untilClosed()
    assert isinstance(broken.reason, LinkLost)
    assert len(loggedFailures.flush(ZeroDivisionError)) == 1
    assert (await run(link, b"exit 3")).exit == ExitStatus(3)


@pytest_twisted.ensureDeferred
async def test_theEndOfAUseHangsUp(backend: Any) -> None:
    """Released, a use's terminals hang up and its files close."""
    use = await backend.connect("somebody")
    store = await use.openFiles(None, False)
    collector = Collector()
    collector.start(use, ProcessRequest(b"trap 'exit 3' HUP; echo ready; read x", TERMINAL))
    await collector.untilOutput(b"ready")
    file = await store.open(os.fsencode(__file__), OpenFlag.READ, Attributes())
    descriptor = file.descriptor
    use.release()
    await collector.untilClosed()
    assert collector.reason is None
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(descriptor)
    with pytest.raises(LinkLost):
        await use.openFiles(None, False)
    use.release()
    assert use not in backend.uses


@pytest_twisted.ensureDeferred
async def test_theEndOfTheGatewayHangsUp(backend: Any, link: Any) -> None:
    """Stopped, the backend ends every use, and starts nothing any more."""
    collector = Collector()
    collector.start(link, ProcessRequest(b"echo ready; read x", TERMINAL))
    await collector.untilOutput(b"ready")
    assert collector.opened is not None
    pid = int(str(collector.opened["pid"]))
    await backend.stop()
    await collector.untilClosed()
    late = Collector()
    late.start(link, ProcessRequest(b"true"))
    await late.untilClosed()
    assert isinstance(late.reason, LinkLost)
    # Its end is seen by whoever waits for programs, and the pid is nobody's then.
    other = await LocalBackend(reactor).connect("owner")
    while pid in reapProcessHandlers:
        await run(other, b"true")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest_twisted.ensureDeferred
async def test_aShellThatIsNoneIsASentence() -> None:
    """What cannot start is refused with the reason."""
    link: Any = await LocalBackend(reactor, shell="/no/such/shell").connect("owner")
    done = await run(link, b"true")
    assert isinstance(done.reason, StreamRefused)
    assert "/no/such/shell" in str(done.reason)
    assert done.exit is None


@pytest_twisted.ensureDeferred
async def test_aShellOfOnesOwn() -> None:
    """Shell, directory and environment are the embedder's to choose."""
    made = LocalBackend(reactor, environment={"A": "1"}, directory="/", shell="/bin/sh")
    done = await run(await made.connect("owner"), b'echo "$0 $A $PWD $HOME"; kill -9 $$')
    assert done.out.startswith(b"sh 1 / /")
    assert done.exit == ExitSignal("KILL")


@pytest_twisted.ensureDeferred
async def test_filesBelowARootAndToLookAt(link: Any, tmp_path: Path) -> None:
    """A root is all there is; read-only is; a root that is none is refused."""
    (tmp_path / "inside").write_bytes(b"x")
    store: Any = await link.openFiles(os.fsencode(tmp_path), True)
    assert (await store.stat(b"/inside")).size == 1
    with pytest.raises(FileStoreError) as caught:
        await store.stat(b"/../../../../../etc/passwd")
    assert caught.value.problem is FileProblem.NOT_FOUND
    with pytest.raises(FileStoreError) as caught:
        await store.remove(b"/inside")
    assert caught.value.problem is FileProblem.READ_ONLY
    await store.close()
    for root in (b"relative", os.fsencode(tmp_path / "inside"), b"/no/such/directory"):
        with pytest.raises(StreamRefused):
            await link.openFiles(root, False)
