"""The transport: what each message leads to, in and out of place, and what is never lost."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.conch.ssh.keys import Key
from twisted.logger import globalLogPublisher

from conchkernel.ssh import kex
from conchkernel.ssh.checkers import AnonymousOwnerChecker
from conchkernel.ssh.fields import Fields, string
from conchkernel.ssh.kex import KexInit
from conchkernel.ssh.packets import KNOWN_PEER_BYTES
from tests.rawclient import HOST_KEY, KEXINIT, VERSION, RawClient

ANYBODY = (AnonymousOwnerChecker(),)
LOOSE = dataclasses.replace(
    KEXINIT, methods=(b"curve25519-sha256",)
)  # an old client: neither strict nor hybrid, and without extensions
DATA = (0).to_bytes(4, "big")


@pytest.fixture
def loggedLines() -> Any:
    """What the ssh column logged at INFO and above."""
    lines: list[dict[str, Any]] = []

    def observe(event: dict[str, Any]) -> None:
        if event["log_level"].name != "debug" and event["log_namespace"].startswith("conchkernel"):
            lines.append(event)

    globalLogPublisher.addObserver(observe)
    yield lines
    globalLogPublisher.removeObserver(observe)


def client(**options: Any) -> RawClient:
    return RawClient(ANYBODY, **options)


# --- hello -----------------------------------------------------------------------------------


def test_greeting() -> None:
    """The version line is there at once, and nothing after it yet."""
    raw = client()
    assert raw.read() == []
    assert raw.greeting == b"SSH-2.0-OpenSSH_compatible_conchkernel_0.1.0"
    assert raw.tcp.noDelay
    assert raw.tcp.keepAlive
    assert raw.tcp.bufferSize == 256 * 1024


def test_ourKexInitWaitsForTheirs() -> None:
    """The client speaks first: our offer fits it."""
    raw = client()
    raw.write(VERSION + b"\r\n")
    assert raw.read() == []
    raw.sendKexInit()
    assert [number for number, _ in raw.read()] == [20]
    assert KexInit.parse(raw.kexInit).ciphers_in == (
        b"aes128-gcm@openssh.com",
        b"aes256-gcm@openssh.com",
    )


def test_aWaitingClientIsNotKeptWaiting() -> None:
    """After a short time our KEXINIT comes unasked, for any kind of client."""
    raw = client()
    raw.write(VERSION + b"\r\n")
    raw.clock.advance(0.2)
    assert [number for number, _ in raw.read()] == [20]
    assert b"aes128-ctr" in KexInit.parse(raw.kexInit).ciphers_in
    raw.exchange()
    raw.requestAuth()


def test_helloInPieces() -> None:
    """Version line and packets are the same in any pieces."""
    whole = client().start()
    raw = client()
    hello = VERSION + b"\r\n" + raw.pack(20, KEXINIT.encode())
    for at in range(len(hello)):
        raw.write(hello[at : at + 1])
    assert [number for number, _ in raw.read()] == [20]
    assert [number for number, _ in whole.messages] == []


def test_helloInOneBigSegment() -> None:
    """A version line and a KEXINIT of more than 4 KiB in one piece are taken."""
    raw = client()
    big = dataclasses.replace(
        KEXINIT, host_key_algorithms=(*(b"x" * 60 for _ in range(200)), b"ssh-ed25519")
    )
    raw.write(VERSION + b"\r\n" + raw.pack(20, big.encode()))
    assert [number for number, _ in raw.read()] == [20]


def test_versionWithoutCarriageReturn() -> None:
    """Some clients end the line with a bare newline."""
    raw = client()
    raw.write(b"SSH-1.99-old\n")
    raw.sendKexInit()
    assert [number for number, _ in raw.read()] == [20]


@pytest.mark.parametrize(
    "hello",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"\n",
        b"SSH-1.5-ancient\r\n",
        b"SSH-2.0\0-x\r\n",
        b"SSH-" + b"x" * 2000,
        b"SSH-\r\n",
        b"a comment first\r\nSSH-2.0-x\r\n",
    ],
)
def test_notAnSshClient(hello: bytes, loggedLines: Any) -> None:
    """It is told in a line of text, and the log in one."""
    raw = client()
    raw.write(hello)
    data = b"".join(raw.tcp.written)
    assert data.endswith(b"Invalid SSH identification string.\r\n")
    assert raw.tcp.closed == "half"
    assert len(loggedLines) == 1
    raw.write(hello)
    assert len(loggedLines) == 1


# --- the key exchange ------------------------------------------------------------------------


@pytest.mark.parametrize("method", kex.METHODS)
def test_methods(method: bytes) -> None:
    """Each method gives both sides the same keys."""
    raw = client().start(dataclasses.replace(KEXINIT, methods=(method,)))
    assert raw.server.kexAlg == method
    raw.requestAuth()


def test_everyCipherOfAnOldClient() -> None:
    """Clients without AES-GCM, strictness or extensions get in too."""
    for cipher in (b"chacha20-poly1305@openssh.com", b"aes256-ctr", b"aes192-ctr"):
        for mac in (b"hmac-sha2-512-etm@openssh.com", b"hmac-sha2-256", b"hmac-sha2-512"):
            offer = dataclasses.replace(
                LOOSE, ciphers_in=(cipher,), ciphers_out=(cipher,), macs_in=(mac,), macs_out=(mac,)
            )
            raw = client().start(offer)
            raw.requestAuth()
            assert raw.server.isEncrypted("both")


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (HOST_KEY, b"ssh-ed25519"),
        (Key(ec.generate_private_key(ec.SECP256R1())), b"ecdsa-sha2-nistp256"),
        (Key(rsa.generate_private_key(65537, 2048)), b"rsa-sha2-512"),
        (Key(rsa.generate_private_key(65537, 2048)), b"rsa-sha2-256"),
    ],
)
def test_hostKeys(key: Key, algorithm: bytes) -> None:
    """A host key signs by each of its algorithms."""
    raw = RawClient(ANYBODY, hostKeys=[key])
    raw.start(dataclasses.replace(KEXINIT, host_key_algorithms=(algorithm,)))
    raw.requestAuth()


def test_noSha1HostSignature() -> None:
    """An RSA host key does not sign with SHA-1."""
    raw = RawClient(ANYBODY, hostKeys=[Key(rsa.generate_private_key(65537, 2048))])
    raw.write(VERSION + b"\r\n")
    raw.sendKexInit(dataclasses.replace(KEXINIT, host_key_algorithms=(b"ssh-rsa",)))
    assert raw.disconnected() == (3, b"no host key type in common")


def test_extensions() -> None:
    """server-sig-algs is about users' keys: RSA is there though the only host key is ed25519."""
    raw = client().start()
    assert raw.extensions[b"server-sig-algs"].split(b",") == [
        b"ssh-ed25519",
        b"sk-ssh-ed25519@openssh.com",
        b"sk-ecdsa-sha2-nistp256@openssh.com",
        b"ecdsa-sha2-nistp256",
        b"ecdsa-sha2-nistp384",
        b"ecdsa-sha2-nistp521",
        b"rsa-sha2-512",
        b"rsa-sha2-256",
    ]
    assert raw.extensions[b"ping@openssh.com"] == b"0"
    assert raw.extensions[b"publickey-hostbound@openssh.com"] == b"0"


def test_noExtensionsForWhoAsksForNone() -> None:
    """RFC 8308 section 2.4."""
    raw = client().start(LOOSE)
    assert raw.extensions == {}
    raw.requestAuth()


def test_strictResetsSequences() -> None:
    """With both markers each direction starts again at zero, at every NEWKEYS."""
    raw = client().login()
    before = raw.server._inbound.sequence
    raw.exchange()
    assert raw.server._inbound.sequence < before + 2
    assert raw.server._outbound.sequence == raw.inbound.sequence
    raw.send(94, DATA)
    assert raw.read() == [(94, DATA)]


def test_notStrictKeepsCounting() -> None:
    """Without the client's marker the numbers go on."""
    raw = client()
    raw.write(VERSION + b"\r\n")
    raw.send(2, string(b"junk"))
    raw.exchange(LOOSE)
    raw.requestAuth()
    assert raw.server._inbound.sequence == 5


def test_rightGuess() -> None:
    """A first packet sent with the KEXINIT counts when it fits."""
    offer = dataclasses.replace(
        KEXINIT,
        methods=(kex.METHODS[0], kex.EXT_INFO_CLIENT, kex.STRICT_CLIENT),
        host_key_algorithms=(b"ssh-ed25519",),
        guessed=True,
    )
    client().start(offer).requestAuth()


def test_wrongGuess() -> None:
    """One that does not fit is passed over."""
    raw = client()
    offer = dataclasses.replace(KEXINIT, methods=(b"nonsense", *KEXINIT.methods), guessed=True)
    raw.write(VERSION + b"\r\n")
    raw.sendKexInit(offer)
    raw.send(30, string(b"for nonsense"))
    raw.sendPublic()
    raw.read()
    raw.sendNewKeys()
    raw.requestAuth()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"methods": (b"diffie-hellman-group14-sha1",)}, b"key exchange method"),
        ({"methods": (kex.EXT_INFO_SERVER, kex.STRICT_SERVER)}, b"key exchange method"),
        ({"host_key_algorithms": (b"ssh-dss",)}, b"host key type"),
        ({"ciphers_in": (b"aes128-cbc",)}, b"cipher"),
        ({"ciphers_out": ()}, b"cipher"),
        (
            {"ciphers_in": (b"aes128-ctr",), "ciphers_out": (b"aes128-ctr",), "macs_in": (b"md5",)},
            b"MAC",
        ),
        ({"compressions_in": (b"zlib",)}, b"compression"),
        ({"compressions_out": (b"zlib@openssh.com",)}, b"compression"),
    ],
)
def test_nothingInCommon(change: Any, what: bytes, loggedLines: Any) -> None:
    """KEY_EXCHANGE_FAILED, with what it was about, and one line in the log."""
    raw = client()
    raw.write(VERSION + b"\r\n")
    raw.sendKexInit(dataclasses.replace(KEXINIT, **change))
    assert raw.disconnected() == (3, b"no " + what + b" in common")
    assert [line["peer"] for line in loggedLines] == ["127.0.0.2:40000"]


@pytest.mark.parametrize(
    "public",
    [b"", bytes(31), bytes(32), bytes(33), bytes(1184 + 32), b"\xff" * (1184 + 32), bytes(30000)],
)
@pytest.mark.parametrize("method", kex.METHODS)
def test_badPublicKey(method: bytes, public: bytes) -> None:
    """Too short, too long, degenerate or out of range: KEY_EXCHANGE_FAILED."""
    raw = client()
    raw.write(VERSION + b"\r\n")
    raw.sendKexInit(dataclasses.replace(KEXINIT, methods=(method,)))
    raw.read()
    raw.send(30, string(public))
    assert raw.disconnected() == (3, b"unusable public key in the key exchange")


def test_exchangeThatNeverEnds() -> None:
    """A client that leaves the first or a later key exchange is given up."""
    raw = client(loginGraceTime=0)
    raw.write(VERSION + b"\r\n")
    raw.sendKexInit()
    raw.clock.advance(120)
    assert raw.disconnected() == (3, b"key exchange took too long")
    raw = client().login()
    raw.sendKexInit()
    raw.clock.advance(120)
    assert raw.disconnected() == (3, b"key exchange took too long")


# --- out of place ----------------------------------------------------------------------------


def hello(raw: RawClient) -> None:
    raw.write(VERSION + b"\r\n")


def agreed(raw: RawClient) -> None:
    hello(raw)
    raw.sendKexInit()
    raw.read()


def answered(raw: RawClient) -> None:
    agreed(raw)
    raw.sendPublic()
    raw.read()


def keyed(raw: RawClient) -> None:
    raw.start()


def authenticating(raw: RawClient) -> None:
    raw.start()
    raw.requestAuth()


def rekeying(raw: RawClient) -> None:
    raw.login()
    raw.sendKexInit()
    raw.read()


def rekeyed(raw: RawClient) -> None:
    rekeying(raw)
    raw.sendPublic()
    raw.read()


@pytest.mark.parametrize(
    ("state", "numbers"),
    [
        (hello, [2, 3, 4, 5, 6, 7, 21, 30, 31, 34, 50, 52, 61, 80, 90, 94, 192, 255]),
        (agreed, [2, 3, 4, 5, 6, 7, 20, 21, 31, 32, 34, 50, 61, 80, 94, 192]),
        (answered, [2, 3, 4, 5, 7, 20, 30, 31, 50, 61, 80, 94, 192]),
        (keyed, [21, 30, 31, 34, 50, 61, 80, 90, 94, 98]),
        (authenticating, [21, 30, 34, 80, 90, 94, 98]),
        (rekeying, [5, 7, 20, 21, 31, 34, 50, 80, 90, 94, 192]),
        (rekeyed, [5, 7, 20, 30, 31, 50, 80, 90, 94, 192]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_outOfPlace(state: Any, numbers: list[int], loggedLines: Any) -> None:
    """A message that does not belong here: PROTOCOL_ERROR and one line in the log.

    That is a strict client; nothing at all may come between its KEXINIT and its NEWKEYS.
    """
    for number in numbers:
        raw = client()
        state(raw)
        # Strictness is known with the KEXINIT; before it, IGNORE is what makes it come too late.
        late = state is hello and number in (2, 3, 4)
        loggedLines.clear()
        raw.send(number, bytes(4) if number == 3 else string(b"x"))
        if late:
            raw.sendKexInit()
        result = raw.disconnected()
        assert result is not None, (state, number)
        assert result[0] == 2, (state, number)
        assert len(loggedLines) == 1, (state, number)
        assert raw.tcp.closed == "half"
        assert raw.service is None or getattr(raw.service, "received", []) == []


def test_idleChatterOfAClientThatIsNotStrict() -> None:
    """Without strictness IGNORE and DEBUG are allowed anywhere."""
    raw = client()
    raw.write(VERSION + b"\r\n")
    raw.sendKexInit(LOOSE)
    raw.send(2, string(b""))
    raw.sendPublic()
    raw.send(4, b"\1" + string(b"text") + string(b""))
    raw.read()
    raw.send(2, string(b""))
    raw.sendNewKeys()
    raw.requestAuth()


@pytest.mark.parametrize(
    ("number", "payload"),
    [
        (1, b""),
        (1, b"\0\0\0\2\0\0\0\xffx"),
        (3, b""),
        (3, bytes(5)),
        (5, b""),
        (5, string(b"ssh-userauth") + b"x"),
        (5, b"\xff\xff\xff\xff"),
        (7, b""),
        (7, b"\0\0\0\1"),
        (7, b"\xff\xff\xff\xff"),
        (7, b"\0\0\0\1" + string(b"a") + string(b"b") + b"c"),
        (20, b""),
        (20, bytes(15)),
        (20, bytes(16) + string(b"a")),
        (20, KEXINIT.encode()[:-1]),
        (20, KEXINIT.encode() + b"x"),
        (192, b""),
        (192, string(b"x") + b"y"),
    ],
)
def test_malformed(number: int, payload: bytes, loggedLines: Any) -> None:
    """Short or with something left over: a clean end."""
    raw = client().login()
    loggedLines.clear()
    raw.send(number, payload)
    result = raw.disconnected()
    assert result is not None
    assert result[0] == 2
    assert len(loggedLines) == 1


def test_malformedNewKeys() -> None:
    """NEWKEYS has no payload."""
    raw = client()
    answered(raw)
    raw.send(21, b"x")
    assert raw.disconnected() == (2, b"bytes after the end of NEWKEYS")


def test_unknownServices() -> None:
    """Only authentication can be asked for, and only before it is over."""
    for name in (b"ssh-connection", b"nonsense", b""):
        raw = client().start()
        raw.send(5, string(name))
        assert raw.disconnected() == (7, b"service not available")
    for name in (b"ssh-userauth", b"ssh-connection"):
        raw = client().login()
        raw.send(5, string(name))
        assert raw.disconnected() == (7, b"service not available")


def test_unknownMessages() -> None:
    """A number that nobody knows is answered with its sequence number."""
    raw = client().start()
    for number in (8, 19, 128, 193, 255):
        sequence = raw.outbound.sequence
        raw.send(number, b"anything")
        assert raw.read() == [(3, sequence.to_bytes(4, "big"))]


def test_forgedPacket(loggedLines: Any) -> None:
    """MAC_ERROR; the service never sees it."""
    raw = client().login()
    loggedLines.clear()
    packet = bytearray(raw.pack(94, DATA))
    packet[-1] ^= 1
    raw.write(bytes(packet))
    assert raw.disconnected() == (5, b"packet failed its integrity check")
    assert raw.server.service.received == []
    assert len(loggedLines) == 1


def test_nothingIsHeardAfterTheEnd() -> None:
    """What follows a refused packet in the same segment is not looked at."""
    raw = client().login()
    raw.write(raw.pack(21) + raw.pack(94, DATA))
    assert raw.disconnected() is not None
    raw.send(94, DATA)
    assert raw.service.received == []
    raw.server.sendPacket(94, DATA)
    raw.server.sendDisconnect(11, b"again")
    assert raw.read() == []


def test_tooManyEarlyMessages() -> None:
    """A client that does not log in cannot chat for ever."""
    raw = client().start()
    for _ in range(300):
        raw.send(2, string(b"junk"))
    assert raw.disconnected() == (2, b"too many messages before authentication")


def test_packetSizes() -> None:
    """Big packets only from who has logged in, and never more than OpenSSH takes."""
    raw = client().start()
    raw.send(2, string(bytes(34000)))
    raw.send(2, string(bytes(36000)))
    assert raw.disconnected() == (2, b"bad packet length")
    raw = client().login()
    raw.send(2, string(bytes(KNOWN_PEER_BYTES - 100)))
    raw.send(2, string(bytes(KNOWN_PEER_BYTES)))
    assert raw.disconnected() == (2, b"bad packet length")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_fuzzPlain(data: bytes, headed: bool) -> None:
    """Anything at all before the keys: refused or waited for, never a failure."""
    raw = client()
    raw.write(VERSION + b"\r\n")
    if headed:
        data = raw.pack(20, data)
    raw.write(data)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=60)), max_size=5))
def test_fuzzMessages(messages: list[tuple[int, bytes]]) -> None:
    """Any messages under keys: refused or taken, never a failure."""
    raw = client().start()
    for number, payload in messages:
        raw.send(number, payload)
    raw.read()
    raw.drop()


def test_bugOfOurs(loggedFailures: Any) -> None:
    """A service that raises costs its own connection, which is told so."""
    raw = client().login()

    def broken(number: int, payload: bytes) -> None:
        raise RuntimeError("bug")

    raw.server._receive = broken
    raw.send(94, DATA)
    assert raw.disconnected() == (11, b"internal error")
    assert len(loggedFailures.flush(RuntimeError)) == 1


# --- messages of the transport ---------------------------------------------------------------


def test_ping() -> None:
    """ping@openssh.com: the string comes back, before and after the login."""
    raw = client().start()
    raw.send(192, string(b"ping"))
    assert raw.read() == [(193, string(b"ping"))]
    raw.login = lambda: None  # type: ignore[method-assign]
    raw.requestAuth()
    raw.auth(b"none")
    raw.read()
    raw.send(192, string(b""))
    assert raw.read() == [(193, string(b""))]


def test_clientGoes(loggedLines: Any) -> None:
    """An ordinary good-bye is no news; another reason is, in one line."""
    for code, lines in ((11, 0), (2, 1)):
        raw = client().login()
        loggedLines.clear()
        raw.send(1, code.to_bytes(4, "big") + string(b"bye\n\x1b[2J") + string(b""))
        assert raw.tcp.closed == "half"
        assert len(loggedLines) == lines
        assert raw.disconnected() is None


def test_clientExtensionsAreKept() -> None:
    """RFC 8308: what the client can do is there for whoever asks."""
    raw = client().start()
    raw.send(7, b"\0\0\0\1" + string(b"ext-info-in-auth@openssh.com") + string(b"0"))
    assert raw.server.peerExtensions == {b"ext-info-in-auth@openssh.com": b"0"}


def test_requestAfterSuccess() -> None:
    """RFC 4252 section 5.1: further requests to log in are ignored in silence."""
    raw = client().login()
    raw.auth(b"none")
    raw.password(b"guess")
    assert raw.read() == []
    raw.send(94, DATA)
    assert raw.read() == [(94, DATA)]


# --- rekeying --------------------------------------------------------------------------------


def numbered(count: int, size: int = 100) -> list[bytes]:
    return [DATA + n.to_bytes(4, "big") + bytes(size) for n in range(count)]


@pytest.mark.parametrize("offer", [KEXINIT, LOOSE], ids=["strict", "loose"])
def test_clientRekeys(offer: KexInit) -> None:
    """Data before, between and after comes whole and in order, both ways."""
    raw = client()
    raw.start(offer)
    raw.requestAuth()
    raw.auth(b"none")
    raw.read()
    sent = numbered(40)
    got = []
    for n, payload in enumerate(sent):
        if n % 10 == 5:
            raw.sendKexInit(offer)
            raw.server.sendPacket(94, b"while agreeing %d" % n)
            raw.sendPublic()
            got += raw.held
            raw.server.sendPacket(94, b"after our NEWKEYS %d" % n)
            got += raw.read()
            raw.sendNewKeys()
        raw.send(94, payload)
        got += raw.read()
    data = [payload for number, payload in got if number == 94]
    assert [one for one in data if one.startswith(DATA)] == sent
    assert [one for one in data if not one.startswith(DATA)] == [
        text % n
        for n in (5, 15, 25, 35)
        for text in (b"while agreeing %d", b"after our NEWKEYS %d")
    ]


def test_serverRekeysByBytes() -> None:
    """What counts is both directions; what the client sent before it knew is not lost."""
    raw = client(rekeyLimitBytes=100_000).login()
    got = []
    exchanges = 0
    sent = numbered(200, 2000)
    for payload in sent:
        raw.send(94, payload)
        messages = raw.read()
        if any(number == 20 for number, _ in messages):
            exchanges += 1
            # On its way already when our KEXINIT came:
            raw.send(94, b"\xff" + payload)
            messages += raw.exchange()
            messages += raw.held
        got += messages
    data = [payload for number, payload in got if number == 94]
    assert [one for one in data if one[0] == 0] == sent
    assert len([one for one in data if one[0] == 255]) == exchanges
    assert exchanges in range(8, 12)


def test_serverRekeysByTime() -> None:
    """An old key is changed with the next word of the client."""
    raw = client(rekeyLimitSeconds=3600).login()
    raw.clock.advance(3599)
    raw.send(94, DATA)
    assert raw.read() == [(94, DATA)]
    raw.clock.advance(2)
    raw.send(94, DATA)
    assert [number for number, _ in raw.read()] == [94, 20]
    raw.exchange()
    raw.send(94, DATA)
    assert raw.read() == [(94, DATA)]


def test_bothRekeyAtOnce() -> None:
    """Two KEXINIT that cross are one key exchange."""
    raw = client().login()
    raw.server.sendKexInit()
    raw.exchange()
    raw.send(94, DATA)
    assert raw.read() == [(94, DATA)]
    assert raw.server._exchange.phase.name == "IDLE"


def test_sequenceNumbersWrap() -> None:
    """Packet 2^32 of a client that is not strict has number 0."""
    raw = client()
    raw.start(LOOSE)
    raw.requestAuth()
    raw.auth(b"none")
    raw.read()
    for side in (raw.outbound, raw.inbound, raw.server._inbound, raw.server._outbound):
        side.sequence = 0xFFFFFFFE
    for _ in range(5):
        raw.send(94, DATA)
        assert raw.read() == [(94, DATA)]


def test_rekeyBeforeSequenceNumbersRepeat() -> None:
    """By packets too, whatever the limit by bytes."""
    raw = client(rekeyLimitBytes=0).login()
    raw.server._outbound.packets = 1 << 31
    raw.send(94, DATA)
    assert [number for number, _ in raw.read()] == [94, 20]


def test_repliesHeldDuringAnExchangeAreBounded() -> None:
    """A client that asks on and on during the server's key exchange is cut off."""
    raw = client().login()
    raw.server.sendKexInit()
    raw.read()
    for _ in range(3000):
        raw.send(192, string(bytes(400)))
    assert raw.disconnected() == (2, b"too many requests during a key exchange")
    assert raw.server._held == []


# --- flow control ----------------------------------------------------------------------------


def test_pausedDuringAnExchange() -> None:
    """The service is told when bulk may not be sent, and when it may again."""
    raw = client().login()
    service = raw.service
    assert raw.server.isWritable()
    raw.server.sendKexInit()
    assert not raw.server.isWritable()
    raw.exchange()
    assert raw.server.isWritable()
    assert service.changes == ["paused", "resumed"]


def test_pausedByTcp() -> None:
    """TCP's word is passed on; two reasons to pause are one pause."""
    raw = client().login()
    service, producer = raw.service, raw.tcp.producer
    producer.pauseProducing()
    producer.pauseProducing()
    assert not raw.server.isWritable()
    raw.exchange()
    assert not raw.server.isWritable()
    producer.resumeProducing()
    assert raw.server.isWritable()
    assert service.changes == ["paused", "resumed"]
    raw.server.sendDisconnect(11, b"enough")
    assert not raw.server.isWritable()


def test_answersThatNobodyTakes() -> None:
    """A client that asks and does not take the answers is not read until it does."""
    raw = client().login()
    raw.tcp.producer.pauseProducing()
    asked = 0
    while raw.tcp.reading:
        raw.send(192, string(bytes(1000)))
        asked += 1
        assert asked < 2000
    assert asked > 100
    raw.tcp.producer.resumeProducing()
    assert raw.tcp.reading


def test_channelData() -> None:
    """The short way in gives the same messages as the long one."""
    raw = client().login()
    buffer = bytearray(b"some data")
    raw.server.sendChannelData(7, memoryview(buffer)[5:])
    raw.server.sendChannelExtendedData(7, 1, b"error")
    buffer.clear()
    assert raw.read() == [
        (94, b"\0\0\0\7" + string(b"data")),
        (95, b"\0\0\0\7\0\0\0\1" + string(b"error")),
    ]


def test_channelDataDuringAnExchange() -> None:
    """It is held, in order, and copied."""
    raw = client().login()
    raw.sendKexInit()
    buffer = bytearray(b"data")
    raw.server.sendChannelData(7, memoryview(buffer))
    raw.server.sendChannelExtendedData(7, 1, memoryview(buffer))
    buffer.clear()
    raw.sendPublic()
    assert raw.read()[-2:] == [
        (94, b"\0\0\0\7" + string(b"data")),
        (95, b"\0\0\0\7\0\0\0\1" + string(b"data")),
    ]


def test_oneWritePerRead() -> None:
    """Answers to what came in one segment leave in one; a single one leaves at once."""
    raw = client().login()
    writes = raw.tcp.writes
    raw.write(b"".join(raw.pack(94, DATA) for _ in range(50)))
    assert raw.tcp.writes == writes + 1
    assert len(raw.read()) == 50
    raw.server.sendPacket(94, DATA)
    assert raw.tcp.writes == writes + 2


def test_corkIsBounded() -> None:
    """A read that makes much output hands it on before it ends."""
    raw = client().login()
    writes = raw.tcp.writes
    raw.write(b"".join(raw.pack(94, DATA + os.urandom(32000)) for _ in range(20)))
    assert raw.tcp.writes > writes + 3
    assert len(raw.read()) == 20


# --- the end ---------------------------------------------------------------------------------


def test_loginGraceTime(loggedLines: Any) -> None:
    """From accept, whatever the client has got to."""
    for state in (lambda raw: None, hello, agreed, answered, keyed, authenticating):
        raw = client()
        state(raw)
        raw.clock.advance(119)
        assert raw.tcp.closed == ""
        # A key exchange has a deadline of its own, which cannot come before.
        raw.clock.advance(1)
        assert raw.tcp.closed == "half"
        assert len(loggedLines) == 1
        loggedLines.clear()
    raw = client().login()
    raw.clock.advance(3000)
    assert raw.tcp.closed == ""


def test_graceTimeOfNoClientAtAll() -> None:
    """A peer that never says anything is not sent a packet that it could not read."""
    raw = client()
    raw.clock.advance(120)
    assert raw.tcp.closed == "half"
    assert b"".join(raw.tcp.written).count(b"SSH-2.0") == 1


def test_stuckCloseIsCutOff() -> None:
    """A peer that does not close its half loses the connection."""
    raw = client().login()
    raw.server.loseConnection()
    assert raw.tcp.closed == "half"
    raw.clock.advance(3)
    assert raw.tcp.closed == "aborted"


def test_talkAfterTheEnd() -> None:
    """What was on its way is thrown away; an endless stream is cut off."""
    raw = client().login()
    raw.server.loseConnection()
    for _ in range(4):
        raw.write(bytes(1 << 20))
    assert raw.tcp.closed == "half"
    raw.write(b"x")
    assert raw.tcp.closed == "aborted"


def test_allEndsWithTheConnection() -> None:
    """Service, avatar and timers; also when each of them fails."""
    raw = client().login()
    service = raw.service
    raw.drop()
    assert service.stopped == 1
    assert raw.factory.portal.realm.logouts == 1
    assert raw.clock.getDelayedCalls() == []
    assert not raw.server.isWritable()
    raw.write(b"late")


def test_endDuringEveryState() -> None:
    """No timer and no count is left behind by a connection that breaks off."""
    for state in (lambda raw: None, hello, agreed, answered, keyed, authenticating, rekeying):
        raw = client()
        state(raw)
        raw.drop()
        assert raw.clock.getDelayedCalls() == []
        assert raw.factory._startups == {}


def test_failingServiceDoesNotKeepTheAvatar(loggedFailures: Any) -> None:
    """A service that cannot be stopped does not keep the user logged in."""
    raw = client().login()

    def broken() -> None:
        raise RuntimeError("bug")

    raw.service.serviceStopped = broken
    raw.drop()
    assert raw.factory.portal.realm.logouts == 1
    assert len(loggedFailures.flush(RuntimeError)) == 1


def test_addresses() -> None:
    """The peer as Conch gives it, and as the log shows it."""
    raw = client()
    assert raw.server.getPeer().address.host == "127.0.0.2"
    assert raw.server.peerName() == "127.0.0.2:40000"
    raw = client(host="fe80::1")
    assert raw.server.peerName() == "[fe80::1]:40000"


def test_fieldsNeverReadTooFar() -> None:
    """A cursor stops at the end, whatever a length says."""
    assert Fields(b"", "x").rest() == b""
    assert Fields(string(b""), "x").names() == ()
