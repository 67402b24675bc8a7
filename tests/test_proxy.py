"""Which road a connection takes, and that the roads lead somewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import LogEvent, globalLogPublisher

from conchkernel.errors import ConfigurationError, JupyterUnreachable
from conchkernel.jupyter.proxy import Proxy, RoadAgent, TrustPolicy, make_agent, proxy_for
from conchkernel.jupyter.rest import JupyterClient
from conchkernel.jupyter.urls import JupyterLocation
from tests.roads import Authority, proxying, terminating

if TYPE_CHECKING:
    from pathlib import Path

    from tests.jupyters import RunningJupyter

P = {"http_proxy": "http://plain:3128", "https_proxy": "http://secure:3128"}


@pytest.mark.parametrize(
    ("scheme", "environment", "proxy"),
    [
        ("http", {}, None),
        ("http", P, Proxy("plain", 3128)),
        ("ws", P, Proxy("plain", 3128)),
        ("https", P, Proxy("secure", 3128)),
        ("wss", P, Proxy("secure", 3128)),
        ("https", {"HTTPS_PROXY": "secure:3128"}, Proxy("secure", 3128)),
        ("https", {"HTTPS_PROXY": "secure"}, Proxy("secure", 1080)),
        ("https", {"ALL_PROXY": "any:1"}, Proxy("any", 1)),
        ("https", {"HTTP_PROXY": "plain:1"}, None),
        ("https", {"https_proxy": "small:1", "HTTPS_PROXY": "large:1"}, Proxy("small", 1)),
        ("https", {"https_proxy": "https://tls"}, Proxy("tls", 443, True)),
        ("https", {"https_proxy": " "}, None),
        (
            "https",
            {"https_proxy": "http://me:p%40ss@secure:1"},
            Proxy("secure", 1, False, b"Basic bWU6cEBzcw=="),
        ),
        ("https", {"https_proxy": "[::1]:1"}, Proxy("::1", 1)),
    ],
)
def test_environment(scheme: str, environment: dict[str, str], proxy: Proxy | None) -> None:
    """The variables, both spellings, the small one first."""
    assert proxy_for(scheme, "jupyter.example.org", 8888, environment) == proxy


@pytest.mark.parametrize(
    ("exceptions", "host", "straight"),
    [
        ("*", "jupyter.example.org", True),
        ("example.org", "jupyter.example.org", True),
        (".example.org", "jupyter.example.org", True),
        (".example.org", "example.org", True),
        ("EXAMPLE.org", "jupyter.Example.ORG.", True),
        ("ample.org", "jupyter.example.org", False),
        ("jupyter.example.org", "example.org", False),
        ("a, example.org b", "example.org", True),
        ("a b,example.org", "example.org", True),
        ("example.org:8888", "example.org", True),
        ("example.org:8889", "example.org", False),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.0.0.0/99", "10.1.2.3", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("2.3", "10.1.2.3", False),
        ("2001:db8::/32", "2001:db8::1", True),
        ("[2001:db8::1]", "2001:db8::1", True),
        ("[2001:db8::1]:8888", "2001:db8::1", True),
        ("[2001:db8::1]:1", "2001:db8::1", False),
        ("", "example.org", False),
        (",.,:,", "example.org", False),
    ],
)
def test_noProxy(exceptions: str, host: str, straight: bool) -> None:
    """Exceptions as curl reads them."""
    for name in ("no_proxy", "NO_PROXY"):
        found = proxy_for("http", host, 8888, {**P, name: exceptions})
        assert (found is None) == straight


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "127.0.0.1", "127.8.8.8", "::1"])
def test_loopbackIsNear(host: str) -> None:
    """This machine is never asked through a proxy, whatever the environment says."""
    assert proxy_for("http", host, 8888, P) is None


@pytest.mark.parametrize(
    "value", ["socks5://host:1", "http://", "http://host:port", "http://me:hunter2@host:99999"]
)
def test_impossibleProxies(value: str) -> None:
    """The refusal names the variable and not its value."""
    with pytest.raises(ConfigurationError, match="HTTPS_PROXY") as caught:
        proxy_for("https", "example.org", 443, {"HTTPS_PROXY": value})
    assert "hunter2" not in str(caught.value)


def test_proxyHidesItsPassword() -> None:
    """Not in a repr either."""
    assert "hunter2" not in repr(Proxy("host", 1, False, b"hunter2"))


def client(url: str, jupyter: RunningJupyter, agent: RoadAgent) -> JupyterClient:
    """A client of a server that is found at another URL."""
    return JupyterClient(reactor, JupyterLocation(url, jupyter.token), agent)


def portOf(jupyter: RunningJupyter) -> int:
    """The port of a server."""
    return int(jupyter.url.rstrip("/").rpartition(":")[2])


@pytest_twisted.ensureDeferred
async def test_throughProxy(currentJupyter: RunningJupyter) -> None:
    """CONNECT with the credentials, once for several requests, to a host only the proxy knows."""
    async with proxying(reactor) as (proxy, port):
        environment = {"HTTP_PROXY": f"http://me:p%40ss@127.0.0.1:{port}"}
        agent = RoadAgent(reactor, TrustPolicy(), environment)
        there = client(f"http://jupyter.test:{portOf(currentJupyter)}", currentJupyter, agent)
        assert await there.version()
        assert await there.kernelspecs()
        await agent.close()
    (head,) = proxy.heard
    assert head.startswith(f"CONNECT jupyter.test:{portOf(currentJupyter)} HTTP/1.1\r\n")
    assert "\r\nProxy-Authorization: Basic bWU6cEBzcw==" in head
    assert currentJupyter.token not in head


@pytest_twisted.ensureDeferred
async def test_tlsAndProxies(currentJupyter: RunningJupyter, tmp_path: Path) -> None:
    """TLS to the server inside of TLS to the proxy, all certificates from a private authority."""
    authority = Authority(tmp_path)
    server = authority.certify("jupyter.test")
    options = authority.certify("127.0.0.1")
    async with (
        terminating(reactor, server, portOf(currentJupyter)) as secure,
        proxying(reactor, options=options) as (proxy, port),
    ):
        environment = {"HTTPS_PROXY": f"https://127.0.0.1:{port}"}
        agent = RoadAgent(reactor, TrustPolicy(authority.file), environment)
        assert await client(f"https://jupyter.test:{secure}", currentJupyter, agent).version()
        await agent.close()
    assert len(proxy.heard) == 1


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b"HTTP/1.1 407 Who?\r\n\r\n", "wants a user name and password"),
        (b"HTTP/1.0 403 No\r\nX: y\r\n\r\n", r"refused to connect .* \(HTTP 403\)"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "is not an HTTP proxy"),
        (b"HTTP/1.1\r\n\r\n", "is not an HTTP proxy"),
        (b"HTTP/1.1 twohundred\r\n\r\n", "is not an HTTP proxy"),
        (b"HTTP/1.1 200 Fine\r\n", "the proxy closed the connection"),
        (b"HTTP/1.1 200 Fine\r\nX: " + b"x" * 40000, "too long"),
        (b"", "the proxy closed the connection"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_proxyRefuses(answer: bytes, sentence: str) -> None:
    """What a proxy says instead of connecting is told in one sentence."""
    async with proxying(reactor, answer) as (_, port):
        agent = RoadAgent(reactor, TrustPolicy(), {"HTTP_PROXY": f"http://me:pw@127.0.0.1:{port}"})
        there = JupyterClient(reactor, JupyterLocation("http://jupyter.test", "hunter2"), agent)
        with pytest.raises(JupyterUnreachable, match=sentence) as caught:
            await there.version()
        assert "hunter2" not in str(caught.value)
        await agent.close()


@pytest.mark.parametrize("proxy", ["127.0.0.1:1", "no.such.host.invalid:1"])
@pytest_twisted.ensureDeferred
async def test_proxyIsNotThere(proxy: str) -> None:
    """That is said of the proxy, not of the server behind it."""
    agent = RoadAgent(reactor, TrustPolicy(), {"http_proxy": proxy})
    client = JupyterClient(reactor, JupyterLocation("http://jupyter.invalid:8888"), agent)
    with pytest.raises(JupyterUnreachable, match="the proxy cannot be reached"):
        await client.version()
    await agent.close()


@pytest_twisted.ensureDeferred
async def test_silentProxyIsLeft() -> None:
    """Whoever waits for a proxy may stop waiting; the connection goes with that."""
    async with proxying(reactor, b"HTTP/1.1 200", hangsUp=False) as (_, port):
        agent = RoadAgent(reactor, TrustPolicy(), {"HTTP_PROXY": f"http://127.0.0.1:{port}"})
        there = JupyterClient(reactor, JupyterLocation("http://jupyter.test"), agent)
        with pytest.raises(JupyterUnreachable, match="does not answer in time"):
            await there.call("GET", "/api", seconds=0.2)
        await agent.close()


@pytest_twisted.ensureDeferred
async def test_certificates(currentJupyter: RunningJupyter, tmp_path: Path) -> None:
    """A private authority's servers are believed if its file is named, and only under their
    names; the sentence says what to do."""
    authority = Authority(tmp_path)
    port = portOf(currentJupyter)
    good, wrong = authority.certify("127.0.0.1"), authority.certify("other.test")
    trusting, plain = make_agent(reactor, authority.file), make_agent(reactor)
    async with terminating(reactor, good, port) as right, terminating(reactor, wrong, port) as left:
        assert await client(f"https://127.0.0.1:{right}", currentJupyter, trusting).version()
        with pytest.raises(JupyterUnreachable, match="--jupyter-ca"):
            await client(f"https://127.0.0.1:{right}", currentJupyter, plain).version()
        with pytest.raises(JupyterUnreachable, match="is for another name"):
            await client(f"https://127.0.0.1:{left}", currentJupyter, trusting).version()
        await trusting.close()
        await plain.close()


@pytest_twisted.ensureDeferred
async def test_requestsAreNotLogged(currentJupyter: RunningJupyter) -> None:
    """A keep-alive is no news, and a connection for it none either."""
    events: list[LogEvent] = []
    globalLogPublisher.addObserver(events.append)
    try:
        agent = make_agent(reactor)
        await client(currentJupyter.url.rstrip("/"), currentJupyter, agent).version()
        await agent.close()
    finally:
        globalLogPublisher.removeObserver(events.append)
    assert [e for e in events if e["log_namespace"].startswith("twisted.web.client")] == []


class Plain(Protocol):
    """A server that greets in the clear."""

    def connectionMade(self) -> None:
        """Greet, as an HTTP server does that was sent what is not HTTP."""
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        self.transport.loseConnection()


@pytest_twisted.ensureDeferred
async def test_notTls() -> None:
    """https:// where there is none."""
    listening = reactor.listenTCP(0, Factory.forProtocol(Plain), interface="127.0.0.1")
    location = JupyterLocation(f"https://127.0.0.1:{listening.getHost().port}")
    agent = make_agent(reactor)
    with pytest.raises(JupyterUnreachable, match="begin the URL with http://"):
        await JupyterClient(reactor, location, agent).version()
    await agent.close()
    await listening.stopListening()


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_impossibleAuthorities(content: bytes | None, tmp_path: Path) -> None:
    """A file that is absent, empty or something else is refused at once."""
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigurationError, match="--jupyter-ca"):
        make_agent(reactor, file)
