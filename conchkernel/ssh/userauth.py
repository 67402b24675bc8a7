"""Authentication (RFC 4252): publickey, password, keyboard-interactive, and ``none`` where allowed.

What differs from Conch's: requests are served one at a time and in order; every failure counts
against one number that belongs to the connection; a key is checked against what the client says
of it before any checker sees it; a failure takes the same time and reads the same, whoever the
user is; and nothing is believed about the next service before the login.

Which methods there are follows from the interfaces of the portal's checkers.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from twisted.conch.error import NotEnoughAuthentication, ValidPublicKey
from twisted.conch.interfaces import IConchUser
from twisted.conch.ssh.userauth import (
    MSG_USERAUTH_BANNER,
    MSG_USERAUTH_FAILURE,
    MSG_USERAUTH_INFO_REQUEST,
    MSG_USERAUTH_INFO_RESPONSE,
    MSG_USERAUTH_PK_OK,
    MSG_USERAUTH_REQUEST,
    SSHUserAuthServer,
)
from twisted.cred.credentials import (
    Anonymous,
    IAnonymous,
    ISSHPrivateKey,
    IUsernamePassword,
    SSHPrivateKey,
    UsernamePassword,
)
from twisted.cred.error import LoginFailed, UnauthorizedLogin
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger

from conchkernel.ssh import userkeys
from conchkernel.ssh.fields import DisconnectCode, Fields, ProtocolError, names, printable, string
from conchkernel.ssh.userkeys import KeyRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: What comes after authentication. There is nothing else.
_NEXT_SERVICE = b"ssh-connection"
_HOSTBOUND = b"publickey-hostbound-v00@openssh.com"

#: The methods there are, and what a checker must take for each.
METHODS = {
    b"publickey": ISSHPrivateKey,
    b"keyboard-interactive": IUsernamePassword,
    b"password": IUsernamePassword,
    b"none": IAnonymous,
}

#: Requests that may wait while one is served; a client that sends ahead needs two or three.
_MAXIMUM_WAITING = 16
#: Their bytes; the largest honest one is a certificate's or a big RSA key's.
_MAXIMUM_WAITING_BYTES = 64 * 1024
#: Requests of all kinds for each failure allowed. Key probes that succeed are no failures.
_REQUESTS_PER_TRY = 8
#: sshd takes no longer password either.
_MAXIMUM_PASSWORD_BYTES = 1024

_PROMPT = b"Password: "

#: A failure is answered at a multiple of this after its request, so that the time tells nothing
#: of what was compared; the value is sshd's.
_KEY_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class _Request:
    """One SSH_MSG_USERAUTH_REQUEST."""

    user: bytes
    service: bytes
    method: bytes
    rest: bytes
    """What the method adds."""

    @property
    def size(self) -> int:
        """Its bytes, nearly."""
        return len(self.user) + len(self.service) + len(self.method) + len(self.rest)

    @property
    def name(self) -> bytes:
        """The method as lists of methods have it."""
        return b"publickey" if self.method == _HOSTBOUND else self.method


class _Answered(Exception):
    """The request has had its answer, or needs none, and was no failure."""


class _Abandoned(Exception):
    """The client has begun anew instead of answering our question."""


class GatewayUserAuth(SSHUserAuthServer):
    """Authentication of one connection.

    :cvar passwordDelay: a wrong password is answered at a multiple of so many seconds.
    """

    _log = Logger()

    transport: Any
    passwordDelay = 1

    def serviceStarted(self) -> None:
        """The client wants to log in."""
        factory = self.transport.factory
        self.portal = factory.portal
        self.authenticatedWith: list[bytes] = []
        self.user = None
        self._limits = factory.limits
        self._reactor = factory.reactor
        self._waiting: deque[_Request] = deque()
        self._serving = False
        self._over = False
        self._requests = 0
        self._failures = 0
        self._bannerSent = not factory.banner
        self._pause: Deferred[None] | None = None
        self._question: Deferred[bytes] | None = None
        self._methods: dict[bytes, Callable[[_Request], Any]] = {}
        interfaces = set(self.portal.listCredentialsInterfaces())
        if ISSHPrivateKey in interfaces:
            self._methods[b"publickey"] = self._publickey
            self._methods[_HOSTBOUND] = self._publickey
        if IUsernamePassword in interfaces:
            self._methods[b"keyboard-interactive"] = self._keyboardInteractive
            self._methods[b"password"] = self._password
        if IAnonymous in interfaces:
            self._methods[b"none"] = self._none
        self._steps: Sequence[Sequence[bytes]] = factory.authenticationMethods
        self._usedKeys: set[bytes] = set()
        self._proofs: list[Any] = []  # what the avatars of earlier steps may ask for
        self._listMethods()

    def _listMethods(self) -> None:
        """What a client is told that it may try."""
        self.supportedAuthentications = [
            name
            for name in self._methods
            if name not in (_HOSTBOUND, b"none") and self._mayTry(name)
        ]

    def _mayTry(self, name: bytes) -> bool:
        return not self._steps or any(steps[0] == name for steps in self._steps)

    def serviceStopped(self) -> None:
        """The client is in, or gone."""
        self._over = True
        self._waiting.clear()
        for waiting in (self._pause, self._question):
            if waiting is not None:
                waiting.cancel()

    def _isOver(self) -> bool:
        return self._over or self.transport.isClosing()

    # --- one request at a time ---------------------------------------------------------------

    def packetReceived(self, messageNum: int, packet: bytes) -> None:
        """Requests, and the answers to our questions."""
        if messageNum == MSG_USERAUTH_REQUEST:
            fields = Fields(packet, "USERAUTH_REQUEST")
            request = _Request(fields.string(), fields.string(), fields.string(), fields.rest())
            waitingBytes = len(packet) + sum(one.size for one in self._waiting)
            if len(self._waiting) >= _MAXIMUM_WAITING or waitingBytes > _MAXIMUM_WAITING_BYTES:
                raise ProtocolError("too many login attempts at once")
            self._waiting.append(request)
            if self._question is not None:
                # RFC 4256 section 3.1: a new request ends the dialogue.
                self._question.errback(_Abandoned())
            self._serve()
        elif messageNum == MSG_USERAUTH_INFO_RESPONSE and self._question is not None:
            fields = Fields(packet, "USERAUTH_INFO_RESPONSE")
            if fields.uint32() != 1:
                raise ProtocolError("one question has one answer")
            answer = fields.string()
            fields.end()
            self._question.callback(answer)
        else:
            self.transport.sendUnimplemented()

    def _serve(self) -> None:
        while self._waiting and not self._serving and not self._isOver():
            self._serving = True
            served = Deferred.fromCoroutine(self._answer(self._waiting.popleft()))
            served.addCallback(lambda _: self._serve())

    async def _answer(self, request: _Request) -> None:
        """Serve one request to its end. Raises nothing."""
        try:
            await self._handle(request)
        except (_Answered, CancelledError):
            pass
        except ProtocolError as error:
            self.transport.sendDisconnect(error.code, str(error).encode("ascii"))
        except Exception:
            self._log.failure("{peer}: login failed", peer=self.transport.peerName())
            self.transport.sendDisconnect(DisconnectCode.BY_APPLICATION, b"internal error")
        finally:
            self._serving = False

    async def _handle(self, request: _Request) -> None:
        self._requests += 1
        if self._requests > self._limits.maxAuthTries * _REQUESTS_PER_TRY:
            raise ProtocolError(
                "too many login attempts", DisconnectCode.NO_MORE_AUTH_METHODS_AVAILABLE
            )
        if request.service != _NEXT_SERVICE:
            raise ProtocolError("service not available", DisconnectCode.SERVICE_NOT_AVAILABLE)
        if request.user != self.user:
            self.user = request.user
            self.authenticatedWith = []
            self._steps = self.transport.factory.authenticationMethods
            self._usedKeys.clear()
            self._proofs.clear()
            self._listMethods()
        if not self._bannerSent:
            self._bannerSent = True
            self.transport.sendPacket(
                MSG_USERAUTH_BANNER, string(self.transport.factory.banner) + string(b"")
            )
        started = self._reactor.seconds()
        method = self._methods.get(request.method, self._unknown)
        if not self._mayTry(request.name):
            method = self._unknown
        try:
            await method(request)
        except NotEnoughAuthentication:
            self.authenticatedWith.append(request.name)
            self._sendFailure(partial=True)
        except _Abandoned:
            self._count(request, "abandoned")
            self._checkTries()
        except (KeyRefused, LoginFailed, UnauthorizedLogin) as error:
            # Only ours are sentences about the peer; a checker's text may say anything.
            why = str(error) if isinstance(error, KeyRefused) else "not accepted"
            await self._refuse(request, why, started)
        except (CancelledError, ProtocolError, _Answered):
            raise
        except Exception:
            peer = self.transport.peerName()
            self._log.failure("{peer}: a login could not be checked", peer=peer)
            await self._refuse(request, "could not be checked", started)

    async def _refuse(self, request: _Request, why: str, started: float) -> None:
        """Say no, not before it is due.

        The failure stands at once: who does not wait for the answer has failed all the same.
        """
        self._count(request, why)
        unit = 0.0
        if request.method in (b"password", b"keyboard-interactive"):
            unit = self.passwordDelay
        elif request.method != b"none":
            unit = _KEY_SECONDS
        if unit:
            elapsed = self._reactor.seconds() - started
            self._pause = deferLater(self._reactor, unit - elapsed % unit)
            try:
                await self._pause
            finally:
                self._pause = None
        self._checkTries()
        self._sendFailure(partial=False)

    def _count(self, request: _Request, why: str) -> None:
        """One more failure."""
        if request.method == b"none" and self._requests == 1:
            return  # How every client asks what there is.
        self._failures += 1
        self.transport.failedAttempts += request.method != b"none"
        self._log.info(
            "{peer}: {method} for {user!r} refused, {why}",
            peer=self.transport.peerName(),
            method=printable(request.method),
            user=request.user[:64].decode("utf-8", "backslashreplace"),
            why=why,
        )

    def _checkTries(self) -> None:
        """The last failure allowed ends the connection."""
        if self._failures >= self._limits.maxAuthTries:
            raise ProtocolError(
                "too many authentication failures", DisconnectCode.NO_MORE_AUTH_METHODS_AVAILABLE
            )

    def _sendFailure(self, *, partial: bool) -> None:
        self.transport.sendPacket(
            MSG_USERAUTH_FAILURE,
            names(tuple(self.supportedAuthentications)) + (b"\1" if partial else b"\0"),
        )

    # --- the methods -------------------------------------------------------------------------

    async def _unknown(self, request: _Request) -> None:
        raise UnauthorizedLogin

    async def _none(self, request: _Request) -> None:
        """Nothing to prove (RFC 4252 section 5.2); only where a checker takes anybody."""
        Fields(request.rest, "none request").end()
        await self._login(Anonymous(), request)

    async def _password(self, request: _Request) -> None:
        """A password (RFC 4252 section 8)."""
        fields = Fields(request.rest, "password request")
        change = fields.boolean()
        password = fields.string()
        if change:
            raise UnauthorizedLogin
        fields.end()
        await self._loginByPassword(password, request)

    async def _keyboardInteractive(self, request: _Request) -> None:
        """A question and an answer (RFC 4256): the password, for clients that prefer it so."""
        fields = Fields(request.rest, "keyboard-interactive request")
        fields.string()
        fields.string()
        fields.end()
        question = self._question = Deferred()
        self.transport.sendPacket(
            MSG_USERAUTH_INFO_REQUEST,
            string(b"") * 3 + (1).to_bytes(4, "big") + string(_PROMPT) + b"\0",
        )
        try:
            password = await question
        finally:
            self._question = None
        await self._loginByPassword(password, request)

    async def _loginByPassword(self, password: bytes, request: _Request) -> None:
        if len(password) > _MAXIMUM_PASSWORD_BYTES:
            raise UnauthorizedLogin
        await self._login(UsernamePassword(request.user, password), request)

    async def _publickey(self, request: _Request) -> None:
        """A key, or the question whether it would do (RFC 4252 section 7; OpenSSH's PROTOCOL).

        The host-bound form signs the host key that the client has seen too.
        """
        hostbound = request.method == _HOSTBOUND
        fields = Fields(request.rest, "publickey request")
        proved = fields.boolean()
        algorithm = fields.string()
        blob = fields.string()
        hostKey = fields.string() if hostbound else b""
        signature = fields.string() if proved else b""
        fields.end()
        if hostbound and hostKey != self.transport.hostKeyBlob:
            raise KeyRefused("bound to a host key that is not ours")
        key = userkeys.parse(algorithm, blob, self._limits.requiredRSASize)
        if not proved:
            await self._probe(SSHPrivateKey(request.user, algorithm, blob, None, None))
            self.transport.sendPacket(MSG_USERAUTH_PK_OK, string(algorithm) + string(blob))
            raise _Answered
        message = b"".join(
            (
                string(self.transport.sessionID),
                bytes((MSG_USERAUTH_REQUEST,)),
                string(request.user),
                string(request.service),
                string(request.method),
                b"\1",
                string(algorithm),
                string(blob),
                string(hostKey) if hostbound else b"",
            )
        )
        message = userkeys.signed(key, algorithm, signature, message)
        if blob in self._usedKeys:
            raise KeyRefused("this key has proved one step already")
        credentials = SSHPrivateKey(request.user, algorithm, blob, message, signature)
        try:
            await self._login(credentials, request)
        except NotEnoughAuthentication:
            self._usedKeys.add(blob)
            raise

    async def _probe(self, credentials: SSHPrivateKey) -> None:
        """Ask the checker about a key without a signature.

        :raises UnauthorizedLogin: it would not do.
        """
        try:
            _, _, logout = await self.portal.login(credentials, None, IConchUser)
        except ValidPublicKey:
            return
        # A checker that takes a key without a signature is broken; let nobody in by it.
        logout()
        raise UnauthorizedLogin

    async def _login(self, credentials: object, request: _Request) -> None:
        """Ask the portal, and hand the connection over where it says yes."""
        _, avatar, logout = await self.portal.login(credentials, None, IConchUser)
        if self._isOver():
            logout()
            return
        if not self._wasLastStep(request.name):
            # The last step has its own avatar; this one is only a proof, but what it may not ask
            # for, the last one may not either.
            self._proofs.append(getattr(avatar, "permissions", None))
            logout()
            raise NotEnoughAuthentication
        for permissions in self._proofs:
            if permissions is not None:
                avatar.narrow(permissions)
        service = self.transport.factory.services[_NEXT_SERVICE]()
        self._log.info(
            "{peer}: {user!r} logged in by {method}",
            peer=self.transport.peerName(),
            user=request.user[:64].decode("utf-8", "backslashreplace"),
            method=request.method.decode("ascii"),
        )
        self.transport.authenticated(avatar, logout, service)

    def _wasLastStep(self, name: bytes) -> bool:
        """Go one step further where several are required (sshd's AuthenticationMethods)."""
        if not self._steps:
            return True
        left = [steps[1:] for steps in self._steps if steps[0] == name]
        if not all(left):
            return True
        self._steps = left
        self._listMethods()
        return False
