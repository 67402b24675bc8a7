"""The command line of ``twistd conchkernel``: what it takes, what it refuses, what comes of it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.application.service import IService
from twisted.cred.checkers import FilePasswordDB
from twisted.internet import reactor
from twisted.python.usage import UsageError
from zope.interface.verify import verifyObject

from conchkernel import tap
from conchkernel.errors import ConfigurationError
from conchkernel.names import URL_VARIABLE
from conchkernel.ssh.algorithms import Algorithms
from conchkernel.ssh.checkers import AnonymousOwnerChecker, AuthorizedKeysChecker, TokenChecker
from conchkernel.ssh.ciphers import CIPHERS
from conchkernel.ssh.limits import Limits
from conchkernel.values import LIMITS

URL = "http://127.0.0.1:8888/?token=sesame"


@pytest.fixture(autouse=True)
def cleanAccount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with nothing in it, and no gateway variables."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    return tmp_path


def parse(*arguments: str) -> tap.Options:
    """The options of a command line."""
    options = tap.Options()
    options.parseOptions(list(arguments))
    return options


def test_defaults(cleanAccount: Path) -> None:
    """A URL is all that must be said."""
    options = parse("--jupyter-url", URL)
    assert options["url"] == URL
    assert options["listen"] == ["tcp:2222:interface=127.0.0.1"]
    assert options["state-dir"] == cleanAccount / ".local" / "state" / "conchkernel"
    assert options["kernel-per"] == "user"
    assert options["orphan-timeout"] == 120
    assert options.limits() == Limits()


def test_describedDefaultsAreTrue() -> None:
    """What ``--help`` calls the default of a limit is its default."""
    for name, (fields, judge, description) in LIMITS.items():
        told = description.rpartition("(default: ")[2].rstrip(")").strip("'")
        assert parse("--jupyter-url", URL, f"--{name}", told).limits() == Limits(), name
        assert fields
        assert judge


def test_stateDirFollowsTheSpecification(monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG_STATE_HOME counts where it is absolute."""
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    assert parse("--jupyter-url", URL)["state-dir"] == Path("/somewhere/conchkernel")
    monkeypatch.setenv("XDG_STATE_HOME", "somewhere")
    assert parse("--jupyter-url", URL)["state-dir"].parts[-3:] == (".local", "state", "conchkernel")


def test_urlFromTheEnvironment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment keeps a token out of argv; an option outweighs it."""
    monkeypatch.setenv(URL_VARIABLE, URL)
    assert parse()["url"] == URL
    assert parse("--jupyter-url", "http://127.0.0.1:9/")["url"] == "http://127.0.0.1:9/"


def test_urlFromAFile(cleanAccount: Path) -> None:
    """A file does so too, with a line end or without."""
    path = cleanAccount / "url"
    path.write_text(f"{URL}\n")
    assert parse("--jupyter-url-file", str(path))["url"] == URL


def test_severalPortsAndEndpoints() -> None:
    """``--port`` is short for an endpoint on loopback; all that are given are listened on."""
    options = parse("--jupyter-url", URL, "-p", "0", "--listen", "unix:/tmp/gateway")
    assert options["listen"] == ["tcp:0:interface=127.0.0.1", "unix:/tmp/gateway"]


def test_limitsBySshdsNames() -> None:
    """Times and sizes have units as in sshd_config(5)."""
    options = parse(
        *("--jupyter-url", URL, "--login-grace-time", "2m", "--max-startups", "5"),
        *("--rekey-limit", "512M 30m", "--client-alive-interval", "1.5"),
    )
    limits = options.limits()
    assert limits.loginGraceTime == 120
    assert limits.maxStartups == (5, 100, 5)
    assert (limits.rekeyLimitBytes, limits.rekeyLimitSeconds) == (512 << 20, 1800)
    assert limits.clientAliveInterval == 1.5
    assert limits.maxSessions == Limits().maxSessions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90), ("600s", 600), ("10m", 600), ("1h30m", 5400), ("1H30", 3630), ("2w", 1209600),
        ("0", 0),
    ],
)  # fmt: skip
def test_timesAsSshdHasThem(text: str, expected: float) -> None:
    """TIME FORMATS of sshd_config(5): a sum of numbers with units."""
    limits = parse("--jupyter-url", URL, "--login-grace-time", text).limits()
    assert limits.loginGraceTime == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("64m", (64 << 20, 3600)), ("default none", (1 << 30, 0)), ("2G none", (2 << 30, 0)),
        ("default 1h30m", (1 << 30, 5400)),
    ],
)  # fmt: skip
def test_rekeyLimitAsSshdHasIt(text: str, expected: tuple[int, float]) -> None:
    """A size or ``default``, and a time or ``none``; the time is ours where it is left out."""
    limits = parse("--jupyter-url", URL, "--rekey-limit", text).limits()
    assert (limits.rekeyLimitBytes, limits.rekeyLimitSeconds) == expected


def test_penaltiesBySshdsNames() -> None:
    """On or off, or times by name; addresses are networks."""
    options = parse(
        *("--jupyter-url", URL, "--per-source-penalties", "authfail:1m grace-exceeded:5 max:1h"),
        *("--per-source-penalty-exempt-list", "192.0.2.0/24,2001:db8::1"),
        *("--per-source-net-block-size", "24:64", "--per-source-max-startups", "3"),
    )
    limits = options.limits()
    rules = limits.perSourcePenalties
    assert (rules.authfail, rules.graceExceeded, rules.max, rules.noauth) == (60, 5, 3600, 1)
    assert limits.perSourcePenaltyExemptList == ("192.0.2.0/24", "2001:db8::1/128")
    assert (limits.perSourceNetBlockSize, limits.perSourceMaxStartups) == ((24, 64), 3)
    off = parse("--jupyter-url", URL, "--per-source-penalties", "no").limits()
    assert not off.perSourcePenalties.enabled


@pytest.mark.parametrize(
    ("text", "ciphers"),
    [
        ("aes256-ctr,aes128-gcm@openssh.com", (b"aes256-ctr", b"aes128-gcm@openssh.com")),
        ("-*-ctr,chacha20*", (b"aes128-gcm@openssh.com", b"aes256-gcm@openssh.com")),
        ("+aes128-ctr", tuple(CIPHERS)),
        ("^aes256-*", (b"aes256-gcm@openssh.com", b"aes256-ctr")),
    ],
)
def test_algorithmsBySshdsSyntax(text: str, ciphers: tuple[bytes, ...]) -> None:
    """Names as they are, left out, or put first; what is not named stays what it is."""
    chosen = parse("--jupyter-url", URL, "--ciphers", text).algorithms()
    assert chosen.ciphers[: len(ciphers)] == ciphers
    assert len(chosen.ciphers) == (len(CIPHERS) if text[0] in "+^" else len(ciphers))
    assert chosen.macs == Algorithms().macs
    assert parse("--jupyter-url", URL).algorithms() == Algorithms()


def test_whatTheFactoryIsTold(cleanAccount: Path) -> None:
    """Banner, certificate, methods and algorithms reach the connections."""
    banner = cleanAccount / "banner"
    banner.write_text("Authorized use only.\n")
    for name, more in (("ca", []), ("host", []), ("host", ["-s", "ca", "-h", "-I", "gateway"])):
        new = ["-f", name, "-t", "ed25519", "-N", ""] if not more else [*more, f"{name}.pub"]
        subprocess.run(["ssh-keygen", "-q", *new], cwd=cleanAccount, check=True)
    service: Any = tap.makeService(
        parse(
            *("--jupyter-url", URL, "--port", "0", "--banner", str(banner)),
            *("--host-key", str(cleanAccount / "host")),
            *("--host-certificate", str(cleanAccount / "host-cert.pub")),
            *("--authentication-methods", "publickey,password publickey,publickey"),
            *("--ciphers", "aes128-ctr", "--kex-algorithms", "curve25519-sha256"),
        ),
        reactor=reactor,
    )
    factory = service._factory._factory
    assert factory.banner == b"Authorized use only.\n"
    assert list(factory.hostKeys) == [b"ssh-ed25519-cert-v01@openssh.com", b"ssh-ed25519"]
    assert factory.authenticationMethods == (
        (b"publickey", b"password"),
        (b"publickey", b"publickey"),
    )
    assert factory.algorithms == Algorithms((b"curve25519-sha256",), (b"aes128-ctr",))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--banner", "large"], "banner .*large has more than 32768 bytes"),
        (["--host-certificate", "large"], "large is not a host certificate"),
        (["--authentication-methods", "none"], "Nobody could log in by none"),
    ],
)
def test_whatTheFactoryIsNotTold(
    cleanAccount: Path, arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only its use can show to be wrong is one sentence too."""
    monkeypatch.chdir(cleanAccount)
    (cleanAccount / "large").write_text("x" * 40000)
    options = parse("--jupyter-url", URL, "--port", "0", *arguments)
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        tap.makeService(options, reactor=reactor)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "which Jupyter"),
        (["--jupyter-url", ""], "which Jupyter"),
        (["--jupyter-url", URL, "--jupyter-url-file", "x"], "not both"),
        (["--jupyter-url-file", "/nonexistent/url"], "No such file"),
        (["--jupyter-url", "ftp://127.0.0.1/?token=sesame"], "the Jupyter URL"),
        (["--jupyter-url", URL, "--port", "65536"], "--port: '65536'"),
        (["--jupyter-url", URL, "--port", "ssh"], "--port: 'ssh'"),
        (["--jupyter-url", URL, "--kernel-per", "host"], "--kernel-per: 'host'"),
        (["--jupyter-url", URL, "--working-dir", "work"], "--working-dir: 'work'"),
        (["--jupyter-url", URL, "--shell", "bash"], "--shell: 'bash'"),
        (["--jupyter-url", URL, "--orphan-timeout", "-1"], "--orphan-timeout: '-1'"),
        (["--jupyter-url", URL, "--orphan-timeout", "nan"], "--orphan-timeout: 'nan'"),
        (["--jupyter-url", URL, "--login-grace-time", "soon"], "--login-grace-time: 'soon'"),
        (["--jupyter-url", URL, "--login-grace-time", "1m30x"], "--login-grace-time: '1m30x'"),
        (["--jupyter-url", URL, "--login-grace-time", ""], "--login-grace-time: ''"),
        (["--jupyter-url", URL, "--max-sessions", "0"], "--max-sessions: '0'"),
        (["--jupyter-url", URL, "--max-startups", "9:0:9"], "--max-startups: '9:0:9'"),
        (["--jupyter-url", URL, "--rekey-limit", "1K"], "--rekey-limit: '1K'"),
        (["--jupyter-url", URL, "--max-auth-tries", "none"], "--max-auth-tries: 'none'"),
        (["--jupyter-url", URL, "--per-source-max-startups", "0"], "-startups: '0'"),
        (["--jupyter-url", URL, "--per-source-net-block-size", "33"], "-block-size: '33'"),
        (["--jupyter-url", URL, "--per-source-penalties", "maybe"], "-penalties: 'maybe'"),
        (["--jupyter-url", URL, "--per-source-penalties", "authfail:x"], "-penalties: 'x'"),
        (["--jupyter-url", URL, "--per-source-penalties", ""], "-penalties: it is empty"),
        (["--jupyter-url", URL, "--per-source-penalty-exempt-list", "host"], "-list: 'host'"),
        (["--jupyter-url", URL, "--required-rsa-size", "512"], "--required-rsa-size: '512'"),
        (["--jupyter-url", URL, "--ciphers", "aes128-cbc"], "--ciphers: 'aes128-cbc'"),
        (["--jupyter-url", URL, "--ciphers", "-*"], "--ciphers: '-*' leaves nothing"),
        (["--jupyter-url", URL, "--macs", "-hmac-md5"], "--macs: 'hmac-md5'"),
        (["--jupyter-url", URL, "--kex-algorithms", ""], "--kex-algorithms: ''"),
        (["--jupyter-url", URL, "--authentication-methods", "password,key"], "-methods: 'key'"),
        (["--jupyter-url", URL, "--authentication-methods", " "], "-methods: it is empty"),
        (["--jupyter-url", URL, "--banner", "/nonexistent"], "no file /nonexistent"),
        (["--jupyter-url", URL, "--host-certificate", "/nonexistent"], "no file /nonexistent"),
        (["--jupyter-url", URL, "--log-level", "loud"], "--log-level: 'loud'"),
        (["--jupyter-url", URL, "--accept-env", "A=B"], "--accept-env: 'A=B'"),
        (["--jupyter-url", URL, "--host-key", "/nonexistent"], "no file /nonexistent"),
        (["--jupyter-url", URL, "--authorized-keys", "/nonexistent"], "no file /nonexistent"),
        (["--jupyter-url", URL, "--jupyter-ca", "/nonexistent"], "no file /nonexistent"),
        (["--jupyter-url", URL, "--auth", "nonsense"], "Auth plugin not recognized"),
        (["--jupyter-url", URL, "--auth", "file:/nonexistent"], "no file /nonexistent"),
        (["--jupyter-url", URL, "--auth", "memory"], "memory needs users"),
        (["--jupyter-url", URL, "--auth", "memory:a:b", "--auth", "unix"], "unix judges passwords"),
        (
            ["--jupyter-url", URL, "--auth", "memory:a:b", "--auth", "memory:c:d"],
            "--auth: memory judges passwords, and so does another",
        ),
        (["--jupyter-url", URL, "--auth", "anonymous:ann"], "anonymous takes no argument"),
        (["--jupyter-url", URL, "--auth", "unix:ann"], "unix takes no argument"),
        (["--jupyter-url", URL, "--unknown"], "--unknown"),
        ([URL], "--jupyter-url"),
    ],
)
def test_wrongValuesAreRefused(
    capfd: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    """Each in one line that names it and never the token."""
    with pytest.raises(UsageError) as caught:
        parse(*arguments)
    line = str(caught.value)
    assert complaint in line
    assert "\n" not in line
    assert "sesame" not in line
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("endpoint", "closed"),
    [
        ("tcp:2222:interface=127.0.0.1", True),
        ("tcp:2222:127.8.8.8", True),
        ("tcp:port=2222:interface=127.0.0.1", True),
        (r"tcp6:2222:interface=\:\:1", True),
        ("haproxy:tcp:2222:interface=127.0.0.1", True),
        ("unix:/run/gateway", True),
        ("tcp:2222", False),
        ("tcp:2222:interface=0.0.0.0", False),
        ("tcp:2222:interface=192.0.2.1", False),
        ("tcp:2222:interface=example.com", False),
        ("tcp6:2222", False),
        ("haproxy:tcp:2222", False),
        ("systemd:domain=INET:index=0", False),
        ("fd:3", False),
    ],
)
def test_anonymousStaysOnThisHost(endpoint: str, closed: bool) -> None:
    """Without a check of who comes, only what is known to be loopback is listened on, unless
    the operator says so in so many words."""
    arguments = ["--jupyter-url", URL, "--auth", "anonymous", "--listen", endpoint]
    if closed:
        parse(*arguments)
    else:
        with pytest.raises(UsageError, match="--i-know-this-is-open"):
            parse(*arguments)
    parse(*arguments, "--i-know-this-is-open")


def test_defaultCheckers(cleanAccount: Path) -> None:
    """Keys of the account, and the token where the URL has one."""
    kinds = [type(one) for one in tap._checkers(parse("--jupyter-url", URL))]
    assert kinds == [AuthorizedKeysChecker, TokenChecker]
    kinds = [type(one) for one in tap._checkers(parse("--jupyter-url", "http://127.0.0.1:8888/"))]
    assert kinds == [AuthorizedKeysChecker]


def test_authReplacesTheDefaults(cleanAccount: Path) -> None:
    """What is given by ``--auth`` is all there is."""
    users = cleanAccount / "users"
    users.write_text("ann:secret\n")
    checkers = tap._checkers(parse("--jupyter-url", URL, "--auth", f"file:{users}"))
    assert [type(one) for one in checkers] == [FilePasswordDB]
    (checker,) = tap._checkers(parse("--jupyter-url", URL, "--auth", "memory:ann:secret"))
    assert checker.users == {b"ann": b"secret"}  # type: ignore[attr-defined]
    checkers = tap._checkers(parse("--jupyter-url", URL, "--auth", "anonymous"))
    assert [type(one) for one in checkers] == [AnonymousOwnerChecker]


def test_startsAheadWhatEverybodyShares() -> None:
    """A kernel is started ahead where it is known whose it will be."""
    for more, known in (
        ([], True),
        (["--auth", "anonymous"], True),
        (["--auth", "memory:ann:secret"], False),
        (["--kernel-per", "connection"], False),
    ):
        assert tap._hasOneKernel(parse("--jupyter-url", URL, *more)) == known


def test_badEndpoint() -> None:
    """Only the reactor's plugins know every kind of endpoint, so the service's maker complains."""
    for endpoint in ("nonsense:1", "tcp:", "tcp:1:2:3:4:5", "tcp:http"):
        options = parse("--jupyter-url", URL, "--listen", endpoint)
        with pytest.raises(ConfigurationError, match=f"--listen {endpoint}"):
            tap.makeService(options, reactor=reactor)


@pytest_twisted.ensureDeferred
async def test_makeServiceTouchesOnlyTheStateDirectory(cleanAccount: Path) -> None:
    """A service is made with its host key on disk, and nothing is listened on yet."""
    service: Any = tap.makeService(parse("--jupyter-url", URL, "--port", "0"), reactor=reactor)
    verifyObject(IService, service)
    assert not service.ports
    state = cleanAccount / ".local" / "state" / "conchkernel"
    (key,) = state.iterdir()
    assert state.stat().st_mode & 0o077 == 0
    assert key.stat().st_mode & 0o077 == 0
    before = key.read_bytes()
    tap.makeService(parse("--jupyter-url", URL, "--port", "0"), reactor=reactor)
    assert key.read_bytes() == before
