"""What each cipher does to a packet: sealers and openers (RFC 4253 section 6).

Sans-IO: a sealer turns payloads into packets, an opener turns packets into plaintext; neither
knows of a connection. Each holds one direction's keys and is thrown away at the next NEWKEYS.
Bulk bytes go through cryptography's own OpenSSL only. Lengths, padding and sequence numbers are
checked and counted in :mod:`conchkernel.ssh.packets`; names are given in
:mod:`conchkernel.ssh.ciphers`.
"""

from __future__ import annotations

import hmac
import struct
from typing import Protocol

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.poly1305 import Poly1305

from conchkernel.ssh.fields import DisconnectCode, ProtocolError

Data = bytes | bytearray | memoryview

_length = struct.Struct(">L")
_pack_length = _length.pack
_unpack_length = _length.unpack_from

#: Padding lengths as the octet that announces them, and the padding itself. RFC 4253 section 6
#: wants random padding where it is seen; under a cipher with a fresh nonce zeros tell nothing,
#: and a system call per packet is a fifth of a small packet's cost.
_PADDING_OCTET = tuple(bytes((n,)) for n in range(256))
_PADDING = tuple(bytes(n) for n in range(256))

_MINIMUM_PADDING = 4
_NONCE_MASK = (1 << 64) - 1


class BadTag(ProtocolError):
    """A packet was not made by the holder of the keys."""

    def __init__(self) -> None:
        super().__init__("packet failed its integrity check", DisconnectCode.MAC_ERROR)


class Sealer(Protocol):
    """One direction's outgoing keys."""

    def seal(self, sequence: int, head: bytes, body: Data) -> tuple[bytes, ...]:
        """Make the packet whose payload is ``head`` followed by ``body``.

        :returns: pieces to be sent in this order. ``body`` is not kept.
        """
        ...


class RunSealer(Sealer, Protocol):
    """A sealer that makes many packets in one go."""

    def seal_run(self, head: bytes, body: Data, piece_bytes: int, out: memoryview) -> int:
        """Make packets whose payloads are ``head`` and the next ``piece_bytes`` of ``body``.

        :param body: a whole number of pieces.
        :param out: where the packets go; as large as the packets are.
        :returns: how many bytes they are.
        """
        ...


class Opener(Protocol):
    """One direction's incoming keys."""

    head_bytes: int
    """So many bytes of a packet tell its length."""
    tag_bytes: int
    """What follows the packet proper."""
    block_bytes: int
    """The length field, together with :attr:`counted_bytes`, is a multiple of this."""
    counted_bytes: int
    """4 where the length field itself is padded too, 0 where it stands outside."""

    def length(self, buffer: bytes | bytearray, offset: int, sequence: int) -> int:
        """The packet's length field, not checked. Asked once for a packet, before :meth:`open`."""
        ...

    def open(self, buffer: bytes | bytearray, offset: int, length: int, sequence: int) -> bytes:
        """What the packet at ``offset`` holds: padding length, payload, padding.

        :param length: what :meth:`length` gave; the whole packet with its tag is in ``buffer``.
        :raises BadTag: it was forged or damaged.
        """
        ...


class PlainSealer:
    """No protection: what is sent before the first NEWKEYS."""

    def seal(self, sequence: int, head: bytes, body: Data) -> tuple[bytes, ...]:
        size = 5 + len(head) + len(body)
        padding = 8 - size % 8
        if padding < _MINIMUM_PADDING:
            padding += 8
        return (
            _pack_length(size + padding - 4) + _PADDING_OCTET[padding] + head,
            bytes(body) + _PADDING[padding],
        )


class PlainOpener:
    """No protection: what is received before the first NEWKEYS."""

    head_bytes = 4
    tag_bytes = 0
    block_bytes = 8
    counted_bytes = 4

    def length(self, buffer: bytes | bytearray, offset: int, sequence: int) -> int:
        return int(_unpack_length(buffer, offset)[0])

    def open(self, buffer: bytes | bytearray, offset: int, length: int, sequence: int) -> bytes:
        return bytes(buffer[offset + 4 : offset + 4 + length])


class GcmSealer:
    """aes128-gcm@openssh.com and aes256-gcm@openssh.com (RFC 5647; OpenSSH's PROTOCOL 1.6)."""

    __slots__ = ("_counter", "_encrypt", "_encrypt_into", "_fixed")

    def __init__(self, key: bytes, iv: bytes) -> None:
        cipher = AESGCM(key)
        self._encrypt = cipher.encrypt
        self._encrypt_into = cipher.encrypt_into
        self._fixed = iv[:4]
        self._counter = int.from_bytes(iv[4:12], "big")

    def seal(self, sequence: int, head: bytes, body: Data) -> tuple[bytes, ...]:
        size = 1 + len(head) + len(body)
        padding = 16 - (size & 15)
        if padding < _MINIMUM_PADDING:
            padding += 16
        length = _pack_length(size + padding)
        counter = self._counter
        self._counter = (counter + 1) & _NONCE_MASK
        return length, self._encrypt(
            self._fixed + counter.to_bytes(8, "big"),
            b"".join((_PADDING_OCTET[padding], head, body, _PADDING[padding])),
            length,
        )


    def seal_run(self, head: bytes, body: Data, piece_bytes: int, out: memoryview) -> int:
        size = 1 + len(head) + piece_bytes
        padding = 16 - (size & 15)
        if padding < _MINIMUM_PADDING:
            padding += 16
        length = _pack_length(size + padding)
        start, end = _PADDING_OCTET[padding] + head, _PADDING[padding]
        encrypt, fixed, counter = self._encrypt_into, self._fixed, self._counter
        packet_bytes = 4 + size + padding + 16
        at = 0
        for begin in range(0, len(body), piece_bytes):
            packet = out[at : at + packet_bytes]
            packet[:4] = length
            encrypt(
                fixed + counter.to_bytes(8, "big"),
                b"".join((start, body[begin : begin + piece_bytes], end)),
                length,
                packet[4:],
            )
            counter = (counter + 1) & _NONCE_MASK
            at += packet_bytes
        self._counter = counter
        return at


class GcmOpener:
    """The receiving half of :class:`GcmSealer`."""

    __slots__ = ("_counter", "_decrypt", "_fixed")

    head_bytes = 4
    tag_bytes = 16
    block_bytes = 16
    counted_bytes = 0

    def __init__(self, key: bytes, iv: bytes) -> None:
        self._decrypt = AESGCM(key).decrypt
        self._fixed = iv[:4]
        self._counter = int.from_bytes(iv[4:12], "big")

    def length(self, buffer: bytes | bytearray, offset: int, sequence: int) -> int:
        return int(_unpack_length(buffer, offset)[0])

    def open(self, buffer: bytes | bytearray, offset: int, length: int, sequence: int) -> bytes:
        counter = self._counter
        self._counter = (counter + 1) & _NONCE_MASK
        start = offset + 4
        try:
            with memoryview(buffer) as view:
                return self._decrypt(
                    self._fixed + counter.to_bytes(8, "big"),
                    view[start : start + length + 16],
                    view[offset:start],
                )
        except InvalidTag:
            # Raised anew outside, so that no traceback holds the buffer that we must resize.
            pass
        raise BadTag


class _ChaCha:
    """The two key streams of chacha20-poly1305@openssh.com (OpenSSH's PROTOCOL.chacha20poly1305).

    The cipher contexts are made once and given a new nonce for each packet: making one costs as
    much as a whole small packet.
    """

    __slots__ = ("_body", "_head")

    def __init__(self, key: bytes) -> None:
        # For ChaCha20 both directions of the XOR are one, so an encryptor opens packets too.
        self._body = Cipher(algorithms.ChaCha20(key[:32], bytes(16)), None).encryptor()
        self._head = Cipher(algorithms.ChaCha20(key[32:64], bytes(16)), None).encryptor()

    def head(self, nonce: bytes, data: Data) -> bytes:
        """Encrypt or decrypt the length field."""
        self._head.reset_nonce(nonce)
        return self._head.update(data)

    def tag_key(self, nonce: bytes) -> bytes:
        """Block 0 of the body's key stream; :meth:`body` goes on with block 1."""
        self._body.reset_nonce(nonce)
        return self._body.update(_PADDING[64])[:32]

    def body(self, data: Data) -> bytes:
        """Encrypt or decrypt what follows the length field."""
        return self._body.update(data)


class ChaChaSealer:
    """chacha20-poly1305@openssh.com."""

    __slots__ = ("_streams",)

    def __init__(self, key: bytes, iv: bytes) -> None:
        self._streams = _ChaCha(key)

    def seal(self, sequence: int, head: bytes, body: Data) -> tuple[bytes, ...]:
        streams = self._streams
        size = 1 + len(head) + len(body)
        padding = 8 - (size & 7)
        if padding < _MINIMUM_PADDING:
            padding += 8
        nonce = sequence.to_bytes(16, "big")
        length = streams.head(nonce, _pack_length(size + padding))
        tag_key = streams.tag_key(nonce)
        packet = length + streams.body(
            b"".join((_PADDING_OCTET[padding], head, body, _PADDING[padding]))
        )
        return packet, Poly1305.generate_tag(tag_key, packet)


class ChaChaOpener:
    """The receiving half of :class:`ChaChaSealer`."""

    __slots__ = ("_streams",)

    head_bytes = 4
    tag_bytes = 16
    block_bytes = 8
    counted_bytes = 0

    def __init__(self, key: bytes, iv: bytes) -> None:
        self._streams = _ChaCha(key)

    def length(self, buffer: bytes | bytearray, offset: int, sequence: int) -> int:
        head = self._streams.head(sequence.to_bytes(16, "big"), bytes(buffer[offset : offset + 4]))
        return int.from_bytes(head, "big")

    def open(self, buffer: bytes | bytearray, offset: int, length: int, sequence: int) -> bytes:
        tag_key = self._streams.tag_key(sequence.to_bytes(16, "big"))
        end = offset + 4 + length
        try:
            with memoryview(buffer) as view:
                Poly1305.verify_tag(tag_key, view[offset:end], bytes(view[end : end + 16]))
                return self._streams.body(view[offset + 4 : end])
        except InvalidSignature:
            pass
        raise BadTag


class CtrEtmSealer:
    """AES-CTR (RFC 4344) with HMAC over the ciphertext (hmac-*-etm@openssh.com)."""

    __slots__ = ("_encrypt", "_mac")

    def __init__(self, key: bytes, iv: bytes, mac_key: bytes, digest: str) -> None:
        self._encrypt = Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor().update
        self._mac = hmac.new(mac_key, digestmod=digest)

    def seal(self, sequence: int, head: bytes, body: Data) -> tuple[bytes, ...]:
        size = 1 + len(head) + len(body)
        padding = 16 - (size & 15)
        if padding < _MINIMUM_PADDING:
            padding += 16
        length = _pack_length(size + padding)
        data = self._encrypt(b"".join((_PADDING_OCTET[padding], head, body, _PADDING[padding])))
        mac = self._mac.copy()
        mac.update(_pack_length(sequence) + length)
        mac.update(data)
        return length, data, mac.digest()


class CtrEtmOpener:
    """The receiving half of :class:`CtrEtmSealer`."""

    __slots__ = ("_decrypt", "_mac", "tag_bytes")

    head_bytes = 4
    block_bytes = 16
    counted_bytes = 0

    def __init__(self, key: bytes, iv: bytes, mac_key: bytes, digest: str) -> None:
        self._decrypt = Cipher(algorithms.AES(key), modes.CTR(iv)).decryptor().update
        self._mac = hmac.new(mac_key, digestmod=digest)
        self.tag_bytes = self._mac.digest_size

    def length(self, buffer: bytes | bytearray, offset: int, sequence: int) -> int:
        return int(_unpack_length(buffer, offset)[0])

    def open(self, buffer: bytes | bytearray, offset: int, length: int, sequence: int) -> bytes:
        end = offset + 4 + length
        mac = self._mac.copy()
        mac.update(_pack_length(sequence))
        with memoryview(buffer) as view:
            mac.update(view[offset:end])
            if not hmac.compare_digest(mac.digest(), view[end : end + self.tag_bytes]):
                raise BadTag
            return self._decrypt(view[offset + 4 : end])


class CtrSealer:
    """AES-CTR with HMAC over the plaintext (RFC 4253 section 6.4), for old clients only."""

    __slots__ = ("_encrypt", "_mac")

    def __init__(self, key: bytes, iv: bytes, mac_key: bytes, digest: str) -> None:
        self._encrypt = Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor().update
        self._mac = hmac.new(mac_key, digestmod=digest)

    def seal(self, sequence: int, head: bytes, body: Data) -> tuple[bytes, ...]:
        size = 5 + len(head) + len(body)
        padding = 16 - (size & 15)
        if padding < _MINIMUM_PADDING:
            padding += 16
        packet = b"".join(
            (
                _pack_length(size + padding - 4),
                _PADDING_OCTET[padding],
                head,
                body,
                _PADDING[padding],
            )
        )
        mac = self._mac.copy()
        mac.update(_pack_length(sequence))
        mac.update(packet)
        return self._encrypt(packet), mac.digest()


class CtrOpener:
    """The receiving half of :class:`CtrSealer`.

    The length is under the cipher, so the first block is decrypted before the MAC can be
    checked: :meth:`length` keeps it for :meth:`open`. CTR has no padding oracle in that.
    """

    __slots__ = ("_decrypt", "_first", "_mac", "tag_bytes")

    head_bytes = 16
    block_bytes = 16
    counted_bytes = 4

    def __init__(self, key: bytes, iv: bytes, mac_key: bytes, digest: str) -> None:
        self._decrypt = Cipher(algorithms.AES(key), modes.CTR(iv)).decryptor().update
        self._mac = hmac.new(mac_key, digestmod=digest)
        self._first = b""
        self.tag_bytes = self._mac.digest_size

    def length(self, buffer: bytes | bytearray, offset: int, sequence: int) -> int:
        self._first = self._decrypt(bytes(buffer[offset : offset + 16]))
        return int(_unpack_length(self._first)[0])

    def open(self, buffer: bytes | bytearray, offset: int, length: int, sequence: int) -> bytes:
        end = offset + 4 + length
        with memoryview(buffer) as view:
            packet = self._first + self._decrypt(view[offset + 16 : end])
            mac = self._mac.copy()
            mac.update(_pack_length(sequence))
            mac.update(packet)
            if not hmac.compare_digest(mac.digest(), view[end : end + self.tag_bytes]):
                raise BadTag
        return packet[4:]
