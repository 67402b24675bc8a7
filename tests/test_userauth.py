"""Authentication: who gets in, what counts as a failure, and what a failure tells."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from twisted.conch.checkers import InMemorySSHKeyDB, SSHPublicKeyChecker
from twisted.conch.error import NotEnoughAuthentication
from twisted.conch.ssh.keys import Key
from twisted.cred.checkers import AllowAnonymousAccess, InMemoryUsernamePasswordDatabaseDontUse
from twisted.cred.credentials import IAnonymous, ISSHPrivateKey, IUsernamePassword
from twisted.internet.defer import Deferred
from twisted.logger import formatEvent, globalLogPublisher

from conchkernel.ssh.checkers import (
    AnonymousOwnerChecker,
    AuthorizedKeysChecker,
    TokenChecker,
    truthful,
)
from conchkernel.ssh.fields import Fields, mpint, string
from tests.rawclient import RawClient

KEYS = {
    "ed25519": Key(ed25519.Ed25519PrivateKey.generate()),
    "ecdsa256": Key(ec.generate_private_key(ec.SECP256R1())),
    "ecdsa384": Key(ec.generate_private_key(ec.SECP384R1())),
    "ecdsa521": Key(ec.generate_private_key(ec.SECP521R1())),
    "rsa": Key(rsa.generate_private_key(65537, 2048)),
    "stranger": Key(ed25519.Ed25519PrivateKey.generate()),
}
KNOWN = [key.blob() for name, key in KEYS.items() if name != "stranger"]
PUBLICKEY = b"publickey"
HOSTBOUND = b"publickey-hostbound-v00@openssh.com"
ALL = b"publickey,keyboard-interactive,password"


def checkers(*, keys: Any = KNOWN, token: str = "tok") -> list[Any]:
    return [AuthorizedKeysChecker([], agentKeys=keys), TokenChecker(token)]


def client(*given: Any, **options: Any) -> RawClient:
    raw = RawClient(list(given) or checkers(), **options)
    raw.start()
    raw.requestAuth()
    return raw


def failure(methods: bytes = ALL, *, partial: bool = False) -> tuple[int, bytes]:
    return 51, string(methods) + (b"\1" if partial else b"\0")


def settle(raw: RawClient) -> list[tuple[int, bytes]]:
    """What is said once every delay is over."""
    messages = raw.read()
    for _ in range(20):
        raw.clock.advance(0.5)
        messages += raw.read()
    return messages


def tried(raw: RawClient) -> list[tuple[int, bytes]]:
    """What is said about one request."""
    raw.clock.advance(1)
    return raw.read()


def rest(key: Key, algorithm: bytes = b"", *, signature: bytes | None = None) -> bytes:
    return (
        (b"\0" if signature is None else b"\1")
        + string(algorithm or key.sshType())
        + string(key.blob())
        + (b"" if signature is None else string(signature))
    )


def message(raw: RawClient, key: Key, algorithm: bytes, user: bytes = b"joe") -> bytes:
    """What a client signs (RFC 4252 section 7)."""
    assert raw.sessionID is not None
    return (
        string(raw.sessionID)
        + b"\x32"
        + string(user)
        + string(b"ssh-connection")
        + string(PUBLICKEY)
        + b"\1"
        + string(algorithm)
        + string(key.blob())
    )


def signed(raw: RawClient, key: Key, algorithm: bytes = b"", **changed: bytes) -> bytes:
    algorithm = algorithm or key.sshType()
    signature = key.sign(message(raw, key, algorithm, **changed), signatureType=algorithm)
    return rest(key, algorithm, signature=signature)


# --- what there is ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "methods"),
    [
        (checkers(), ALL),
        ([TokenChecker("tok")], b"keyboard-interactive,password"),
        ([AuthorizedKeysChecker([])], b"publickey"),
    ],
)
def test_methodsFollowTheCheckers(given: Any, methods: bytes) -> None:
    """``none`` is refused with what may be tried, at once and without counting."""
    raw = client(*given)
    raw.auth(b"none")
    assert raw.read() == [failure(methods)]
    assert raw.server.failedAttempts == 0


def test_none() -> None:
    """``none`` lets in where a checker takes anybody, ours or Twisted's."""
    raw = client(AnonymousOwnerChecker())
    raw.auth(b"none")
    assert raw.read() == [(52, b"")]
    raw = client(AllowAnonymousAccess())
    raw.auth(b"none")
    assert raw.read() == [(52, b"")]
    assert raw.factory.portal.realm.avatarIds == [()]


def test_noneIsNotAMethodToTry() -> None:
    """It stands in no list, and is refused where nobody allows it."""
    raw = client(AnonymousOwnerChecker(), TokenChecker("tok"))
    raw.password(b"wrong")
    assert tried(raw) == [failure(b"keyboard-interactive,password")]


def test_banner() -> None:
    """Shown once, before the first answer."""
    raw = client(banner=b"Mind the kernel.\r\n")
    raw.auth(b"none")
    raw.password(b"wrong")
    messages = settle(raw)
    assert messages[0] == (53, string(b"Mind the kernel.\r\n") + string(b""))
    assert [number for number, _ in messages] == [53, 51, 51]


# --- passwords -------------------------------------------------------------------------------


def test_password() -> None:
    """The token, under any name, is the owner."""
    for user in (b"joe", b"", b"\xff\xfe", b"root"):
        raw = client()
        raw.password(b"tok", user)
        assert raw.read() == [(52, b"")]
        assert raw.factory.portal.realm.avatarIds == ["owner"]


def test_wrongPassword() -> None:
    """Refused after a while; the right one is good afterwards."""
    raw = client()
    raw.password(b"wrong")
    assert raw.read() == []
    assert tried(raw) == [failure()]
    raw.password(b"tok")
    assert raw.read() == [(52, b"")]


def test_passwordChange() -> None:
    """Nobody can change the token through here."""
    raw = client()
    raw.auth(b"password", b"\1" + string(b"tok") + string(b"new"))
    assert tried(raw) == [failure()]


def test_longPassword() -> None:
    """As with sshd, a thousand bytes and more are no password."""
    raw = client(TokenChecker("x" * 2000))
    raw.password(b"x" * 2000)
    assert tried(raw) == [failure(b"keyboard-interactive,password")]


def test_twistedsPasswordChecker() -> None:
    """A checker that binds names to passwords does."""
    raw = client(InMemoryUsernamePasswordDatabaseDontUse(joe=b"secret"))
    raw.password(b"secret", b"jim")
    assert tried(raw)[0][0] == 51
    raw.password(b"secret", b"joe")
    assert raw.read() == [(52, b"")]
    assert raw.factory.portal.realm.avatarIds == [b"joe"]


# --- keyboard-interactive --------------------------------------------------------------------

QUESTION = 60, string(b"") * 3 + b"\0\0\0\1" + string(b"Password: ") + b"\0"
ASK = string(b"") + string(b"")


def test_keyboardInteractive() -> None:
    """One question; the answer goes the password's way."""
    raw = client()
    raw.auth(b"keyboard-interactive", ASK)
    assert raw.read() == [QUESTION]
    raw.send(61, b"\0\0\0\1" + string(b"wrong"))
    assert tried(raw) == [failure()]
    raw.auth(b"keyboard-interactive", ASK)
    assert raw.read() == [QUESTION]
    raw.send(61, b"\0\0\0\1" + string(b"tok"))
    assert raw.read() == [(52, b"")]


def test_questionAbandoned() -> None:
    """A new request instead of an answer ends the dialogue, has its own answer, and counts."""
    raw = client()
    raw.auth(b"keyboard-interactive", ASK)
    raw.read()
    raw.password(b"tok")
    assert raw.read() == [(52, b"")]
    raw = client()
    for _ in range(7):
        raw.auth(b"keyboard-interactive", ASK)
    assert settle(raw)[-1][0] == 1


@pytest.mark.parametrize(
    "answer",
    [b"", b"\0\0\0\0", b"\0\0\0\2" + string(b"a") * 2, b"\0\0\0\1" + string(b"a") + b"x"],
)
def test_malformedAnswer(answer: bytes) -> None:
    """Not one answer to one question."""
    raw = client()
    raw.auth(b"keyboard-interactive", ASK)
    raw.send(61, answer)
    result = raw.disconnected()
    assert result is not None
    assert result[0] == 2


def test_answerWithoutQuestion() -> None:
    """Is nothing that we know."""
    raw = client()
    raw.send(61, b"\0\0\0\1" + string(b"tok"))
    assert raw.read()[0][0] == 3


def test_goneWhileAsked() -> None:
    """A client that goes instead of answering leaves nothing behind."""
    raw = client()
    raw.auth(b"keyboard-interactive", ASK)
    raw.drop()
    assert raw.clock.getDelayedCalls() == []


# --- keys ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ed25519", "ecdsa256", "ecdsa384", "ecdsa521"])
def test_keys(name: str) -> None:
    """First the question whether it would do, then the proof."""
    key = KEYS[name]
    raw = client()
    raw.auth(PUBLICKEY, rest(key))
    assert raw.read() == [(60, string(key.sshType()) + string(key.blob()))]
    raw.auth(PUBLICKEY, signed(raw, key))
    assert raw.read() == [(52, b"")]
    assert raw.server.failedAttempts == 0


@pytest.mark.parametrize("algorithm", [b"rsa-sha2-256", b"rsa-sha2-512"])
def test_rsa(algorithm: bytes) -> None:
    """RSA users get in where the only host key is ed25519."""
    raw = client()
    raw.auth(PUBLICKEY, rest(KEYS["rsa"], algorithm))
    assert raw.read()[0][0] == 60
    raw.auth(PUBLICKEY, signed(raw, KEYS["rsa"], algorithm))
    assert raw.read() == [(52, b"")]


def test_unknownKey() -> None:
    """Never confirmed, whatever the user; its owner gets the same answer with a signature."""
    raw = client()
    for request in (rest(KEYS["stranger"]), signed(raw, KEYS["stranger"])):
        raw.auth(PUBLICKEY, request)
        assert raw.read() == []
        assert tried(raw) == [failure()]


def test_twistedsKeyCheckerMadeTruthful() -> None:
    """Conch's own checker confirms every key; :func:`truthful` puts that right."""
    key, stranger = KEYS["ed25519"], KEYS["stranger"]
    raw = client(truthful(SSHPublicKeyChecker(InMemorySSHKeyDB({b"joe": [key.public()]}))))
    raw.auth(PUBLICKEY, rest(stranger))
    assert tried(raw) == [failure(PUBLICKEY)]
    raw.auth(PUBLICKEY, rest(key))
    assert raw.read()[0][0] == 60
    raw.auth(PUBLICKEY, signed(raw, key))
    assert raw.read() == [(52, b"")]
    assert raw.factory.portal.realm.avatarIds == [b"joe"]


def test_twistedsKeyCheckerAsItIs() -> None:
    """It works as it comes, too."""
    key = KEYS["ed25519"]
    raw = client(SSHPublicKeyChecker(InMemorySSHKeyDB({b"joe": [key.public()]})))
    raw.auth(PUBLICKEY, rest(key))
    assert raw.read()[0][0] == 60
    raw.auth(PUBLICKEY, signed(raw, KEYS["stranger"]))
    assert tried(raw) == [failure(PUBLICKEY)]
    raw.auth(PUBLICKEY, signed(raw, key))
    assert raw.read() == [(52, b"")]


class Gullible:
    """A checker that takes any key without a proof."""

    credentialInterfaces = (ISSHPrivateKey,)

    def requestAvatarId(self, credentials: Any) -> str:
        return "anybody"


def test_probeNeverLogsIn() -> None:
    """A broken checker's yes to a key without a signature lets nobody in."""
    raw = client(Gullible())
    raw.auth(PUBLICKEY, rest(KEYS["ed25519"]))
    assert tried(raw) == [failure(PUBLICKEY)]
    assert raw.factory.portal.realm.logouts == 1


def test_sha1Refused() -> None:
    """Neither the name ssh-rsa nor a SHA-1 signature under another name."""
    key = KEYS["rsa"]
    raw = client()
    raw.auth(PUBLICKEY, rest(key, b"ssh-rsa"))
    assert tried(raw) == [failure()]
    raw.auth(PUBLICKEY, signed(raw, key, b"ssh-rsa"))
    assert tried(raw) == [failure()]
    disguised = key.sign(message(raw, key, b"rsa-sha2-256"), signatureType=b"ssh-rsa")
    raw.auth(PUBLICKEY, rest(key, b"rsa-sha2-256", signature=disguised))
    assert tried(raw) == [failure()]


def test_weakKeysRefused() -> None:
    """1024 bits of RSA, and DSA, though they stand in the file."""
    small = Key(rsa.generate_private_key(65537, 1024))
    outdated = Key(dsa.generate_private_key(1024))
    raw = client(*checkers(keys=[small.blob(), outdated.blob()]))
    raw.auth(PUBLICKEY, signed(raw, small, b"rsa-sha2-256"))
    assert tried(raw) == [failure()]
    raw.auth(PUBLICKEY, rest(outdated))
    assert tried(raw) == [failure()]


def test_requiredRSASize() -> None:
    """The operator's word counts."""
    raw = client(requiredRSASize=3072)
    raw.auth(PUBLICKEY, rest(KEYS["rsa"], b"rsa-sha2-256"))
    assert tried(raw) == [failure()]


def test_signatureBelongsToThisRequest() -> None:
    """Not to another session, user, key or algorithm; and not to half of itself."""
    key = KEYS["ed25519"]
    other = client()
    raw = client()
    raw.auth(PUBLICKEY, signed(other, key))
    assert tried(raw) == [failure()]
    raw.auth(PUBLICKEY, signed(raw, key, user=b"jim"))
    assert tried(raw) == [failure()]
    proof = KEYS["stranger"].sign(message(raw, key, key.sshType()))
    raw.auth(PUBLICKEY, rest(key, signature=proof))
    assert tried(raw) == [failure()]
    for broken in (b"", string(b"ssh-ed25519"), string(b"ssh-ed25519") + string(b"x") + b"y"):
        raw = client()
        raw.auth(PUBLICKEY, rest(key, signature=broken))
        assert tried(raw) == [failure()]


@pytest.mark.parametrize("algorithm", [b"ecdsa-sha2-nistp256", b"nonsense", b"", b"ssh-rsa\xff"])
def test_algorithmMustFitTheKey(algorithm: bytes) -> None:
    """What the client names is compared with what it sends."""
    raw = client()
    raw.auth(PUBLICKEY, rest(KEYS["ed25519"], algorithm) if algorithm else b"\0" + string(b"") * 2)
    assert tried(raw) == [failure()]


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        string(b"ssh-ed25519"),
        string(b"ssh-ed25519") + string(bytes(31)),
        string(b"ssh-ed25519") + b"\xff\xff\xff\xff",
    ],
)
def test_malformedKey(blob: bytes) -> None:
    """A key that is none is refused like one that is unknown."""
    raw = client(*checkers(keys=[blob]))
    raw.auth(PUBLICKEY, b"\0" + string(b"ssh-ed25519") + string(blob))
    assert tried(raw) == [failure()]


@pytest.mark.parametrize(
    ("algorithm", "blob"),
    [
        (b"ecdsa-sha2-nistp256", string(b"nistp256") + string(bytes(65))),
        (b"ecdsa-sha2-nistp256", string(b"nistp256") + string(b"\4" + bytes(64))),
        (b"ecdsa-sha2-nistp256", string(b"nistp384") + string(b"")),
        (b"rsa-sha2-256", mpint(0) + mpint(0)),
        (b"rsa-sha2-256", mpint(65537) + mpint(1 << 2047)),
        (b"rsa-sha2-256", mpint(1) + mpint(1 << 20000)),
        (b"rsa-sha2-256", string(b"\xff" * 300) + string(b"\xff" * 300)),
        (b"sk-ssh-ed25519@openssh.com", string(bytes(3))),
        (b"sk-ecdsa-sha2-nistp256@openssh.com", string(b"x") + string(b"y")),
    ],
)
def test_malformedKeysOfEveryKind(algorithm: bytes, blob: bytes) -> None:
    """Nothing that Conch's parser raises gets out."""
    whole = string(b"ssh-rsa" if algorithm.startswith(b"rsa") else algorithm) + blob
    raw = client(*checkers(keys=[whole]))
    raw.auth(PUBLICKEY, b"\1" + string(algorithm) + string(whole) + string(string(algorithm) * 2))
    assert tried(raw) == [failure()]


def test_hostbound() -> None:
    """The signature covers the host key; one for another host is worth nothing."""
    key = KEYS["ed25519"]
    for hostKey, expected in ((None, (52, b"")), (b"another host", failure())):
        raw = client()
        bound = raw.hostKeyBlob if hostKey is None else hostKey
        head = string(key.sshType()) + string(key.blob()) + string(bound)
        data = (
            string(raw.sessionID or b"")
            + b"\x32"
            + string(b"joe")
            + string(b"ssh-connection")
            + string(HOSTBOUND)
            + b"\1"
            + head
        )
        raw.auth(HOSTBOUND, b"\1" + head + string(key.sign(data)))
        assert tried(raw) == [expected]


# --- security keys ---------------------------------------------------------------------------

APPLICATION = b"ssh:"


class SecurityKey:
    """A FIDO key in software, which may be told to lie about being touched."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        if kind == "ed25519":
            self.algorithm = b"sk-ssh-ed25519@openssh.com"
            self.private: Any = ed25519.Ed25519PrivateKey.generate()
            public = string(self.private.public_key().public_bytes_raw())
        else:
            self.algorithm = b"sk-ecdsa-sha2-nistp256@openssh.com"
            self.private = ec.generate_private_key(ec.SECP256R1())
            point = self.private.public_key().public_bytes(
                serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
            )
            public = string(b"nistp256") + string(point)
        self.blob = string(self.algorithm) + public + string(APPLICATION)

    def sign(self, data: bytes, flags: int) -> bytes:
        tail = bytes((flags,)) + (7).to_bytes(4, "big")
        data = (
            hashlib.sha256(APPLICATION).digest() + tail + hashlib.sha256(data).digest()
        )
        if self.kind == "ed25519":
            raw = self.private.sign(data)
        else:
            r, s = decode_dss_signature(self.private.sign(data, ec.ECDSA(SHA256())))
            raw = mpint(r) + mpint(s)
        return string(self.algorithm) + string(raw) + tail

    def request(self, raw: RawClient, flags: int) -> bytes:
        head = string(self.algorithm) + string(self.blob)
        data = (
            string(raw.sessionID or b"")
            + b"\x32"
            + string(b"joe")
            + string(b"ssh-connection")
            + string(PUBLICKEY)
            + b"\1"
            + head
        )
        return b"\1" + head + string(self.sign(data, flags))


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa"])
def test_securityKey(kind: str) -> None:
    """Somebody has touched it: welcome. Nobody has, or the flags were changed: refused."""
    key = SecurityKey(kind)
    raw = client(*checkers(keys=[key.blob]))
    raw.auth(PUBLICKEY, b"\0" + string(key.algorithm) + string(key.blob))
    assert raw.read() == [(60, string(key.algorithm) + string(key.blob))]
    raw.auth(PUBLICKEY, key.request(raw, 0))
    assert tried(raw) == [failure()]
    request = bytearray(key.request(raw, 0))
    request[-5] = 1
    raw.auth(PUBLICKEY, bytes(request))
    assert tried(raw) == [failure()]
    raw.auth(PUBLICKEY, key.request(raw, 1))
    assert raw.read() == [(52, b"")]


# --- counting --------------------------------------------------------------------------------


def attempts(raw: RawClient, send: Any) -> int:
    """How many requests are answered by a failure before the connection ends."""
    answers = 0
    for n in range(60):
        send(n)
        messages = settle(raw)
        answers += sum(1 for number, _ in messages if number == 51)
        if any(number == 1 for number, _ in messages):
            return answers
    raise AssertionError("no end")


def guessByKeyboard(raw: RawClient, n: int) -> None:
    raw.auth(b"keyboard-interactive", ASK)
    raw.send(61, b"\0\0\0\1" + string(b"guess %d" % n))


@pytest.mark.parametrize(
    "send",
    [
        lambda raw, n: raw.password(b"guess %d" % n),
        lambda raw, n: raw.auth(PUBLICKEY, rest(KEYS["stranger"])),
        lambda raw, n: raw.auth(PUBLICKEY, signed(raw, KEYS["stranger"])),
        lambda raw, n: raw.auth(b"nonsense"),
        lambda raw, n: raw.password(b"guess", b"user %d" % n),
        guessByKeyboard,
    ],
)
def test_maxAuthTries(send: Any) -> None:
    """The sixth failure is the last, whatever it is, and whoever it is about."""
    raw = client()
    assert attempts(raw, lambda n: send(raw, n)) == 5


def test_noneCounts() -> None:
    """But for the first, which every client sends."""
    raw = client()
    assert attempts(raw, lambda n: raw.auth(b"none")) == 6


def test_serviceRequestsDoNotStartAgain() -> None:
    """A client that asks for the service before each attempt has as many as another."""
    raw = client()

    def send(n: int) -> None:
        raw.send(5, string(b"ssh-userauth"))
        raw.password(b"guess")

    assert attempts(raw, send) == 5


def test_pipelinedPasswords() -> None:
    """Guesses sent ahead are served one after the other; too many at once are none."""
    seen: list[bytes] = []

    class Counting(TokenChecker):
        def requestAvatarId(self, credentials: Any) -> Any:
            seen.append(credentials.password)
            return super().requestAvatarId(credentials)

    raw = client(Counting("tok"))
    head = string(b"joe") + string(b"ssh-connection") + string(b"password") + b"\0"
    raw.write(b"".join(raw.pack(50, head + string(b"%d" % n)) for n in range(12)))
    assert seen == [b"0"]
    assert settle(raw)[-1][0] == 1
    assert len(seen) == 6
    raw = client(Counting("tok"))
    for n in range(40):
        raw.password(b"%d" % n)
    assert raw.disconnected() == (2, b"too many login attempts at once")


def test_hugeRequestsDoNotWait() -> None:
    """What waits is bounded in bytes, too: a crowd of strangers could hold a lot."""
    raw = client(TokenChecker("tok"))
    for _ in range(4):
        raw.password(bytes(30_000))
    assert raw.disconnected() == (2, b"too many login attempts at once")


def test_confirmedProbesAreBounded() -> None:
    """Asking about a known key is no failure, but has an end."""
    raw = client()
    for _ in range(48):
        raw.auth(PUBLICKEY, rest(KEYS["ed25519"]))
        assert raw.read()[0][0] == 60
    raw.auth(PUBLICKEY, rest(KEYS["ed25519"]))
    assert raw.disconnected() == (14, b"too many login attempts")


def test_sameTimeForEveryFailure() -> None:
    """A checker that is quick for some users and slow for others is not seen through."""
    pending: list[Deferred[Any]] = []

    class Uneven(TokenChecker):
        def requestAvatarId(self, credentials: Any) -> Any:
            if credentials.username == b"nobody":
                return super().requestAvatarId(credentials)
            waiting: Deferred[Any] = Deferred()
            pending.append(waiting)
            return waiting.addCallback(lambda _: TokenChecker.requestAvatarId(self, credentials))

    moments = []
    for user in (b"nobody", b"somebody"):
        raw = client(Uneven("tok"))
        started = raw.clock.seconds()
        raw.password(b"guess", user)
        while not (messages := raw.read()):
            raw.clock.advance(0.125)
            if pending and raw.clock.seconds() - started > 0.3:
                pending.pop().callback(None)
        moments.append((raw.clock.seconds() - started, messages))
    assert moments[0] == moments[1]


# --- odd requests ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        string(b"joe"),
        string(b"joe") + string(b"ssh-connection"),
        string(b"joe") + string(b"ssh-connection") + b"\xff\xff\xff\xff",
        string(b"joe") + string(b"ssh-connection") + string(b"password"),
        string(b"joe") + string(b"ssh-connection") + string(b"password") + b"\0\0\0\0\5x",
        string(b"joe") + string(b"ssh-connection") + string(b"password") + b"\0\0\0\0\1xy",
        string(b"joe") + string(b"ssh-connection") + string(PUBLICKEY),
        string(b"joe") + string(b"ssh-connection") + string(PUBLICKEY) + b"\1" + string(b"a"),
        string(b"joe") + string(b"ssh-connection") + string(b"keyboard-interactive") + b"x",
    ],
)
def test_malformedRequests(payload: bytes) -> None:
    """PROTOCOL_ERROR, and no traceback."""
    raw = client()
    raw.send(50, payload)
    result = raw.disconnected()
    assert result is not None
    assert result[0] == 2


@pytest.mark.parametrize("service", [b"", b"ssh-userauth", b"nonsense"])
def test_nextService(service: bytes) -> None:
    """Judged before the login: nobody gets in towards nothing."""
    raw = client(AnonymousOwnerChecker())
    raw.send(50, string(b"joe") + string(service) + string(b"none"))
    assert raw.disconnected() == (7, b"service not available")
    assert raw.factory.portal.realm.avatarIds == []


def test_checkerThatFails(loggedFailures: Any) -> None:
    """Its failure is the operator's to see; the client sees a refusal."""

    class Broken:
        credentialInterfaces = (IUsernamePassword,)

        def requestAvatarId(self, credentials: Any) -> Any:
            raise RuntimeError("database is gone")

    raw = client(Broken())
    raw.password(b"x")
    assert tried(raw) == [failure(b"keyboard-interactive,password")]
    assert len(loggedFailures.flush(RuntimeError)) == 1


def test_twoSteps() -> None:
    """A checker may want more: that is told as a partial success, of this connection only."""

    class First:
        credentialInterfaces = (IUsernamePassword,)

        def requestAvatarId(self, credentials: Any) -> Any:
            raise NotEnoughAuthentication

    raw = client(First())
    raw.password(b"x")
    assert raw.read() == [failure(b"keyboard-interactive,password", partial=True)]
    assert raw.service.authenticatedWith == [b"password"]
    raw.auth(b"none", user=b"jim")
    assert raw.service.authenticatedWith == []


def test_requiredSteps() -> None:
    """As sshd's AuthenticationMethods: a key, and then the token, in this order."""
    raw = client(authenticationMethods=[(PUBLICKEY, b"password")])
    raw.auth(b"none")
    assert raw.read() == [failure(PUBLICKEY)]
    raw.password(b"tok")
    assert tried(raw) == [failure(PUBLICKEY)]
    raw.auth(PUBLICKEY, signed(raw, KEYS["ed25519"]))
    assert raw.read() == [failure(b"password", partial=True)]
    raw.auth(PUBLICKEY, signed(raw, KEYS["ed25519"]))
    assert tried(raw) == [failure(b"password")]
    raw.password(b"tok")
    assert raw.read() == [(52, b"")]
    realm = raw.factory.portal.realm
    assert len(realm.avatarIds) - realm.logouts == 1


def test_stepsBelongToOneUserAndConnection() -> None:
    """Another name, or another connection, starts from the beginning."""
    raw = client(authenticationMethods=[(PUBLICKEY, b"password")])
    raw.auth(PUBLICKEY, signed(raw, KEYS["ed25519"]))
    raw.read()
    raw.password(b"tok", b"jim")
    assert tried(raw) == [failure(PUBLICKEY)]
    other = RawClient(factory=raw.factory)
    other.start()
    other.requestAuth()
    other.password(b"tok")
    assert tried(other) == [failure(PUBLICKEY)]


def test_severalLists() -> None:
    """Any one will do; and two keys are two different keys."""
    raw = client(authenticationMethods=[(PUBLICKEY, PUBLICKEY), (b"keyboard-interactive",)])
    raw.auth(PUBLICKEY, signed(raw, KEYS["ed25519"]))
    assert raw.read() == [failure(PUBLICKEY, partial=True)]
    raw.auth(PUBLICKEY, signed(raw, KEYS["ed25519"]))
    assert tried(raw) == [failure(PUBLICKEY)]
    raw.auth(PUBLICKEY, signed(raw, KEYS["ecdsa256"]))
    assert raw.read() == [(52, b"")]
    raw = client(authenticationMethods=[(PUBLICKEY, PUBLICKEY), (b"keyboard-interactive",)])
    raw.auth(b"keyboard-interactive", ASK)
    raw.send(61, b"\0\0\0\1" + string(b"tok"))
    assert raw.read()[-1] == (52, b"")


def test_goneWhileChecked() -> None:
    """An avatar that comes too late is logged out."""
    waiting: Deferred[Any] = Deferred()

    class Slow:
        credentialInterfaces = (IAnonymous,)

        def requestAvatarId(self, credentials: Any) -> Any:
            return waiting

    raw = client(Slow())
    raw.auth(b"none")
    raw.drop()
    waiting.callback("owner")
    assert raw.factory.portal.realm.avatarIds == ["owner"]
    assert raw.factory.portal.realm.logouts == 1


def test_goneWhileDelayed() -> None:
    """No timer is left of a failure that nobody waits for."""
    raw = client()
    raw.password(b"wrong")
    raw.drop()
    assert raw.clock.getDelayedCalls() == []


def test_noSecretsInTheLog() -> None:
    """What was typed, right or wrong, is in no log line; names are, without control codes."""
    lines: list[str] = []

    def observe(event: Any) -> None:
        lines.append(formatEvent(event) + repr(event))

    globalLogPublisher.addObserver(observe)
    try:
        raw = client()
        raw.password(b"hunter2", b"\x1b[2Jjoe")
        raw.auth(b"\x1b[2J\rmagic")
        raw.auth(b"keyboard-interactive", ASK)
        raw.clock.advance(1)
        raw.send(61, b"\0\0\0\1" + string(b"hunter3"))
        raw.clock.advance(1)
        raw.password(b"tok")
    finally:
        globalLogPublisher.removeObserver(observe)
    text = "\n".join(lines)
    assert "joe" in text
    assert "hunter" not in text
    assert "'tok'" not in text
    assert "magic" in text
    assert "\x1b" not in text
    assert "\r" not in text


def test_theFailureListIsWellFormed() -> None:
    """Also where there is nothing to try."""
    raw = client(AnonymousOwnerChecker())
    raw.password(b"x")
    raw.clock.advance(1)
    ((number, payload),) = raw.read()
    fields = Fields(payload, "failure")
    assert (number, fields.names(), fields.boolean()) == (51, (), False)
