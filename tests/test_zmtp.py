"""ZMTP as the agent speaks it: against libzmq itself, in pieces, and malformed."""

from __future__ import annotations

import hmac
import socket
import struct

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from jupyter_client.session import Session

from conchkernel.remote import zmtp

GREETING = zmtp.HELLO[:64]
KEY = b"the kernel's key"


def ready(*properties: tuple[bytes, bytes]) -> bytes:
    """A READY command with these properties."""
    body = b"\x05READY" + b"".join(
        bytes([len(name)]) + name + struct.pack(">I", len(value)) + value
        for name, value in properties
    )
    if len(body) < 256:
        return b"\x04" + bytes([len(body)]) + body
    return b"\x06" + struct.pack(">Q", len(body)) + body


def frames_of(message: bytes) -> list[memoryview]:
    """The frames of a whole message."""
    found = zmtp.find_message(memoryview(message), 0, 1024)
    assert found is not None
    assert found[1] == len(message)
    return found[0]


@pytest.mark.parametrize("digest", ["sha256", "sha512", "md5", "sha3_256"])
@pytest.mark.parametrize("size", [1, 63, 64, 65, 128, 129, 1000])
def test_a_signature_is_an_hmac(digest: str, size: int) -> None:
    """For keys that are shorter than the hash function's block, as long, and longer."""
    key, parts = bytes(range(256)) * 4, b"header{}{}{}"
    signer = zmtp.Signer(key[:size], digest)
    for _ in range(2):
        assert signer._sign(parts) == hmac.new(key[:size], parts, digest).hexdigest().encode()


@pytest.mark.parametrize("size", [0, 1, 200, 255])
def test_a_hello_tells_the_identity(size: int) -> None:
    """Of any length that ZeroMQ allows, and only when all of it has come."""
    identity = bytes(range(1, 256))[:size]
    said = GREETING + ready((b"Socket-Type", b"DEALER"), (b"Identity", identity))
    for end in range(len(said)):
        assert zmtp.hello(said[:end]) is None
    assert zmtp.hello(said) == (identity, len(said))
    assert zmtp.hello(said + b"more") == (identity, len(said))


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + bytes(64),
        bytes(66),
        GREETING[:10] + b"\x02" + GREETING[11:] + ready(),
        GREETING.replace(b"NULL", b"PLAIN\0"[:4]) + ready(),
        GREETING + b"\x00\x05hello",
        GREETING + b"\x04\x06\x05ERROR",
        GREETING + b"\x06" + struct.pack(">Q", 2**63) + b"\x05READY",
        GREETING + b"\x04\x0a\x05READY\x08Ide",
        GREETING + b"\x04\x13\x05READY\x08Identity\xff\xff\xff\xff",
    ],
)
def test_another_hello_is_malformed(said: bytes) -> None:
    """Other protocols, versions and mechanisms; lengths that lie."""
    with pytest.raises(zmtp.Malformed):
        zmtp.hello(said)


@given(st.binary(min_size=1, max_size=600), st.data())
def test_a_message_of_ours_in_pieces(payload: bytes, data: st.DataObject) -> None:
    """It is found when the last byte is there, wherever it lies, and not before."""
    signer = zmtp.Signer(KEY, "sha256")
    before = data.draw(st.binary(max_size=10))
    message = signer.head(len(payload)) + payload
    view = memoryview(before + message + b"\x01")
    end = len(before) + len(message)
    for short in (len(before), end - 1, data.draw(st.integers(len(before), end - 1))):
        assert zmtp.find_message(view[:short], len(before), 1024) is None
    found = zmtp.find_message(view, len(before), 1024)
    assert found is not None
    assert found[1] == end
    assert signer.checked(found[0]) == payload


@pytest.mark.parametrize("key", [KEY, b""])
def test_a_server_reads_what_is_signed(key: bytes) -> None:
    """Jupyter's own session takes it, and what that signs is taken."""
    session = Session(key=key)
    signer = zmtp.Signer(key, "sha256")
    parts = [frame.tobytes() for frame in frames_of(signer.head(5) + b"hello")]
    told = session.deserialize(session.feed_identities(parts)[1])
    assert told["msg_type"] == "conchkernel"
    assert told["buffers"] == [b"hello"]
    theirs = [*session.serialize(session.msg("conchkernel")), b"\0data"]
    assert signer.checked([memoryview(part) for part in theirs]) == b"\0data"


def test_what_is_not_ours_is_not_taken() -> None:
    """Forged, of another type, without a buffer, or with two."""
    signer = zmtp.Signer(KEY, "sha256")
    ours = frames_of(signer.head(5) + b"hello")
    assert signer.checked(ours) == b"hello"
    assert signer.checked(ours[:6]) is None
    assert signer.checked([*ours[:6], memoryview(b"")]) is None
    assert signer.checked([]) is None
    assert zmtp.Signer(b"another", "sha256").checked(ours) is None
    session = Session(key=KEY)
    others = [*session.serialize(session.msg("input_reply")), b"\0data"]
    assert signer.checked([memoryview(part) for part in others]) is None


@pytest.mark.parametrize(
    "message",
    [
        b"\x03" + struct.pack(">Q", 2**63) + b"x",
        b"\x01\x00" * 6 + b"\x02" + struct.pack(">Q", 1025) + b"x",
        b"\x03" + struct.pack(">Q", 4097) + b"x",
        b"\x01\x00" * 7,
        b"\x01\x00\x04\x00",
    ],
)
def test_bounds_of_a_message(message: bytes) -> None:
    """A length is refused before its bytes are waited for; so are frames without end."""
    with pytest.raises(zmtp.Malformed):
        zmtp.find_message(memoryview(message), 0, 1024)


def test_a_command_is_a_message_without_frames() -> None:
    """Whatever ZMTP says between messages means nothing here."""
    ping = b"\x04\x07\x04PING\0\0"
    assert zmtp.find_message(memoryview(ping), 0, 1024) == ([], len(ping))


def test_an_unknown_hash_is_refused() -> None:
    """At once, and not with the first message."""
    with pytest.raises(ValueError, match="unsupported hash"):
        zmtp.Signer(KEY, "no-such-hash")
    with pytest.raises(ValueError, match="no size"):
        zmtp.Signer(KEY, "shake_128")


def test_libzmq_takes_our_hello() -> None:
    """And sends one that is understood, and messages in the frames that are expected."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer, socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen()
        door.settimeout(20)
        dealer.linger = 0
        dealer.rcvtimeo = 20_000
        dealer.identity = b"me"
        dealer.connect(f"tcp://127.0.0.1:{door.getsockname()[1]}")
        connection = door.accept()[0]
        with connection:
            connection.settimeout(20)
            connection.sendall(zmtp.HELLO)
            heard = b""
            while (said := zmtp.hello(heard)) is None:
                heard += connection.recv(1000)
            assert said == (b"me", len(heard))
            sent = [b"a", b"b" * 300]
            dealer.send_multipart(sent)
            heard = b""
            while (found := zmtp.find_message(memoryview(heard), 0, 1024)) is None:
                heard += connection.recv(1000)
            assert found[0] == sent
            signer = zmtp.Signer(KEY, "sha256")
            connection.sendall(signer.head(70_000) + b"x" * 70_000)
            parts = dealer.recv_multipart()
            assert signer.checked([memoryview(part) for part in parts]) == b"x" * 70_000
