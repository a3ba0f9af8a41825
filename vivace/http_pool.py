"""HTTP/1.1 calls from any number of threads: a connection serves one call at a time and is kept for the next.

In the place of tritonclient's own HTTP transport, whose greenlets belong to the thread that made them: used from two
threads it hangs for ever (2.51).
"""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, IncompleteRead, RemoteDisconnected
from pathlib import Path
from typing import Any

from vivace.client_errors import VivaceError
from vivace.credentials import Credentials

ALERT_S = 0.5  # it is there already, or never
READ_BYTES = 1 << 16
UNIX = "unix:"  # before the path of a socket, in the place of host:port


@dataclass(frozen=True)
class HttpAnswer:
    status: int
    headers: Mapping[str, str]
    """By their names in lower case."""
    body: bytes


class UnixConnection(HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout_s: float | None = None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(str(self._path))
        except OSError:
            self.close()
            raise


class _TlsConnection(HTTPConnection):
    """As ``http.client.HTTPSConnection``, with a name of the server's that need not be the host's."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext, server_name: str) -> None:
        super().__init__(host, port)
        self._context, self._server_name = context, server_name or host

    def connect(self) -> None:
        super().connect()
        self.sock = self._context.wrap_socket(self.sock, server_hostname=self._server_name)


class HttpPool:
    """Calls of one ``url``, host:port or unix:/path/of/socket. Raises TimeoutError where a call takes longer than it
    may, another OSError or HTTPException where it fails."""

    def __init__(self, url: str, credentials: Credentials | None = None) -> None:
        self._url = url
        self._context = credentials.ssl_context() if credentials is not None else None
        self._server_name = credentials.server_name if credentials is not None else ""
        self._idle: deque[HTTPConnection] = deque()  # the last one used comes first: the others may be closed
        self._closed = False

    def _new(self) -> HTTPConnection:
        if self._url.startswith(UNIX):
            return UnixConnection(Path(self._url.removeprefix(UNIX)))
        host, _, port = self._url.rpartition(":")
        if self._context is None:
            return HTTPConnection(host.strip("[]"), int(port))
        return _TlsConnection(host.strip("[]"), int(port), self._context, self._server_name)

    def post(
        self, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float, method: str = "POST"
    ) -> HttpAnswer:
        deadline = time.monotonic() + timeout_s
        try:
            connection, used = self._idle.pop(), True
        except IndexError:
            connection, used = self._new(), False
        while True:
            try:
                answer, again = _exchange(connection, method, path, body, headers, deadline, not used)
            except (RemoteDisconnected, ConnectionResetError, BrokenPipeError, ssl.SSLEOFError):
                alert = None if used else _alert(connection)
                connection.close()
                if alert is not None:
                    raise alert from None
                if not used:
                    raise
                connection, used = self._new(), False  # the server had closed an idle one
            except BaseException:
                connection.close()
                raise
            else:
                self._keep(connection, again)
                return answer

    def _keep(self, connection: HTTPConnection, again: bool) -> None:
        if again:
            self._idle.append(connection)
        if self._closed or not again:
            connection.close()

    def close(self) -> None:
        self._closed = True
        while self._idle:
            self._idle.pop().close()


def _alert(connection: HTTPConnection) -> ssl.SSLError | None:
    """What the other side has against us by TLS, where it said so and closed the connection while we still wrote."""
    if not isinstance(connection.sock, ssl.SSLSocket):
        return None
    try:
        connection.sock.settimeout(ALERT_S)
        connection.sock.recv(1)
    except ssl.SSLError as error:
        return None if isinstance(error, ssl.SSLEOFError) else error
    except OSError:
        return None
    return None


def _exchange(
    connection: HTTPConnection, method: str, path: str, body: bytes, headers: Mapping[str, str], deadline: float,
    new: bool,
) -> tuple[HttpAnswer, bool]:  # fmt: skip
    """The answer, and whether the connection can be used again. ``new``: it was never used before, so what the other
    side said when it closed it while we still wrote is the answer."""

    def left() -> float:
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("timed out")
        return seconds

    if connection.sock is None:
        connection.timeout = left()
        connection.connect()
    sock = connection.sock
    sock.settimeout(left())
    closed: OSError | None = None
    try:
        connection.request(method, path, body, dict(headers))
    except (BrokenPipeError, ConnectionResetError) as error:
        if not new or isinstance(sock, ssl.SSLSocket):
            raise
        closed = error
    sock.settimeout(left())
    try:
        response = connection.getresponse()
    except (OSError, HTTPException):
        if closed is None:
            raise
        raise closed from None
    parts = []
    while part := response.read1(READ_BYTES):  # what is there: ``read`` would wait for all of it, however slow
        parts.append(part)
        sock.settimeout(left())
    response.close()  # ``read1`` does not, and the connection would wait for it
    if response.length:
        raise IncompleteRead(b"".join(parts), response.length)
    again = not response.will_close
    return HttpAnswer(
        response.status, {name.lower(): value for name, value in response.headers.items()}, b"".join(parts)
    ), again


class HttpClient:
    """The calls of tritonclient's HTTP client that are needed here, for any number of threads."""

    def __init__(self, url: str, credentials: Credentials | None = None) -> None:
        from tritonclient.http import InferenceServerClient

        self._pool, self._codec = HttpPool(url, credentials), InferenceServerClient

    def infer(
        self,
        model: str,
        inputs: list[Any],
        client_timeout: float,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Any:
        body, json_bytes = self._codec.generate_request_body(inputs, **more)
        length = {} if json_bytes is None else {"Inference-Header-Content-Length": str(json_bytes)}
        answer = self._pool.post(f"/v2/models/{model}/infer", body, {**length, **(headers or {})}, client_timeout)
        if answer.status != 200:
            raise _refused(answer.status, answer.body)
        head = answer.headers.get("inference-header-content-length")
        return self._codec.parse_response_body(answer.body, header_length=None if head is None else int(head))

    def get_model_config(
        self, model: str, client_timeout: float, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        answer = self._pool.post(f"/v2/models/{model}/config", b"", headers or {}, client_timeout, "GET")
        if answer.status != 200:
            raise _refused(answer.status, answer.body)
        config: dict[str, Any] = json.loads(answer.body)
        return config

    def is_model_ready(self, model: str, client_timeout: float, headers: Mapping[str, str] | None = None) -> bool:
        return self._pool.post(f"/v2/models/{model}/ready", b"", headers or {}, client_timeout, "GET").status == 200

    def close(self) -> None:
        self._pool.close()


def _refused(status: int, body: bytes) -> VivaceError:
    """An HTTP answer that is no result: the server's own words, where it has some."""
    text = body.decode(errors="replace")
    try:
        text = str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        text = text.strip()[:500] or "no reason given"
    return VivaceError(text, passing=status in (502, 503, 504) and "not stored" not in text)
