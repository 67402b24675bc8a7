"""Packet protection: against another implementation, against forgery, and in every piece size."""

from __future__ import annotations

import os
from typing import Any

import pytest
from asyncssh.encryption import get_encryption
from hypothesis import given, settings
from hypothesis import strategies as st

from conchkernel.ssh import ciphers
from conchkernel.ssh.ciphers import CIPHERS, MACS, KeyMaterial
from conchkernel.ssh.fields import ProtocolError
from conchkernel.ssh.packets import KNOWN_PEER_BYTES, Inbound, Outbound
from conchkernel.ssh.sealing import BadTag, GcmOpener, GcmSealer, PlainOpener, PlainSealer

PAIRS = [
    (cipher, mac)
    for cipher, spec in CIPHERS.items()
    for mac in ([b""] if spec.authenticated else MACS)
]
pairs = pytest.mark.parametrize(("cipher", "mac"), PAIRS, ids=lambda name: name.decode() or "-")

SIZES = [1, 2, 7, 8, 11, 12, 15, 16, 17, 255, 256, 32768, 35000]


class Keys:
    """Keys for one direction, and asyncssh's idea of them."""

    def __init__(self, cipher: bytes, mac: bytes) -> None:
        self.cipher = cipher
        self.mac = mac
        self.material = KeyMaterial(os.urandom(64), os.urandom(64), os.urandom(64))

    def derive(self, iv: int, key: int, mac: int) -> KeyMaterial:
        material = self.material
        return KeyMaterial(material.iv[:iv], material.key[:key], material.mac_key[:mac])

    def sealer(self) -> Any:
        return ciphers.make_sealer(self.cipher, self.mac, self.derive)

    def opener(self) -> Any:
        return ciphers.make_opener(self.cipher, self.mac, self.derive)

    def other(self) -> Any:
        spec = CIPHERS[self.cipher]
        mac = MACS.get(self.mac)
        material = self.derive(spec.iv_bytes, spec.key_bytes, mac.key_bytes if mac else 0)
        return get_encryption(
            self.cipher,
            material.key,
            material.iv,
            self.mac,
            material.mac_key,
            mac is not None and mac.etm,
        )


def openAll(inbound: Inbound, data: bytes) -> list[bytes]:
    inbound.feed(data)
    payloads = []
    while (packet := inbound.next()) is not None:
        payloads.append(packet[1 : -packet[0]])
    return payloads


@pairs
def test_sealedForAsyncssh(cipher: bytes, mac: bytes) -> None:
    """What we seal, asyncssh opens: one direction's packets in a row."""
    keys = Keys(cipher, mac)
    outbound = Outbound()
    outbound.new_keys(keys.sealer(), reset_sequence=True)
    other = keys.other()
    etm = mac in MACS and MACS[mac].etm
    for sequence, size in enumerate(SIZES):
        payload = os.urandom(size)
        data = b"".join(outbound.seal(payload[:1], payload[1:]))
        headBytes = 4 if CIPHERS[cipher].authenticated or etm else 16
        first, length = other.decrypt_header(sequence, data[:headBytes], 4)
        tag = len(data) - 4 - int.from_bytes(length, "big")
        packet = other.decrypt_packet(
            sequence, first, data[headBytes : len(data) - tag], 4, data[len(data) - tag :]
        )
        assert packet is not None
        assert packet[1 : -packet[0]] == payload


@pairs
def test_openedFromAsyncssh(cipher: bytes, mac: bytes) -> None:
    """What asyncssh seals, we open."""
    keys = Keys(cipher, mac)
    inbound = Inbound()
    inbound.limit = KNOWN_PEER_BYTES
    inbound.new_keys(keys.opener(), reset_sequence=True)
    other = keys.other()
    block = inbound.opener.block_bytes
    for sequence, size in enumerate(SIZES):
        payload = os.urandom(size)
        padding = -(inbound.opener.counted_bytes + 1 + size) % block
        padding += block if padding < 4 else 0
        packet = bytes((padding,)) + payload + os.urandom(padding)
        header = len(packet).to_bytes(4, "big")
        data, tag = other.encrypt_packet(sequence, header, packet)
        assert openAll(inbound, data + tag) == [payload]


@pairs
def test_everyFragmentation(cipher: bytes, mac: bytes) -> None:
    """The packets are the same wherever TCP cuts the stream."""
    keys = Keys(cipher, mac)

    @settings(max_examples=25, deadline=None)
    @given(
        st.lists(st.binary(min_size=1, max_size=600), min_size=1, max_size=6),
        st.lists(st.integers(1, 400), max_size=12),
    )
    def check(payloads: list[bytes], cuts: list[int]) -> None:
        outbound = Outbound()
        outbound.new_keys(keys.sealer(), reset_sequence=True)
        stream = b"".join(
            piece for payload in payloads for piece in outbound.seal(payload[:1], payload[1:])
        )
        inbound = Inbound()
        inbound.new_keys(keys.opener(), reset_sequence=True)
        opened = []
        for cut in cuts:
            opened += openAll(inbound, stream[:cut])
            stream = stream[cut:]
        opened += openAll(inbound, stream)
        assert opened == payloads

    check()


@pytest.mark.parametrize("cipher", [b"aes128-gcm@openssh.com", b"aes256-gcm@openssh.com"])
@pytest.mark.parametrize(("pieceBytes", "count"), [(1024, 256), (32768, 8), (1500, 3), (1031, 1)])
def test_aRunIsItsPackets(cipher: bytes, pieceBytes: int, count: int) -> None:
    """Many packets in one go are to the bit those made one by one, whatever comes between; the
    number of the next packet and the nonce go on as they should, beyond their ends."""
    keys = Keys(cipher, b"")
    last = b"\xff" * 8
    keys.material = KeyMaterial(b"fix!" + last, keys.material.key, b"")
    one, many = Outbound(), Outbound()
    head = b"\x5e" + bytes(8)
    out = memoryview(bytearray(300_000))
    for outbound in (one, many):
        outbound.new_keys(keys.sealer(), reset_sequence=True)
        outbound.sequence = 0xFFFFFFFE
    assert many.seals_runs
    for _ in range(2):
        body = os.urandom(pieceBytes * count)
        written = many.seal_run(head, memoryview(body), pieceBytes, out)
        expected = b"".join(
            piece
            for begin in range(0, len(body), pieceBytes)
            for piece in one.seal(head, body[begin : begin + pieceBytes])
        )
        assert bytes(out[:written]) == expected
        assert many.seal(b"\x02", b"between") == one.seal(b"\x02", b"between")
    assert (many.sequence, many.packets) == (one.sequence, one.packets)
    assert many.sequence == (2 * count + 2 - 2) & 0xFFFFFFFF


def test_whoMakesRuns() -> None:
    """Of the ciphers AES-GCM does; before there are keys nobody does."""
    outbound = Outbound()
    assert not outbound.seals_runs
    for cipher, mac in PAIRS:
        outbound.new_keys(Keys(cipher, mac).sealer(), reset_sequence=True)
        assert outbound.seals_runs == (b"gcm" in cipher)


@pairs
def test_byteByByte(cipher: bytes, mac: bytes) -> None:
    """So they are where every byte comes alone."""
    keys = Keys(cipher, mac)
    sealer = keys.sealer()
    stream = b"".join(
        piece for sequence in range(3) for piece in sealer.seal(sequence, b"\x5e", b"abc")
    )
    inbound = Inbound()
    inbound.new_keys(keys.opener(), reset_sequence=True)
    opened = []
    for at in range(len(stream)):
        opened += openAll(inbound, stream[at : at + 1])
    assert opened == [b"\x5eabc"] * 3


@pairs
def test_everyDamageIsNoticed(cipher: bytes, mac: bytes) -> None:
    """One changed bit anywhere: refused, or no packet yet because the length grew."""
    keys = Keys(cipher, mac)
    whole = b"".join(keys.sealer().seal(0, b"\x5e", b"some payload"))
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        inbound = Inbound()
        inbound.new_keys(keys.opener(), reset_sequence=True)
        try:
            assert openAll(inbound, bytes(damaged)) == []
        except ProtocolError:
            pass


@pairs
def test_replayIsNoticed(cipher: bytes, mac: bytes) -> None:
    """The same packet again is not by the peer."""
    keys = Keys(cipher, mac)
    packet = b"".join(keys.sealer().seal(0, b"\x5e", b"once"))
    inbound = Inbound()
    inbound.new_keys(keys.opener(), reset_sequence=True)
    assert openAll(inbound, packet) == [b"\x5eonce"]
    with pytest.raises(ProtocolError):
        openAll(inbound, packet)


@pairs
def test_sequenceWrap(cipher: bytes, mac: bytes) -> None:
    """After packet 2^32 - 1 comes packet 0."""
    keys = Keys(cipher, mac)
    outbound, inbound = Outbound(), Inbound()
    outbound.new_keys(keys.sealer(), reset_sequence=False)
    inbound.new_keys(keys.opener(), reset_sequence=False)
    outbound.sequence = inbound.sequence = 0xFFFFFFFE
    for _ in range(4):
        assert openAll(inbound, b"".join(outbound.seal(b"\x5e", b"data"))) == [b"\x5edata"]
    assert outbound.sequence == inbound.sequence == 2


def test_gcmNonceIsAnInvocationCounter() -> None:
    """RFC 5647 section 7.1: four fixed octets, and a counter of eight that wraps."""
    iv = b"abcd" + b"\xff" * 8
    sealer = GcmSealer(bytes(16), iv)
    opener = GcmOpener(bytes(16), iv)
    for _ in range(3):
        data = b"".join(sealer.seal(0, b"\x5e", b"x"))
        assert opener.open(data, 0, len(data) - 20, 0)[1:3] == b"\x5ex"


def test_bodyMayBeAView() -> None:
    """A slice of somebody's buffer is sealed without being kept."""
    for keys in (Keys(*pair) for pair in PAIRS):
        buffer = bytearray(b"0123456789")
        inbound = Inbound()
        inbound.new_keys(keys.opener(), reset_sequence=True)
        pieces = keys.sealer().seal(0, b"\x5e", memoryview(buffer)[2:5])
        buffer.clear()
        assert openAll(inbound, b"".join(pieces)) == [b"\x5e234"]
    buffer = bytearray(b"0123456789")
    assert b"234" in b"".join(PlainSealer().seal(0, b"\x5e", memoryview(buffer)[2:5]))


@pytest.mark.parametrize("length", [0, 1, 4, 5, 11, 13, 35001, 1 << 20, 0xFFFFFFFF])
def test_lengthOutOfBounds(length: int) -> None:
    """A length is judged by its first four bytes, before anything is waited for."""
    inbound = Inbound()
    with pytest.raises(ProtocolError, match="bad packet length"):
        openAll(inbound, length.to_bytes(4, "big"))


@pytest.mark.parametrize("padding", [0, 3, 11, 12, 255])
def test_paddingOutOfBounds(padding: int) -> None:
    """A packet has four bytes of padding, and something beside its padding."""
    inbound = Inbound()
    with pytest.raises(ProtocolError, match="bad padding length"):
        openAll(inbound, (12).to_bytes(4, "big") + bytes((padding,)) + bytes(11))


def test_idleHoldsNothing() -> None:
    """When all is parsed, no buffer is left behind."""
    inbound = Inbound()
    opener = PlainOpener()
    inbound.new_keys(opener, reset_sequence=True)
    packet = b"".join(PlainSealer().seal(0, b"\x5e", bytes(10000)))
    openAll(inbound, packet + packet[:7])
    assert len(inbound._buffer) == 7
    openAll(inbound, packet[7:])
    assert len(inbound._buffer) == 0


# --- the offer -------------------------------------------------------------------------------

GCM = (b"aes128-gcm@openssh.com", b"aes256-gcm@openssh.com")
CTR = (b"aes128-ctr", b"aes192-ctr", b"aes256-ctr")
ETM = (b"hmac-sha2-256-etm@openssh.com", b"hmac-sha2-512-etm@openssh.com")


def test_gcmClientsAreOfferedNothingElse() -> None:
    """They would choose what costs more."""
    offer = ciphers.offer([b"chacha20-poly1305@openssh.com", *CTR, *GCM], ETM)
    assert offer == ciphers.Offer(GCM, ETM)


def test_otherClientsAreOfferedTheRest() -> None:
    """Without AES-GCM the client's order decides among the others."""
    offer = ciphers.offer([b"aes128-ctr"], ETM)
    assert offer.ciphers == (b"chacha20-poly1305@openssh.com", *CTR)
    assert offer.macs == ETM


def test_plainMacsOnlyForWhoHasNoBetter() -> None:
    """hmac-sha2-256 appears in no offer but to a client without an etm form."""
    assert b"hmac-sha2-256" in ciphers.offer([b"aes128-ctr"], [b"hmac-sha2-256"]).macs
    assert b"hmac-sha2-256" not in ciphers.offer([b"aes128-ctr"], [b"hmac-sha2-256", *ETM]).macs
    assert b"hmac-sha2-256" not in ciphers.offer(None).macs


def test_unknownClientsAreOfferedAll() -> None:
    """One that waits for our KEXINIT finds something in it."""
    assert ciphers.offer(None).ciphers == (*GCM, b"chacha20-poly1305@openssh.com", *CTR)


def test_badTagHasItsReasonCode() -> None:
    """A forged packet ends the connection with MAC_ERROR."""
    assert BadTag().code == 5


def test_offerOfWhatIsAllowed() -> None:
    """An operator's choice narrows the offer, and nothing widens it."""
    allowed = ciphers.Offer((b"aes256-ctr", b"aes256-gcm@openssh.com"), ETM[1:])
    assert ciphers.offer(GCM, ETM, allowed) == ciphers.Offer(GCM[1:], ETM[1:])
    assert ciphers.offer([b"aes256-ctr", GCM[0]], ETM, allowed).ciphers == (b"aes256-ctr",)
    assert ciphers.offer([GCM[0]], ETM, allowed).ciphers == allowed.ciphers
    assert ciphers.offer(None, (), allowed) == allowed
    assert ciphers.offer([b"aes256-ctr"], [b"hmac-sha2-256"], allowed).macs == ETM[1:]
