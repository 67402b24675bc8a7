"""One connection's key exchanges, from the first to the last (RFC 4253 sections 7 to 9).

Sans-IO, server side: payloads go in, payloads and keys come out. What is said beside a key
exchange, and when one is due, is the transport's; what may be said during one is told here.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conchkernel.ssh import ciphers, kex
from conchkernel.ssh.algorithms import Algorithms
from conchkernel.ssh.fields import Fields, ProtocolError, string
from conchkernel.ssh.kex import Agreement, KexInit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from twisted.conch.ssh.keys import Key

    from conchkernel.ssh.sealing import Opener, Sealer

DEFAULT_ALGORITHMS = Algorithms()

MSG_DISCONNECT = 1
MSG_IGNORE = 2
MSG_UNIMPLEMENTED = 3
MSG_DEBUG = 4
MSG_KEXINIT = 20
MSG_NEWKEYS = 21
#: KEX_ECDH_INIT and KEX_HYBRID_INIT (RFC 5656 section 7.1 and the drafts after it).
MSG_KEX_INIT = 30
MSG_KEX_REPLY = 31

_KEX_NUMBERS = range(20, 50)
#: What a client may say at any time, unless a strict one exchanges its first keys.
_CHATTER = frozenset((MSG_IGNORE, MSG_UNIMPLEMENTED, MSG_DEBUG))


class Phase(enum.Enum):
    """Where a key exchange is."""

    IDLE = "no key exchange"
    STARTED = "our KEXINIT is sent"
    AGREED = "both KEXINIT are sent, the client's public key is awaited"
    ANSWERED = "our NEWKEYS is sent, the client's is awaited"


#: In this phase the client may send this message of the key exchange, and no other.
_EXPECTED = {
    Phase.IDLE: MSG_KEXINIT,
    Phase.STARTED: MSG_KEXINIT,
    Phase.AGREED: MSG_KEX_INIT,
    Phase.ANSWERED: MSG_NEWKEYS,
}
#: Between our KEXINIT and our NEWKEYS we may send only messages of the transport.
_WE_ARE_BLOCKED = frozenset((Phase.STARTED, Phase.AGREED))
#: Between the client's KEXINIT and its NEWKEYS so may the client.
_CLIENT_IS_BLOCKED = frozenset((Phase.AGREED, Phase.ANSWERED))


@dataclass(frozen=True, slots=True)
class Reply:
    """Our answer to the client's public key; NEWKEYS follows it, and then the new keys."""

    payload: bytes
    sealer: Sealer
    first: bool
    """These are the connection's first keys."""


class KeyExchange:
    """The server's side of one connection's key exchanges.

    :param version: our version line, without its end.
    :param host_keys: for each signature algorithm the public blob and the private key, the
        preferred one first.
    :param algorithms: what may be negotiated.
    :ivar client_version: the client's version line; set before its first message.
    :ivar strict: both sides reset their sequence numbers at each NEWKEYS.
    :ivar extensions: the client wants to hear of extensions (RFC 8308).
    :ivar session_id: the first exchange hash.
    :ivar host_key_blob: the host key that the client saw first.
    :ivar keyed: the client's first NEWKEYS was here.
    """

    def __init__(
        self,
        version: bytes,
        host_keys: Mapping[bytes, tuple[bytes, Key]],
        algorithms: Algorithms = DEFAULT_ALGORITHMS,
    ) -> None:
        self.client_version = b""
        self.phase = Phase.IDLE
        self.strict = False
        self.extensions = False
        self.session_id: bytes | None = None
        self.host_key_blob = b""
        self.keyed = False
        self.agreement: Agreement | None = None
        self._version = version
        self._host_keys = host_keys
        self._algorithms = algorithms
        self._offer = ciphers.offer(None, (), algorithms.offer)
        self._ours: KexInit | None = None
        self._our_payload = b""
        self._their_payload = b""
        self._skip_guess = False
        self._next_opener: Opener | None = None

    @property
    def blocks_us(self) -> bool:
        """Whether what we send must wait, but for messages of the transport."""
        return self.phase in _WE_ARE_BLOCKED

    @property
    def blocks_client(self) -> bool:
        """Whether the client may send messages of the transport only."""
        return self.phase in _CLIENT_IS_BLOCKED or not self.keyed

    def check(self, number: int) -> None:
        """Judge whether the client may send this message now.

        :raises ProtocolError: it may not.
        """
        if number in _KEX_NUMBERS:
            if number != _EXPECTED[self.phase]:
                raise ProtocolError(f"message {number} out of order in the key exchange")
        elif number != MSG_DISCONNECT and self.blocks_client:
            if number not in _CHATTER:
                when = "during the key exchange" if self.keyed else "before the first keys"
                raise ProtocolError(f"message {number} {when}")
            # With strict key exchange an attacker could count on nothing in between.
            if self.strict and not self.keyed:
                raise ProtocolError(f"message {number} before the first keys")

    def begin(self) -> bytes:
        """The payload of our KEXINIT, which is to be sent now."""
        markers = (kex.EXT_INFO_SERVER, kex.STRICT_SERVER) if self.session_id is None else ()
        offer = self._offer
        self._ours = KexInit(
            self._algorithms.kexAlgorithms + markers,
            tuple(self._host_keys),
            offer.ciphers,
            offer.ciphers,
            offer.macs,
            offer.macs,
            (b"none",),
            (b"none",),
        )
        payload = self._ours.encode()
        self._our_payload = bytes((MSG_KEXINIT,)) + payload
        self.phase = Phase.STARTED
        return payload

    def received_init(self, payload: bytes, packets: int) -> bytes | None:
        """The client's KEXINIT.

        :param packets: how many it has sent, this one among them.
        :returns: the payload of our KEXINIT if it is not sent yet.
        :raises ProtocolError: it is malformed, late, or has nothing in common with ours.
        """
        theirs = KexInit.parse(payload)
        if self.session_id is None:
            self.strict = kex.STRICT_CLIENT in theirs.methods
            self.extensions = kex.EXT_INFO_CLIENT in theirs.methods
            if self.strict and packets != 1:
                raise ProtocolError("KEXINIT was not the first packet")
        answer = None
        if self.phase is Phase.IDLE:
            self._offer = ciphers.offer(
                _both(self._algorithms.ciphers, theirs.ciphers_in, theirs.ciphers_out),
                _both(self._algorithms.macs, theirs.macs_in, theirs.macs_out),
                self._algorithms.offer,
            )
            answer = self.begin()
        self._their_payload = bytes((MSG_KEXINIT,)) + payload
        assert self._ours is not None
        self.agreement = kex.agree(theirs, self._ours)
        self._skip_guess = theirs.guessed and not kex.guess_was_right(theirs, self._ours)
        self.phase = Phase.AGREED
        return answer

    def received_public(self, payload: bytes) -> Reply | None:
        """The client's public key: our answer, which proves who we are.

        :returns: ``None`` for a guess that was wrong; another one comes.
        :raises ProtocolError: it is not a public key.
        """
        if self._skip_guess:
            self._skip_guess = False
            return None
        fields = Fields(payload, "key exchange message")
        client_public = fields.string()
        fields.end()
        agreed = self.agreement
        assert agreed is not None
        server_public, secret = kex.respond(agreed.method, client_public)
        blob, key = self._host_keys[agreed.host_key_algorithm]
        digest = kex.exchange_hash(
            self.client_version,
            self._version,
            self._their_payload,
            self._our_payload,
            blob,
            client_public,
            server_public,
            secret=secret,
        )
        first = self.session_id is None
        if self.session_id is None:
            self.session_id = digest
            self.host_key_blob = blob
        algorithm = kex.signature_algorithm(agreed.host_key_algorithm)
        signature = key.sign(digest, signatureType=algorithm)
        outward = kex.key_material(secret, digest, self.session_id, b"BDF")
        inward = kex.key_material(secret, digest, self.session_id, b"ACE")
        sealer = ciphers.make_sealer(agreed.cipher_out, agreed.mac_out, outward)
        self._next_opener = ciphers.make_opener(agreed.cipher_in, agreed.mac_in, inward)
        self._our_payload = self._their_payload = b""
        self.phase = Phase.ANSWERED
        return Reply(string(blob) + string(server_public) + string(signature), sealer, first)

    def received_new_keys(self, payload: bytes) -> Opener:
        """The client's NEWKEYS: the opener of its next packet."""
        Fields(payload, "NEWKEYS").end()
        opener, self._next_opener = self._next_opener, None
        assert opener is not None
        self.keyed = True
        self.phase = Phase.IDLE
        return opener


def _both(ours: Sequence[bytes], there: Sequence[bytes], back: Sequence[bytes]) -> list[bytes]:
    """Which of ours a client has for both directions.

    Asked from our side, whose names are few: its lists may have thousands.
    """
    return [name for name in ours if name in there and name in back]
