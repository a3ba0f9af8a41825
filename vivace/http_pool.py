"""HTTP/1.1 calls from any number of threads: a connection serves one call at a time and is kept for the next.

In the place of tritonclient's own HTTP transport, whose greenlets belong to the thread that made them: used from two
threads it hangs for ever (2.51).
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, IncompleteRead, RemoteDisconnected
from typing import Any

from vivace.client_errors import VivaceError

READ_BYTES = 1 << 16


@dataclass(frozen=True)
class HttpAnswer:
    status: int
    headers: Mapping[str, str]
    """By their names in lower case."""
    body: bytes


class HttpPool:
    """Calls of one ``url``, host:port. Raises TimeoutError where a call takes longer than it may, another OSError or
    HTTPException where it fails."""

    def __init__(self, url: str) -> None:
        host, _, port = url.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)
        self._idle: deque[HTTPConnection] = deque()  # the last one used comes first: the others may be closed
        self._closed = False

    def post(
        self, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float, method: str = "POST"
    ) -> HttpAnswer:
        deadline = time.monotonic() + timeout_s
        try:
            connection, used = self._idle.pop(), True
        except IndexError:
            connection, used = HTTPConnection(self._host, self._port), False
        while True:
            try:
                answer, again = _exchange(connection, method, path, body, headers, deadline)
            except (RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                connection.close()
                if not used:
                    raise
                connection, used = HTTPConnection(self._host, self._port), False  # the server had closed an idle one
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


def _exchange(
    connection: HTTPConnection, method: str, path: str, body: bytes, headers: Mapping[str, str], deadline: float
) -> tuple[HttpAnswer, bool]:
    """The answer, and whether the connection can be used again."""

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
    connection.request(method, path, body, dict(headers))
    sock.settimeout(left())
    response = connection.getresponse()
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

    def __init__(self, url: str) -> None:
        from tritonclient.http import InferenceServerClient

        self._pool, self._codec = HttpPool(url), InferenceServerClient

    def infer(self, model: str, inputs: list[Any], client_timeout: float, **more: Any) -> Any:
        body, json_bytes = self._codec.generate_request_body(inputs, **more)
        headers = {} if json_bytes is None else {"Inference-Header-Content-Length": str(json_bytes)}
        answer = self._pool.post(f"/v2/models/{model}/infer", body, headers, client_timeout)
        if answer.status != 200:
            raise _refused(answer.status, answer.body)
        length = answer.headers.get("inference-header-content-length")
        return self._codec.parse_response_body(answer.body, header_length=None if length is None else int(length))

    def get_model_config(self, model: str, client_timeout: float) -> dict[str, Any]:
        answer = self._pool.post(f"/v2/models/{model}/config", b"", {}, client_timeout, "GET")
        if answer.status != 200:
            raise _refused(answer.status, answer.body)
        config: dict[str, Any] = json.loads(answer.body)
        return config

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
