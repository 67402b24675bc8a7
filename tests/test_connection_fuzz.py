"""Whatever a logged in client sends, in whatever order: an answer, silence, or a clean goodbye."""

from __future__ import annotations

import struct

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from conchkernel.avatars import KernelAvatar
from conchkernel.errors import LinkLost
from conchkernel.interfaces import ExitStatus
from conchkernel.ssh.channel import CREDIT_CAP_BYTES, LOCAL_WINDOW_BYTES, GatewayChannel
from conchkernel.ssh.fields import string
from conchkernel.testing import MemoryBackend, MemoryClient, MemoryStream

uint32 = st.one_of(st.integers(0, 3), st.sampled_from([1023, 1024, 32768, 2**31, 2**32 - 1]))
numbers = uint32.map(lambda value: struct.pack(">L", value))
names = st.one_of(
    st.sampled_from([
        b"session", b"direct-tcpip", b"pty-req", b"env", b"shell", b"exec", b"subsystem",
        b"window-change", b"signal", b"break", b"eow@openssh.com", b"keepalive@openssh.com",
        b"no-more-sessions@openssh.com", b"LANG", b"INT", b"sftp", b"xterm", b"tcpip-forward",
        b"cancel-tcpip-forward", b"streamlocal-forward@openssh.com", b"/tmp/s", b"localhost",
        b"direct-streamlocal@openssh.com", b"auth-agent-req@openssh.com", b"forwarded-tcpip",
    ]),
    st.binary(max_size=20),
)  # fmt: skip
fields = st.one_of(
    numbers,
    names.map(string),
    st.sampled_from([b"\0", b"\1", b""]),
    st.binary(max_size=8),
    st.sampled_from([string(b"x" * 32768), string(b"x" * 32769)]),
)
payloads = st.lists(fields, max_size=8).map(b"".join)
ids = st.integers(0, 5).map(lambda number: struct.pack(">L", number))


def request(name: bytes, *parts: bytes) -> bytes:
    """A channel request without its channel."""
    return string(name) + b"\1" + b"".join(parts)


#: Messages as a client means them, so that the garbage meets channels that are alive.
OPEN = (90, string(b"session") + struct.pack(">3L", 0, 1000, 32768))
DIRECT = string(b"db") + struct.pack(">L", 5432) + string(b"127.0.0.1") + struct.pack(">L", 1)
BIND = string(b"localhost") + struct.pack(">L", 0)
sane = st.one_of(
    st.just(OPEN),
    st.just((90, string(b"direct-tcpip") + struct.pack(">3L", 0, 1000, 32768) + DIRECT)),
    st.sampled_from([
        (80, request(b"tcpip-forward", BIND)),
        (80, request(b"cancel-tcpip-forward", string(b"localhost"), struct.pack(">L", 49152))),
        (80, request(b"streamlocal-forward@openssh.com", string(b"/tmp/s"))),
        (80, request(b"cancel-streamlocal-forward@openssh.com", string(b"/tmp/s"))),
    ]),
    # answers to channels that we have asked for
    st.tuples(st.just(91), ids.map(lambda one: one + struct.pack(">3L", 7, 1000, 32768))),
    st.tuples(st.just(92), ids.map(lambda one: one + struct.pack(">L", 1) + string(b"") * 2)),
    st.tuples(st.just(94), st.builds(lambda one, two: one + string(two), ids, st.binary())),
    st.tuples(st.just(93), st.builds(lambda one, two: one + two, ids, numbers)),
    st.tuples(st.sampled_from([96, 97, 99, 100]), ids),
    st.tuples(
        st.just(98),
        st.builds(
            lambda one, two: one + two,
            ids,
            st.sampled_from([
                request(b"shell"),
                request(b"exec", string(b"command")),
                request(b"env", string(b"LANG"), string(b"C")),
                request(b"window-change", b"\0" * 16),
                request(b"signal", string(b"INT")),
                request(b"eow@openssh.com"),
                request(b"auth-agent-req@openssh.com"),
                request(b"pty-req", string(b"vt100"), b"\0" * 16, string(b"")),
            ]),
        ),
    ),
)  # fmt: skip
garbage = st.tuples(st.integers(80, 127), st.one_of(payloads, st.binary(max_size=64)))
#: What happens on our side of the connection meanwhile.
events = st.sampled_from([
    "pause", "resume", "output", "error", "end", "take", "answer", "connect", "lost",
])  # fmt: skip


class PlainClient(MemoryClient):
    """Sends what it likes, and so cannot mind what it gets for it."""

    def sendPacket(self, message: int, payload: bytes) -> None:
        self.sent.append((message, payload))


def happen(event: str, client: MemoryClient, backend: MemoryBackend) -> None:
    """Let ``event`` happen."""
    if event == "pause":
        client.pause()
    elif event == "resume":
        client.resume()
    elif event == "answer":
        if backend.waiting:
            backend.answer()
    elif event in ("connect", "lost"):
        for listener in [one for link in backend.links for one in link.listeners]:
            if not listener.closed and event == "connect":
                listener.connect("127.0.0.1", 4000)
            elif not listener.closed:
                listener.closed = True
                listener.receiver.listenerLost(LinkLost("gone"))
    else:
        streams: list[MemoryStream] = [one for link in backend.links for one in link.streams]
        for stream in streams:
            if event == "output":
                stream.put(b"o" * 5000)
            elif event == "error":
                stream.putError(b"e" * 50)
            elif event == "take":
                stream.take()
            elif not stream.closed:
                stream.end(ExitStatus(1))


def leftAfterTheEnd(client: MemoryClient, backend: MemoryBackend) -> list[GatewayChannel]:
    """Let all that is open come to its end; the channels that do not."""
    client.resume()
    while backend.waiting:
        backend.answer()
    channels = [one for one in client.connection.channels.values() if one.remoteId >= 0]
    for channel in channels:
        client.receive(97, struct.pack(">L", channel.id))
    for stream in [one for link in backend.links for one in link.streams]:
        stream.take()
        stream.end(ExitStatus(1))
    return [one for one in channels if one.id in client.connection.channels]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.one_of(sane, sane, sane, events, events, garbage), max_size=50), st.booleans())
@example([(90, string(b"session") + struct.pack(">3L", 0, 0, 2**32 - 1)), (98, b"\0" * 4)], False)
def test_anyConversation(steps: list[tuple[int, bytes] | str], slow: bool) -> None:
    """No step raises, logs a failure, or has more held than the bounds allow; and when client and
    programs are done no channel is left."""
    backend = MemoryBackend(lambda stream: stream.opened())
    backend.slow = slow
    client = PlainClient(KernelAvatar(backend, "joe"))
    for number in range(3):
        client.receive(*OPEN)
        client.receive(98, struct.pack(">L", number) + request(b"exec", string(b"command")))
    for step in steps:
        if isinstance(step, str):
            happen(step, client, backend)
        else:
            client.receive(*step)
        for channel in client.connection.channels.values():
            assert channel.bufferedBytes <= CREDIT_CAP_BYTES + 1000
            assert len(channel._early) <= LOCAL_WINDOW_BYTES
    if client.disconnected is None:
        assert not leftAfterTheEnd(client, backend)
    client.lose()
    assert all(link.released for link in backend.links)
    assert all(listener.closed for link in backend.links for listener in link.listeners)
    assert backend.waiting == []
