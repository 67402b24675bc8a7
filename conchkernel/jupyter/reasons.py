"""Why a server could not be reached, in one sentence that says what to do.

The one place that knows Twisted's, OpenSSL's and the HTTP client's exceptions by name; REST and
WebSocket both ask it.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from OpenSSL import SSL
from service_identity import VerificationError
from twisted.internet import defer, error
from twisted.python.failure import Failure
from twisted.web._newclient import ParseError
from twisted.web.client import RequestGenerationFailed, RequestTransmissionFailed, ResponseFailed

from conchkernel.errors import JupyterError, JupyterUnreachable, TLSRefused


def unreachable(problem: BaseException, url: str) -> JupyterError:
    """What went wrong between us and the server of ``url``, of which only the host is told.

    :param problem: what was raised; an error of ours is given back as it is.
    """
    problem = _innermost(problem)
    if isinstance(problem, JupyterError):
        return problem
    parts = urlsplit(url)
    host = parts.hostname or ""
    place = parts.netloc.rpartition("@")[2]
    if isinstance(problem, VerificationError):
        return TLSRefused(f"the certificate of {place} is for another name; check the URL")
    if isinstance(problem, SSL.Error):
        return TLSRefused(_tls(problem, place))
    return JupyterUnreachable(_sentence(problem, host, place, parts.scheme))


def _innermost(problem: BaseException) -> BaseException:
    """The cause inside the wrappers of the HTTP client."""
    for _ in range(8):
        if not isinstance(
            problem, (ResponseFailed, RequestTransmissionFailed, RequestGenerationFailed)
        ):
            break
        reasons = [
            one.value
            for one in problem.reasons
            if isinstance(one, Failure) and one.value is not None
        ]
        if not reasons:
            break
        # A certificate that was refused stands beside the lost connection that it caused.
        problem = next((one for one in reasons if isinstance(one, SSL.Error)), reasons[0])
    return problem


def _sentence(problem: BaseException, host: str, place: str, scheme: str) -> str:
    if isinstance(problem, (error.DNSLookupError, error.UnknownHostError)):
        return f"no host is called {host}; check the URL"
    if isinstance(problem, error.ConnectionRefusedError):
        return f"nothing listens at {place}; is the Jupyter server running?"
    if isinstance(
        problem,
        (
            defer.TimeoutError,
            defer.CancelledError,
            error.TimeoutError,
            error.TCPTimedOutError,
            error.ConnectingCancelledError,
        ),
    ):
        # A server without TLS waits for the end of what it takes for a request.
        hint = ", its https too," if scheme in ("https", "wss") else ""
        return f"{place} does not answer in time; check the URL{hint} and the network"
    if isinstance(problem, (error.ConnectionLost, error.ConnectionDone, error.ConnectionAborted)):
        return f"{place} closed the connection without an answer; is the URL's http(s) right?"
    if isinstance(problem, error.ConnectError):
        return f"{place} cannot be reached; check the URL and the network"
    if isinstance(problem, ParseError):
        return f"{place} does not speak HTTP; check the URL's port"
    return f"{place} could not be asked ({type(problem).__name__})"


def _tls(problem: SSL.Error, place: str) -> str:
    told = " ".join(str(word) for entry in problem.args[:1] for reason in entry for word in reason)
    if "verify failed" in told:
        return (
            f"the certificate of {place} is not from a known authority; "
            "name that authority's file with --jupyter-ca"
        )
    if "wrong version number" in told or "unknown protocol" in told or "packet length" in told:
        return f"{place} does not speak TLS; begin the URL with http://"
    return f"{place} and we do not agree on how to speak TLS"
