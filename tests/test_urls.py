"""What people paste, and what it may mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conchkernel.errors import ConfigurationError
from conchkernel.jupyter.urls import (
    MAX_CANDIDATES,
    JupyterLocation,
    candidates,
    redact,
    spawn_page,
)

H = "http://host:8888"


@pytest.mark.parametrize(
    ("text", "token", "bases"),
    [
        (f"{H}/?token=abc", "abc", [H]),
        (f"{H}?token=abc", "abc", [H]),
        (f"{H}/lab?token=abc", "abc", [f"{H}/lab", H]),
        (f"{H}/tree", "", [f"{H}/tree", H]),
        (f"{H}/tree/", "", [f"{H}/tree", H]),
        (f"{H}/lab/tree/deep/down/in/x.ipynb", "", [f"{H}/lab", H]),
        (f"{H}/lab/workspaces/auto-B/tree/x.ipynb?token=a", "a", [f"{H}/lab", H]),
        (f"{H}/doc/tree/x.ipynb", "", [f"{H}/doc", H]),
        (f"{H}/notebooks/lab", "", [f"{H}/notebooks/lab", f"{H}/notebooks", H]),
        (f"{H}/api/kernels", "", [f"{H}/api/kernels", f"{H}/api", H]),
        (
            "https://hub.example.org/user/alice/lab",
            "",
            [
                "https://hub.example.org/user/alice/lab",
                "https://hub.example.org/user/alice",
                "https://hub.example.org/user",
                "https://hub.example.org",
            ],
        ),
        (
            f"{H}/user/lab/tree/x/y/z.ipynb",
            "",
            [
                f"{H}/user/lab/tree/x/y/z.ipynb",
                f"{H}/user/lab/tree/x/y",
                f"{H}/user/lab/tree/x",
                f"{H}/user/lab/tree",
                f"{H}/user/lab",
                f"{H}/user",
                H,
            ],
        ),
        ("https://kaggle.net/k/12/SECRET/proxy", "", ["https://kaggle.net/k/12/SECRET/proxy"]),
        ("https://kaggle.net/k/12/SECRET/proxy/lab", "", ["https://kaggle.net/k/12/SECRET/proxy"]),
        (f"{H}/lab#token=abc", "abc", [f"{H}/lab", H]),
        (f"{H}/?x=1&token=abc&reset", "abc", [H]),
        (f"{H}/?token=a%2Bb%3D", "a+b=", [H]),
        ("http://[::1]:8888/lab", "", ["http://[::1]:8888/lab", "http://[::1]:8888"]),
        ("HTTP://Host:8888/", "", [H]),
        ("http://host:80/", "", ["http://host"]),
        ("https://host:443/", "", ["https://host"]),
        ("https://host:80/", "", ["https://host:80"]),
        ("ws://host:8888/", "", [H]),
        (f"  '{H}/?token=abc'\n", "abc", [H]),
        (f"<{H}/>", "", [H]),
        (f"{H}//a//b", "", [f"{H}/a/b", f"{H}/a", H]),
        (f"{H}/user/al%40b", "", [f"{H}/user/al%40b", f"{H}/user", H]),
        (f"{H}/été", "", [f"{H}/%C3%A9t%C3%A9", H]),
        ("http://bücher.example/", "", ["http://xn--bcher-kva.example"]),
    ],
)
def test_whatIsPasted(text: str, token: str, bases: list[str]) -> None:
    """Bases come longest first, with the token of query or fragment."""
    assert candidates(text) == [JupyterLocation(base, token) for base in bases]


@pytest.mark.parametrize(
    ("text", "base"),
    [
        ("localhost", "http://localhost"),
        ("localhost:8888", "http://localhost:8888"),
        ("host:8888/lab", "http://host:8888"),
        ("host:443", "https://host"),
        ("127.0.0.1", "http://127.0.0.1"),
        ("10.0.0.7/?token=x", "http://10.0.0.7"),
        ("::1", "http://[::1]"),
        ("[::1]:8888", "http://[::1]:8888"),
        ("hub.example.org/user/a", "https://hub.example.org"),
        ("//hub.example.org", "https://hub.example.org"),
        ("hub.example.org/?token=a://b", "https://hub.example.org"),
    ],
)
def test_withoutScheme(text: str, base: str) -> None:
    """What has a port, is an address or this machine is asked in the clear, the rest over TLS."""
    assert candidates(text)[-1].base == base


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "''",
        "http://",
        "http:///?token=hunter2",
        "ftp://host/?token=hunter2",
        "http://host:99999/?token=hunter2",
        "http://host:0/?token=hunter2",
        "http://host:port/?token=hunter2",
        "http://[::1/?token=hunter2",
        "http://[hunter2]/",
        "http://user:hunter2@host/",
        "http://host/?token=hunter2 http://host/",
        "http://host/?token=hunter2%20more",
        "http://host/?token=hunter2%0d%0aX:y",
        "http://ho st/?token=hunter2",
        "http://ho<st/?token=hunter2",
        "http://host/" + "x" * 9000,
    ],
)
def test_whatIsNoUrl(text: str) -> None:
    """The refusal is one line and never shows what it refuses."""
    with pytest.raises(ConfigurationError) as caught:
        candidates(text)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@given(st.text(max_size=60), st.text(max_size=60))
def test_anythingPasted(host: str, rest: str) -> None:
    """Any text gives a bounded list of bases on one host, or the refusal."""
    for text in (host, f"http://{host}/{rest}", f"host/{rest}"):
        try:
            found = candidates(text)
        except ConfigurationError:
            continue
        assert 1 <= len(found) <= MAX_CANDIDATES
        assert len({one.host for one in found}) == 1
        for one in found:
            assert one.host
            assert not one.base.endswith("/")
            assert one.base.isascii()
            assert "?" not in one.base
            assert "#" not in one.base


def test_deepPaths() -> None:
    """A long path costs a bounded number of probes, and the root is among them."""
    found = candidates(f"{H}/" + "/".join("abcdefghijklmnopqrst"))
    assert len(found) == MAX_CANDIDATES
    assert found[-1].base == H


def test_locationHidesItsSecrets() -> None:
    """Neither a token nor a Kaggle path is seen in a repr."""
    location = JupyterLocation("https://kaggle.net/k/12/SECRET/proxy", "hunter2")
    assert "SECRET" not in repr(location)
    assert "hunter2" not in repr(location)
    assert "kaggle.net" in repr(location)


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        (f"at {H}/lab?token=abc&x=1 there", f"at {H}/lab?token=***&x=1 there"),
        (f"{H}/#token=abc", f"{H}/#token=***"),
        (f"{H}/?a=b&TOKEN=abc", f"{H}/?a=b&TOKEN=***"),
        ("/login?next=%2Flab%3Ftoken%3Dabc%26x", "/login?next=%2Flab%3Ftoken%3D***%26x"),
        ("https://k.net/k/1/SECRET/proxy/api", "https://k.net/k/1/***/proxy/api"),
        ("http://user:abc@proxy:3128", "http://***@proxy:3128"),
        ("Authorization: token abc", "Authorization: token ***"),
        ("{'Authorization': 'token abc'}", "{'Authorization': 'token ***'}"),
        ("no secret, not even a token", "no secret, not even a token"),
    ],
)
def test_redact(text: str, redacted: str) -> None:
    """Secrets are taken out of any text, the rest stays."""
    assert redact(text) == redacted


@pytest.mark.parametrize(
    ("base", "page"),
    [
        (f"{H}/user/ann", f"{H}/hub/spawn/ann"),
        (f"{H}/user/ann/gpu", f"{H}/hub/spawn/ann/gpu"),
        (f"{H}/a/user/user/b%2Fc", f"{H}/a/user/hub/spawn/b%2Fc"),
        (f"{H}/a/user/b/c/d", f"{H}/"),
        (f"{H}/elsewhere", f"{H}/"),
    ],
)
def test_spawnPage(base: str, page: str) -> None:
    """Where a hub starts a server, which is beside its users."""
    assert spawn_page(base) == page
