"""Hostile clients before they have logged in: the gateway stays small, goes on serving, and has
no traceback.

Gateway and stock Conch are processes of their own, so that their memory can be told from ours; the
fixture ``gateway`` asks in the end what every attack is asked. Each attacker comes from an address
of its own. ``...OnConch`` shows that an attack is one: what stock Conch (26.10) does about it is
written there. Where there is no such test, stock Conch resists too.
"""

from __future__ import annotations

import os
import socket
import struct
import time
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from conchkernel.ssh.fields import string
from conchkernel.ssh.kex import KexInit
from tests.attackers import Attacker, sealed
from tests.rawclient import KEXINIT, VERSION
from tests.underattack import MAXIMUM_GROWTH_KIB, Server

if TYPE_CHECKING:
    from collections.abc import Callable

# --- lengths and versions ------------------------------------------------------------------------


def test_hugeLengths(gateway: Server) -> None:
    """A length of gigabytes is not waited for. (Stock Conch waits for a megabyte.)"""
    for length in (1 << 20, 1 << 30, 0xFFFFFFFF):
        attacker = Attacker(gateway)
        attacker.write(VERSION + b"\r\n" + length.to_bytes(4, "big") + bytes(100))
        assert attacker.reason() == (2, b"bad packet length")


def test_hugeVersion(gateway: Server) -> None:
    """A version line of a megabyte: cut off at its first. (By stock Conch, too.)"""
    attacker = Attacker(gateway)
    attacker.flood(b"SSH-2.0-" + b"x" * (1 << 20))
    assert attacker.socket.recv(100) == b"Invalid SSH identification string.\r\n"
    assert len(gateway.lines()) < 10


def hello(server: Server) -> Attacker:
    """A client that has much to offer, and says all of it in one segment."""
    attacker = Attacker(server)
    names = tuple(b"algorithm-%d@example.org" % number for number in range(200))
    offer = replace(attacker.offer, methods=attacker.offer.methods + names)
    attacker.write(VERSION + b"\r\n" + attacker.pack(20, offer.encode()))
    return attacker


def test_longHello(gateway: Server) -> None:
    """A version line and a big KEXINIT at once are no attack."""
    hello(gateway).until(20)


def test_longHelloOnConch(conch: Server) -> None:
    """More than 4 KiB at once are taken for a version line: an honest client is refused."""
    attacker = hello(conch)
    assert attacker.reason() == (
        10,
        b"Peer version string longer than 4KB. Preventing a denial of service attack.",
    )


def test_thousandsOfNames(gateway: Server) -> None:
    """Two lists of ciphers as long as a packet allows, with nothing in common: they are not
    compared each with each. (Nor by stock Conch.)"""
    for host in range(10, 14):
        attacker = Attacker(gateway, f"127.0.0.{host}")
        attacker.write(VERSION + b"\r\n")
        attacker.sendKexInit(
            replace(KEXINIT, ciphers_in=(b"x",) * 8000, ciphers_out=(b"y",) * 8000)
        )
        assert attacker.reason() == (3, b"no cipher in common")


def squeezed(offer: KexInit) -> KexInit:
    return replace(offer, compressions_in=(b"zlib",), compressions_out=(b"zlib",))


def test_compressionBeforeTheLogin(gateway: Server) -> None:
    """Nobody unpacks what a stranger has packed."""
    attacker = Attacker(gateway)
    attacker.write(VERSION + b"\r\n")
    attacker.sendKexInit(squeezed(KEXINIT))
    assert attacker.reason() == (3, b"no compression in common")


def test_compressionBeforeTheLoginOnConch(conch: Server) -> None:
    """A packet of a hundred KiB becomes a hundred MiB."""
    attacker = Attacker(conch)
    attacker.start(squeezed(attacker.offer))
    packer = zlib.compressobj(9)
    bomb = packer.compress(b"\2" + string(bytes(100 << 20))) + packer.flush(zlib.Z_SYNC_FLUSH)
    attacker.write(attacker.pack(bomb[0], bomb[1:]))
    attacker.write(attacker.pack(*packed(packer, 5, string(b"ssh-userauth"))))
    unpacker = zlib.decompressobj()
    while True:
        messages = attacker.more()
        if any(unpacker.decompress(bytes((one,)) + rest)[:1] == b"\6" for one, rest in messages):
            break
    assert len(bomb) < 200_000
    assert conch.growth() > MAXIMUM_GROWTH_KIB


def packed(packer: zlib._Compress, number: int, payload: bytes) -> tuple[int, bytes]:
    data = packer.compress(bytes((number,)) + payload) + packer.flush(zlib.Z_SYNC_FLUSH)
    return data[0], data[1:]


# --- out of order --------------------------------------------------------------------------------


def keyInitAgain(attacker: Attacker) -> None:
    attacker.write(VERSION + b"\r\n")
    attacker.sendKexInit(attacker.offer)
    attacker.sendKexInit(attacker.offer)
    attacker.sendKexInit(attacker.offer)


def newKeysFirst(attacker: Attacker) -> None:
    attacker.write(VERSION + b"\r\n")
    attacker.send(21)


def newKeysEarly(attacker: Attacker) -> None:
    attacker.write(VERSION + b"\r\n")
    attacker.sendKexInit(attacker.offer)
    attacker.send(21)


def curve(attacker: Attacker) -> None:
    attacker.write(VERSION + b"\r\n")
    attacker.sendKexInit(replace(attacker.offer, methods=(b"curve25519-sha256",)))
    attacker.until(20)


def pointOfNoOrder(attacker: Attacker) -> None:
    curve(attacker)
    attacker.send(30, string(bytes(32)))


def shortPoint(attacker: Attacker) -> None:
    curve(attacker)
    attacker.send(30, string(bytes(31)))


def noPoint(attacker: Attacker) -> None:
    curve(attacker)
    attacker.send(30)


def shortKeyInit(attacker: Attacker) -> None:
    attacker.write(VERSION + b"\r\n")
    attacker.send(20, bytes(20))


def shortDisconnect(attacker: Attacker) -> None:
    attacker.write(VERSION + b"\r\n")
    attacker.send(1, b"\0")


def shortUnimplemented(attacker: Attacker) -> None:
    attacker.start(attacker.offer)
    attacker.send(3, b"\0")


def shortExtensions(attacker: Attacker) -> None:
    attacker.start(attacker.offer)
    attacker.send(7, b"\0\0\0\2" + string(b"x"))


def shortService(attacker: Attacker) -> None:
    attacker.start(attacker.offer)
    attacker.send(5, b"\0")


def shortLogin(attacker: Attacker) -> None:
    attacker.start(attacker.offer)
    attacker.requestAuth()
    attacker.send(50, string(b"joe"))


DISORDERLY = [
    (keyInitAgain, b"message 20 out of order in the key exchange"),
    (newKeysFirst, b"message 21 out of order in the key exchange"),
    (newKeysEarly, b"message 21 out of order in the key exchange"),
    (pointOfNoOrder, b"unusable public key in the key exchange"),
    (shortPoint, b"unusable public key in the key exchange"),
    (noPoint, b"truncated key exchange message"),
    (shortKeyInit, b"truncated KEXINIT"),
    (shortDisconnect, b"truncated DISCONNECT"),
    (shortUnimplemented, b"truncated UNIMPLEMENTED"),
    (shortExtensions, b"truncated EXT_INFO"),
    (shortService, b"truncated SERVICE_REQUEST"),
    (shortLogin, b"truncated USERAUTH_REQUEST"),
]


def test_disorder(gateway: Server) -> None:
    """What is out of order, cut off or no key ends with a reason and one line in the log."""
    for attack, why in DISORDERLY:
        before = len(gateway.lines())
        attacker = Attacker(gateway)
        attack(attacker)
        code, text = attacker.reason()
        assert text == why, attack
        assert code == (3 if b"unusable" in why else 2)
        (line,) = gateway.lines()[before:]
        assert why.decode() in line
        assert "127.0.0.2:" in line


def test_disorderOnConch(conch: Server) -> None:
    """Each of them is an error that nobody had expected, with a traceback in the log."""
    unharmed = []
    for attack, _ in DISORDERLY:
        before = len(conch.failures())
        attacker = Attacker(conch)
        attack(attacker)
        attacker.untilClosed()
        if len(conch.failures()) == before:
            unharmed.append(attack)
    assert not unharmed


def test_noKeyForTheHybrid(gateway: Server) -> None:
    """No key of ML-KEM, or half of one. (Stock Conch refuses these.)"""
    for public in (b"", bytes(1216), b"\xff" * 1216, bytes(1215), bytes(1217)):
        attacker = Attacker(gateway)
        attacker.write(VERSION + b"\r\n")
        attacker.sendKexInit()
        attacker.until(20)
        attacker.send(30, string(public))
        assert attacker.reason() == (3, b"unusable public key in the key exchange"), len(public)


def test_requestsBeforeTheKeys(gateway: Server) -> None:
    """Nothing but the key exchange before the keys: no service runs in clear."""
    for number in (5, 50, 80, 90):
        attacker = Attacker(gateway)
        attacker.write(VERSION + b"\r\n")
        attacker.flood(sealed(attacker, number, string(b"ssh-userauth"), 10000))
        assert attacker.reason()[0] == 2
    assert len(gateway.lines()) < 10


def test_requestsBeforeTheKeysOnConch(conch: Server) -> None:
    """Authentication runs in clear: it has its answers ready when the keys are there."""
    attacker = Attacker(conch)
    attacker.write(VERSION + b"\r\n")
    attacker.send(5, string(b"ssh-userauth"))
    attacker.flood(sealed(attacker, 50, string(b"joe") + string(b"x") + string(b"none"), 10000))
    attacker.sendKexInit(attacker.offer)
    attacker.until(20)
    attacker.sendPublic()
    attacker.until(21)
    attacker.sendNewKeys()
    answers = [number for number, _ in attacker.until(6)]
    while answers.count(51) < 10000:
        answers += [number for number, _ in attacker.more()]
    assert answers.count(51) == 10000


def test_channelsBeforeTheLogin(gateway: Server) -> None:
    """A channel without a login, or a connection service. (Stock Conch refuses both.)"""
    session = string(b"session") + struct.pack(">3L", 0, 1 << 20, 32768)
    for number, payload in ((90, session), (5, string(b"ssh-connection")), (52, b""), (60, b"")):
        attacker = Attacker(gateway)
        attacker.start()
        attacker.send(number, payload)
        assert attacker.reason()[0] in (2, 7)


def chatter(server: Server) -> tuple[Attacker, int]:
    """Megabytes of junk by a client that reads nothing; how many bytes were taken of it."""
    attacker = Attacker(server)
    attacker.start()
    return attacker, attacker.flood(sealed(attacker, 99, string(bytes(100)), 30000))


def test_chatterBeforeTheLogin(gateway: Server) -> None:
    """Cut off after 256 messages, if they are not what ends it at once."""
    attacker, _ = chatter(gateway)
    assert attacker.reason() == (2, b"message 99 before authentication")
    attacker = Attacker(gateway, "127.0.0.8")
    attacker.start()
    attacker.flood(sealed(attacker, 2, string(bytes(100)), 30000))
    assert attacker.reason() == (2, b"too many messages before authentication")
    assert len(gateway.lines()) < 10


def test_chatterBeforeTheLoginOnConch(conch: Server) -> None:
    """All of it is taken."""
    _, sent = chatter(conch)
    assert sent > 3_000_000


def empty(server: Server) -> Attacker:
    """A packet without any message, and one with a question behind it."""
    attacker = Attacker(server)
    attacker.login()
    attacker.write(attacker.packNothing() + attacker.pack(80, string(b"question") + b"\1"))
    return attacker


def test_emptyPacket(gateway: Server) -> None:
    """A packet without any message ends it, as with sshd."""
    assert empty(gateway).reason() == (2, b"bad padding length")


def test_emptyPacketOnConch(conch: Server) -> None:
    """What came behind it waits for what comes next."""
    attacker = empty(conch)
    # Somebody who came later is served before.
    Attacker(conch, "127.0.0.3").login()
    attacker.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        attacker.socket.recv(1)
    attacker.socket.settimeout(30)
    attacker.send(2, string(b""))
    attacker.until(82)


def test_forgedPackets(gateway: Server) -> None:
    """Packets under other keys, also behind good ones. (Stock Conch refuses these.)"""
    attacker = Attacker(gateway)
    attacker.login()
    head = (65536 - 16).to_bytes(4, "big")
    forged = head + AESGCM(bytes(16)).encrypt(bytes(12), bytes(65536 - 16), head)
    attacker.flood(forged * 100)
    assert attacker.reason() == (5, b"packet failed its integrity check")


# --- crowds --------------------------------------------------------------------------------------


def test_crowd(gateway: Server) -> None:
    """Four hundred that say nothing: at most a hundred are kept, and others still get in."""
    crowd = [Attacker(gateway, "127.0.0.3") for _ in range(400)]
    assert sum(one.greeting == b"Exceeded MaxStartups" for one in crowd) >= 300
    for one in crowd:
        one.socket.close()
    # Until their ends have been seen, one in three may still be refused.
    deadline = time.monotonic() + 20
    while Attacker(gateway, "127.0.0.4").greeting == b"Exceeded MaxStartups":
        assert time.monotonic() < deadline


def test_crowdOnConch(conch: Server) -> None:
    """All of them are kept, and for ever."""
    crowd = [Attacker(conch, "127.0.0.3") for _ in range(400)]
    assert all(one.greeting.startswith(b"SSH-2.0-") for one in crowd)
    for one in crowd:
        one.until(20)
        one.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            one.socket.recv(1)


def test_connectAndReset(gateway: Server) -> None:
    """Three hundred that break off with a reset in the middle of the key exchange. (Stock Conch
    bears it.)"""
    for _ in range(300):
        attacker = Attacker(gateway, "127.0.0.5")
        try:
            attacker.write(VERSION + b"\r\n")
            attacker.sendKexInit()
        except OSError:
            pass
        attacker.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        attacker.socket.close()


def exchanges(server: Server, count: int) -> int:
    """Key exchanges by one who wants only those; how many there were."""
    for done in range(count):
        attacker = Attacker(server, "127.0.0.6")
        try:
            attacker.start()
        except OSError:
            return done
        attacker.socket.close()
    return count


def test_exchangesAndNothingElse(gateway: Server) -> None:
    """They are what costs us most: who comes for nothing else is soon refused."""
    assert exchanges(gateway, 200) < 200


def test_exchangesAndNothingElseOnConch(conch: Server) -> None:
    """All are made."""
    assert exchanges(conch, 200) == 200


# --- guesses -------------------------------------------------------------------------------------


def guesses(server: Server) -> Attacker:
    """Three thousand passwords in one segment."""
    attacker = Attacker(server)
    attacker.start()
    attacker.requestAuth()
    head = string(b"joe") + string(b"ssh-connection") + string(b"password") + b"\0"
    attacker.write(b"".join(attacker.pack(50, head + string(os.urandom(8))) for _ in range(3000)))
    return attacker


def test_guessesSentAhead(gateway: Server) -> None:
    """One is judged when the connection ends."""
    attacker = guesses(gateway)
    assert attacker.reason() == (2, b"too many login attempts at once")
    Attacker(gateway, "127.0.0.9").login()
    assert len([line for line in gateway.lines() if "refused" in line]) <= 6


def test_guessesSentAheadOnConch(conch: Server) -> None:
    """Hundreds are judged before the first counts."""
    assert guesses(conch).reason() == (14, b"too many bad auths")
    assert conch.stop()["judged"] > 200


def beginAgain(server: Server) -> int:
    """Twenty attempts, the service requested anew, and so on; how many attempts there were."""
    attacker = Attacker(server)
    attacker.start()
    answers = 0
    try:
        for _ in range(25):
            attacker.requestAuth()
            for _ in range(20):
                attacker.auth(b"hostbased")
                attacker.until(51)
                answers += 1
    except OSError:
        pass
    return answers


def test_serviceRequestedAgain(gateway: Server) -> None:
    """The count belongs to the connection."""
    assert beginAgain(gateway) == 5


def test_serviceRequestedAgainOnConch(conch: Server) -> None:
    """Each request begins the count anew."""
    assert beginAgain(conch) == 500


def probe(server: Server, attempt: Callable[[Attacker], None]) -> list[int]:
    """Five hundred attempts that prove nothing; the answers."""
    attacker = Attacker(server)
    attacker.start()
    attacker.requestAuth()
    answers: list[int] = []
    try:
        for _ in range(500):
            attempt(attacker)
            answers += [number for number, _ in attacker.more()]
    except OSError:
        pass
    return answers


def key(attacker: Attacker) -> None:
    public = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    blob = string(string(b"ssh-ed25519") + string(public))
    attacker.auth(b"publickey", b"\0" + string(b"ssh-ed25519") + blob)


def nothing(attacker: Attacker) -> None:
    attacker.auth(b"none")


def test_probes(gateway: Server) -> None:
    """Keys that would not do are not confirmed, and each is a failure; so is ``none``, but once."""
    assert probe(gateway, key) == [51] * 5 + [1]
    assert probe(gateway, nothing) == [51] * 6 + [1]


def test_probesOnConch(conch: Server) -> None:
    """Any key is confirmed, and nothing counts."""
    assert probe(conch, key) == [60] * 500
    assert probe(conch, nothing) == [51] * 500
