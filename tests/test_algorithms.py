"""An operator's choice of algorithms: what is left, and what is no choice."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from conchkernel.errors import ConfigurationError
from conchkernel.ssh.algorithms import Algorithms
from conchkernel.ssh.checkers import AnonymousOwnerChecker
from conchkernel.ssh.kex import METHODS, KexInit
from tests.rawclient import KEXINIT, VERSION, RawClient

STRONG = Algorithms(
    kexAlgorithms=(b"mlkem768x25519-sha256",), ciphers=(b"aes256-gcm@openssh.com",)
)
FULL = dataclasses.replace(
    KEXINIT,
    ciphers_in=(*KEXINIT.ciphers_in, b"aes256-gcm@openssh.com"),
    ciphers_out=(*KEXINIT.ciphers_out, b"aes256-gcm@openssh.com"),
)


def test_lessIsOffered() -> None:
    """Only what the operator has named, to a client that would take more."""
    raw = RawClient([AnonymousOwnerChecker()], algorithms=STRONG)
    raw.start(FULL)
    ours = KexInit.parse(raw.kexInit)
    assert ours.methods[0] == b"mlkem768x25519-sha256"
    assert b"curve25519-sha256" not in ours.methods
    assert ours.ciphers_in == ours.ciphers_out == (b"aes256-gcm@openssh.com",)
    raw.requestAuth()


def test_clientWithoutIt() -> None:
    """Is told what is missing."""
    raw = RawClient([AnonymousOwnerChecker()], algorithms=STRONG)
    raw.write(VERSION + b"\r\n")
    raw.sendKexInit(dataclasses.replace(FULL, methods=METHODS[1:]))
    assert raw.disconnected() == (3, b"no key exchange method in common")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"ciphers": (b"3des-cbc",)}, "no cipher 3des-cbc; choose of aes128-gcm"),
        ({"macs": (b"hmac-md5",)}, "no MAC hmac-md5"),
        ({"kexAlgorithms": (b"diffie-hellman-group1-sha1",)}, "no key exchange method"),
        ({"ciphers": ()}, "No cipher is left"),
    ],
)
def test_noChoice(given: Any, sentence: str) -> None:
    """Names that are not there, and none at all."""
    with pytest.raises(ConfigurationError, match=sentence):
        Algorithms(**given)
