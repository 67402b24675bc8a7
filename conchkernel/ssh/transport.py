"""The SSH transport of the gateway (RFC 4253), a server.

Replaces Conch's packet layer and key exchange and keeps its interface: services come from the
factory, send with :meth:`GatewayTransport.sendPacket` and receive by ``packetReceived``. Bytes
become packets in :mod:`conchkernel.ssh.packets`, keys come from :mod:`conchkernel.ssh.exchange`;
here messages find their way, both ways, and connections their end.

Rules of this file: whatever a peer does wrong is a :class:`ProtocolError`, turned into one
SSH_MSG_DISCONNECT and one log line in one place; the two directions change keys apart, each at its
own NEWKEYS; nothing that waits is without a bound or a deadline.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from twisted.logger import Logger

from conchkernel import __version__
from conchkernel.ssh import hostkeys
from conchkernel.ssh.exchange import (
    MSG_DEBUG,
    MSG_DISCONNECT,
    MSG_IGNORE,
    MSG_KEX_INIT,
    MSG_KEX_REPLY,
    MSG_KEXINIT,
    MSG_NEWKEYS,
    MSG_UNIMPLEMENTED,
    KeyExchange,
    Phase,
)
from conchkernel.ssh.fields import DisconnectCode, Fields, ProtocolError, string
from conchkernel.ssh.limits import Offence
from conchkernel.ssh.outgoing import NUMBER, OutgoingPackets
from conchkernel.ssh.packets import KNOWN_PEER_BYTES, Inbound
from conchkernel.ssh.userkeys import SIGNATURE_ALGORITHMS
from conchkernel.tcp import PromptWriter, beneath

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.conch.ssh.service import SSHService
    from twisted.internet.interfaces import IDelayedCall
    from twisted.python.failure import Failure

MSG_SERVICE_REQUEST = 5
MSG_SERVICE_ACCEPT = 6
MSG_EXT_INFO = 7
MSG_GLOBAL_REQUEST = 80
MSG_PING = 192
MSG_PONG = 193
MSG_USERAUTH_REQUEST = 50
MSG_USERAUTH_SUCCESS = 52

#: RFC 4253 section 4.2 allows 255; OpenSSH takes 8192. Nobody sends so much.
_MAXIMUM_VERSION_BYTES = 1024
#: Messages from a peer before it has logged in. Every attempt to log in is counted elsewhere and
#: sooner; this is for IGNORE, DEBUG and repeated service requests.
_MAXIMUM_EARLY_MESSAGES = 256
#: Extensions in one EXT_INFO; OpenSSH's bound.
_MAXIMUM_EXTENSIONS = 1024
#: From a peer that was told that it is over. What was on its way already is within a window.
_MAXIMUM_DISCARDED_BYTES = 4 * 1024 * 1024
#: As much is read from the TCP transport at once, and held by it before it pauses us.
_TCP_BUFFER_BYTES = 256 * 1024
#: As much is given to the system at once.
_SEND_BYTES = 1024 * 1024
#: Questions for our host keys' signatures on one connection.
_MAXIMUM_PROOFS = 16
#: Packets under one set of keys; OpenSSH's bound, well before sequence numbers repeat.
_MAXIMUM_PACKETS = 1 << 31

#: Most clients send their KEXINIT at once, and we fit our offer to it. One that waits for ours
#: gets it after so many seconds.
_OFFER_SECONDS = 0.2
#: A key exchange that takes longer is given up.
_EXCHANGE_SECONDS = 120.0
#: A peer that does not close after our DISCONNECT is cut off.
_CLOSE_SECONDS = 3.0


class GatewayTransport(OutgoingPackets):
    """One client's connection.

    :ivar factory: the :class:`~conchkernel.ssh.factory.GatewayFactory`.
    :ivar sessionID: the first exchange hash (RFC 4253 section 7.2).
    :ivar failedAttempts: to log in, on this connection.
    """

    _log = Logger()

    # OpenSSH's client says that its reader has gone (eow@openssh.com) only to a server whose
    # version begins so; without that word `ssh gw yes | head -1` would not end.
    version = b"OpenSSH_compatible_conchkernel_" + __version__.replace("-", "_").encode("ascii")
    ourVersionString = b"SSH-2.0-" + version
    factory: Any
    transport: Any

    def __init__(self) -> None:
        super().__init__()
        self.failedAttempts = 0
        self._inbound = Inbound()
        self._versionBuffer = b""
        self._exchange: KeyExchange
        self._nextRekey = 0.0
        self._loggedIn = False
        self._reading = False
        # Whether messages 80 to 127 go straight to the service.
        self._open = False
        self._earlyMessages = 0
        self._proofs = 0
        self._discardedBytes = 0
        self._offence: Offence | None = None
        self._receive: Callable[[int, bytes], object] = self._noService
        self._graceCall: IDelayedCall | None = None
        self._exchangeCall: IDelayedCall | None = None
        self._closeCall: IDelayedCall | None = None
        self._handlers: dict[int, Callable[[bytes], object]] = {
            MSG_DISCONNECT: self.ssh_DISCONNECT,
            MSG_IGNORE: self.ssh_IGNORE,
            MSG_UNIMPLEMENTED: self.ssh_UNIMPLEMENTED,
            MSG_DEBUG: self.ssh_DEBUG,
            MSG_SERVICE_REQUEST: self.ssh_SERVICE_REQUEST,
            MSG_EXT_INFO: self.ssh_EXT_INFO,
            MSG_KEXINIT: self.ssh_KEXINIT,
            MSG_NEWKEYS: self.ssh_NEWKEYS,
            MSG_KEX_INIT: self._ssh_KEX_INIT,
            MSG_PING: self._ssh_PING,
        }

    # --- life --------------------------------------------------------------------------------

    def connectionMade(self) -> None:
        """Say who we are; the first KEXINIT waits for the client's, but not for long."""
        tcp = beneath(self.transport)
        self._writer = PromptWriter(self.transport)
        if hasattr(tcp, "setTcpNoDelay"):
            tcp.setTcpNoDelay(True)
            # sshd's TCPKeepAlive: a client whose machine is gone is found out within hours.
            tcp.setTcpKeepAlive(True)
        if isinstance(getattr(tcp, "bufferSize", None), int):
            tcp.bufferSize = _TCP_BUFFER_BYTES
            tcp.SEND_LIMIT = _SEND_BYTES
        factory = self.factory
        self._exchange = KeyExchange(self.ourVersionString, factory.hostKeys, factory.algorithms)
        self.transport.registerProducer(self, True)
        self.factory.connectionOpened(self)
        limits = self.factory.limits
        if limits.loginGraceTime:
            self._graceCall = self.factory.reactor.callLater(
                limits.loginGraceTime, self._graceExceeded
            )
        self._exchangeCall = self.factory.reactor.callLater(_OFFER_SECONDS, self._offerUnasked)
        self.transport.write(self.ourVersionString + b"\r\n")

    def connectionLost(self, reason: Failure | None = None) -> None:
        """The TCP connection is gone: stop all that was running for it."""
        self._closing = True
        self._open = self._writable = False
        for call in (self._graceCall, self._exchangeCall, self._closeCall):
            if call is not None and call.active():
                call.cancel()
        self._held = []
        service, self.service = self.service, None
        try:
            if service is not None:
                service.serviceStopped()
        except Exception:
            self._log.failure("{peer}: a service could not be stopped", peer=self.peerName())
        logout, self.logoutFunction = getattr(self, "logoutFunction", None), _nothing
        try:
            if logout is not None:
                logout()
        except Exception:
            self._log.failure("{peer}: log out failed", peer=self.peerName())
        self.factory.connectionClosed(self, self._offenceOf())

    def _offenceOf(self) -> Offence | None:
        if self._offence is not None or self._loggedIn:
            return self._offence
        if self.failedAttempts:
            return Offence.AUTH_FAIL
        # Who has only looked whether somebody listens has cost us nothing.
        return Offence.NO_AUTH if self._exchange.agreement is not None else None

    def peerName(self) -> str:
        """The peer's address for the log."""
        peer = self.transport.getPeer()
        host = getattr(peer, "host", None)
        if host is None:
            return str(peer)
        return f"[{host}]:{peer.port}" if ":" in host else f"{host}:{peer.port}"

    def peerHost(self) -> str:
        """The peer's IP address, or nothing where it has none."""
        return str(getattr(self.transport.getPeer(), "host", ""))

    # --- bytes in ----------------------------------------------------------------------------

    def dataReceived(self, data: bytes) -> None:
        """Take what TCP brings: the version line, then packets, in pieces of any size."""
        if self._closing:
            self._discard(len(data))
            return
        try:
            if not self.gotVersion:
                rest = self._takeVersion(data)
                if rest is None:
                    return
                data = rest
            inbound = self._inbound
            inbound.feed(data)
            self._heard = True
            if self._reading:
                return
            self._reading = True
            corked = self.cork()
            try:
                next_ = inbound.next
                while (packet := next_()) is not None:
                    number = packet[1]
                    if self._open and 80 <= number < 128:
                        self._receive(number, packet[2 : -packet[0]])
                    else:
                        self._dispatch(number, packet[2 : -packet[0]])
                    if self._closing:
                        break
            finally:
                self._reading = False
                if corked:
                    self.uncork()
        except ProtocolError as error:
            self.sendDisconnect(error.code, str(error).encode("ascii", "backslashreplace"))
            return
        except Exception:
            self._log.failure("{peer}: a packet could not be handled", peer=self.peerName())
            self._offence = Offence.CRASH
            self.sendDisconnect(DisconnectCode.BY_APPLICATION, b"internal error")
            return
        if not self._closing and self._keysAreOld():
            self.sendKexInit()

    def _takeVersion(self, data: bytes) -> bytes | None:
        """Read the client's version line; what follows it, once it is there."""
        buffer = self._versionBuffer + data
        line, newline, rest = buffer.partition(b"\n")
        line = line.rstrip(b"\r")
        if len(line) > _MAXIMUM_VERSION_BYTES or not line.startswith(b"SSH-"[: len(line)]):
            self._refuseVersion("is not an SSH client")
            return None
        if not newline:
            self._versionBuffer = buffer
            return None
        self._versionBuffer = b""
        if b"\0" in line or line[4:].partition(b"-")[0] not in self.supportedVersions:
            self._refuseVersion("speaks another protocol version")
            return None
        self.otherVersionString = self._exchange.client_version = line
        self.gotVersion = True
        return rest

    def _refuseVersion(self, why: str) -> None:
        # Who is no SSH client could not read a packet; sshd answers with this line too.
        self._log.info("{peer}: refused, {why}", peer=self.peerName(), why=why)
        self.transport.write(b"Invalid SSH identification string.\r\n")
        self._close()

    def _dispatch(self, number: int, payload: bytes) -> None:
        """Everything but the messages of a running connection service."""
        if not self._loggedIn:
            self._earlyMessages += 1
            if self._earlyMessages > _MAXIMUM_EARLY_MESSAGES:
                raise ProtocolError("too many messages before authentication")
        self._exchange.check(number)
        handler = self._handlers.get(number)
        if handler is not None:
            handler(payload)
        elif self._loggedIn and number == MSG_USERAUTH_REQUEST:
            pass  # RFC 4252 section 5.1: ignored after success.
        elif 50 <= number < 128 and (self._loggedIn or number < 80):
            self._receive(number, payload)
        elif not self._loggedIn and 80 <= number < 128:
            raise ProtocolError(f"message {number} before authentication")
        else:
            self.sendUnimplemented()

    def dispatchMessage(self, messageNum: int, payload: bytes) -> None:
        """Conch's name for what happens to a packet."""
        self._dispatch(messageNum, payload)

    def _noService(self, number: int, payload: bytes) -> None:
        raise ProtocolError(f"message {number} before a service was requested")

    # --- the key exchange --------------------------------------------------------------------

    @property
    def hostKeyBlob(self) -> bytes:
        """The public host key that the client has seen."""
        return self._exchange.host_key_blob

    def _phaseChanged(self) -> None:
        exchange = self._exchange
        self._blocked = exchange.blocks_us
        self._open = self._loggedIn and not exchange.blocks_client
        self._updateWritable()

    def _offerUnasked(self) -> None:
        """The client waits for our KEXINIT, or for nothing at all."""
        self._exchangeCall = None
        if not self._closing:
            self.sendKexInit()

    def _keysAreOld(self) -> bool:
        if not self._exchange.keyed or self._exchange.phase is not Phase.IDLE:
            return False
        limits = self.factory.limits
        inbound, outbound = self._inbound, self._outbound
        return (
            0 < limits.rekeyLimitBytes <= inbound.bytes + outbound.bytes
            or inbound.packets >= _MAXIMUM_PACKETS
            or outbound.packets >= _MAXIMUM_PACKETS
            or 0 < self._nextRekey <= self.factory.reactor.seconds()
        )

    def sendKexInit(self) -> None:
        """Begin a key exchange, unless there is one."""
        if self._exchange.phase is Phase.IDLE:
            self._sendKexInit(self._exchange.begin())

    def _sendKexInit(self, payload: bytes) -> None:
        self._phaseChanged()
        self._send(NUMBER[MSG_KEXINIT], payload)
        if self._exchangeCall is not None:
            self._exchangeCall.cancel()
        self._exchangeCall = self.factory.reactor.callLater(
            _EXCHANGE_SECONDS, self._exchangeExceeded
        )

    def ssh_KEXINIT(self, packet: bytes) -> None:
        """What the client can do (RFC 4253 section 7.1)."""
        if not self._exchange.keyed:
            refusal = self.factory.refusal(self)
            if refusal is not None:
                self._endWith(DisconnectCode.TOO_MANY_CONNECTIONS, refusal.encode("ascii"))
                return
        answer = self._exchange.received_init(packet, self._inbound.packets)
        if answer is not None:
            self._sendKexInit(answer)
        agreement = self._exchange.agreement
        assert agreement is not None
        self.kexAlg = agreement.method
        self.keyAlg = agreement.host_key_algorithm
        self._peerSupportsExtensions = self._exchange.extensions
        self._phaseChanged()

    def _ssh_KEX_INIT(self, packet: bytes) -> None:
        """The client's public key: answer it, and change our keys."""
        exchange = self._exchange
        reply = exchange.received_public(packet)
        if reply is None:
            return
        self.sessionID = exchange.session_id
        self._send(NUMBER[MSG_KEX_REPLY], reply.payload)
        self._send(NUMBER[MSG_NEWKEYS], b"")
        self._outbound.new_keys(reply.sealer, exchange.strict)
        self._blocked = False
        if reply.first:
            self.sendExtInfo(
                [
                    (b"server-sig-algs", b",".join(SIGNATURE_ALGORITHMS)),
                    (b"publickey-hostbound@openssh.com", b"0"),
                    (b"ping@openssh.com", b"0"),
                ]
            )
        self._sendHeld()
        self._phaseChanged()

    def ssh_NEWKEYS(self, packet: bytes) -> None:
        """The client's next packet is under the new keys."""
        opener = self._exchange.received_new_keys(packet)
        self._inbound.new_keys(opener, self._exchange.strict)
        if self._exchangeCall is not None:
            self._exchangeCall.cancel()
            self._exchangeCall = None
        seconds = self.factory.limits.rekeyLimitSeconds
        self._nextRekey = self.factory.reactor.seconds() + seconds if seconds else 0.0
        self._phaseChanged()

    def _exchangeExceeded(self) -> None:
        self._exchangeCall = None
        self.sendDisconnect(DisconnectCode.KEY_EXCHANGE_FAILED, b"key exchange took too long")

    # --- other messages of the transport -----------------------------------------------------

    def ssh_DISCONNECT(self, packet: bytes) -> None:
        """The client goes."""
        fields = Fields(packet, "DISCONNECT")
        code = fields.uint32()
        description = fields.string()[:128].decode("utf-8", "backslashreplace")
        if code == DisconnectCode.BY_APPLICATION and self._loggedIn:
            self._log.debug("{peer}: disconnected by the client", peer=self.peerName())
        else:
            self._log.info(
                "{peer}: disconnected by the client, code {code}, {text!r}",
                peer=self.peerName(),
                code=code,
                text=description,
            )
        self._close()

    def ssh_IGNORE(self, packet: bytes) -> None:
        """Means nothing."""

    def ssh_DEBUG(self, packet: bytes) -> None:
        """Means nothing to us either."""

    def ssh_UNIMPLEMENTED(self, packet: bytes) -> None:
        """The client does not know something that we sent, and it can live without."""
        fields = Fields(packet, "UNIMPLEMENTED")
        fields.uint32()
        fields.end()

    def ssh_EXT_INFO(self, packet: bytes) -> None:
        """What the client can do beside (RFC 8308)."""
        fields = Fields(packet, "EXT_INFO")
        count = fields.uint32()
        if count > _MAXIMUM_EXTENSIONS:
            raise ProtocolError("too many extensions")
        self.peerExtensions = {fields.string(): fields.string() for _ in range(count)}
        fields.end()

    def _ssh_PING(self, packet: bytes) -> None:
        """ping@openssh.com: the same string comes back."""
        fields = Fields(packet, "PING")
        data = fields.string()
        fields.end()
        self.sendPacket(MSG_PONG, string(data))

    def ssh_SERVICE_REQUEST(self, packet: bytes) -> None:
        """Authentication, before anything else; more of this is its business.

        paramiko asks again before each attempt: that gets the same answer and the same service,
        whose counters go on.
        """
        fields = Fields(packet, "SERVICE_REQUEST")
        name = fields.string()
        fields.end()
        if self._loggedIn or name != b"ssh-userauth":
            raise ProtocolError(
                "service not available", DisconnectCode.SERVICE_NOT_AVAILABLE
            )
        self.sendPacket(MSG_SERVICE_ACCEPT, string(name))
        if self.service is None:
            self.setService(self.factory.getService(self, name)())

    def sendUnimplemented(self) -> None:
        """Tell the client that we do not know its last message."""
        sequence = (self._inbound.sequence - 1) & 0xFFFFFFFF
        self.sendPacket(MSG_UNIMPLEMENTED, struct.pack(">L", sequence))

    # --- services ----------------------------------------------------------------------------

    def setService(self, service: SSHService) -> None:
        """Run ``service`` from now on, instead of what ran before."""
        if self.service is not None:
            self.service.serviceStopped()
        self.service = service
        service.transport = self
        self._receive = service.packetReceived
        service.serviceStarted()

    def authenticated(
        self, avatar: object, logout: Callable[[], None], service: SSHService
    ) -> None:
        """The client has proved who it is: ``service`` may start.

        :param logout: called once when the connection is gone.
        """
        self.avatar = avatar
        self.logoutFunction = logout
        self._loggedIn = True
        if self._graceCall is not None:
            self._graceCall.cancel()
            self._graceCall = None
        self._inbound.limit = KNOWN_PEER_BYTES
        self.factory.connectionAuthenticated(self)
        self.sendPacket(MSG_USERAUTH_SUCCESS, b"")
        self._phaseChanged()
        lookup = getattr(avatar, "globalRequestLookup", None)
        if lookup is not None:
            # OpenSSH learns our other keys, so that a change of the first needs no warning.
            lookup[hostkeys.PROVE] = self._proveHostKeys
            self.sendPacket(
                MSG_GLOBAL_REQUEST,
                string(hostkeys.ANNOUNCE) + b"\0" + hostkeys.announcement(self.factory.hostKeys),
            )
        self.setService(service)

    def _proveHostKeys(self, data: bytes) -> tuple[bool, bytes] | bool:
        # A small question for which we sign once for each key; no client needs it twice.
        self._proofs += 1
        if self._proofs > _MAXIMUM_PROOFS:
            return False
        assert self.sessionID is not None
        answer = hostkeys.proof(self.factory.hostKeys, data, self.sessionID, self.keyAlg)
        return False if answer is None else (True, answer)

    def _graceExceeded(self) -> None:
        self._graceCall = None
        self._offence = Offence.GRACE_EXCEEDED
        self.sendDisconnect(DisconnectCode.BY_APPLICATION, b"login took too long")

    # --- the end -----------------------------------------------------------------------------

    def sendDisconnect(self, reason: int, desc: bytes) -> None:
        """End the connection: tell the peer why, and the log in one line."""
        if self._closing:
            return
        self._log.info(
            "{peer}: disconnected, {reason}",
            peer=self.peerName(),
            reason=desc.decode("utf-8", "backslashreplace"),
        )
        self._endWith(reason, desc)

    def _endWith(self, reason: int, desc: bytes) -> None:
        """Say DISCONNECT to who can read it, and close."""
        self._held = []
        if self.gotVersion:
            payload = struct.pack(">L", reason) + string(desc) + string(b"")
            self._send(NUMBER[MSG_DISCONNECT], payload)
            self._flush()
        self._close()

    def isClosing(self) -> bool:
        """Whether the end has begun: nothing is sent or heard any more."""
        return self._closing

    def _close(self) -> None:
        """Send what is left and close.

        Only our half first: closing a socket that has unread data resets the connection, and the
        peer would not see the reason that we sent.
        """
        self._closing = True
        self._open = False
        self._updateWritable()
        self.transport.unregisterProducer()
        if self._readingPaused:
            self.transport.resumeProducing()
        half = getattr(self.transport, "loseWriteConnection", self.transport.loseConnection)
        half()
        self._closeCall = self.factory.reactor.callLater(_CLOSE_SECONDS, self._cutOff)

    def _discard(self, count: int) -> None:
        """Data that came after the end; a peer that goes on and on is not waited for."""
        self._discardedBytes += count
        if self._discardedBytes > _MAXIMUM_DISCARDED_BYTES:
            self._cutOff()

    def _cutOff(self) -> None:
        self.transport.abortConnection()

    def isEncrypted(self, direction: str = "out") -> bool:
        """Whether the peer's (``in``), our (``out``) or ``both`` directions are under keys."""
        keyed = self._exchange.keyed
        out = self.sessionID is not None
        return {"in": keyed, "out": out, "both": keyed and out}[direction]

    def isVerified(self, direction: str = "out") -> bool:
        """As :meth:`isEncrypted`: there is no cipher here without integrity."""
        return self.isEncrypted(direction)


def _nothing() -> None:
    pass
