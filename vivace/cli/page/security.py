"""Who may speak to the page: a browser on this machine, about this page alone.

A stranger's page may send requests to 127.0.0.1 and, by a name of its own that leads there (DNS rebinding), even read
the answers. So every request must name this address in Host; what changes something must come from the page itself; and
the page may load from and send to nobody else (Content-Security-Policy).
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

HOSTS = ("127.0.0.1", "localhost")
MAX_BODY = 1 << 20
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def refusal(method: str, headers: Headers, port: int) -> tuple[int, str] | None:
    """(HTTP status, why) of a request that is not let through; None for one that is."""
    host = headers.get("host", "")
    if host not in {f"{name}:{port}" for name in HOSTS} | (set(HOSTS) if port == 80 else set()):
        return 403, f"Host: expected 127.0.0.1:{port} or localhost:{port}, got {host!r:.100}"
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return 403, "Sec-Fetch-Site: another site may not call this page"
    if method in ("GET", "HEAD"):
        return None
    if method != "POST":
        return 405, f"expected GET or POST, got {method}"
    if headers.get("origin") != f"http://{host}":
        return 403, f"Origin: expected http://{host}, got {headers.get('origin', 'none')!r:.100}"
    if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        return 415, "Content-Type: expected application/json"
    if not headers.get("content-length", "").isdecimal() or int(headers["content-length"]) > MAX_BODY:
        return 413, f"Content-Length: expected at most {MAX_BODY} bytes"
    return None


class OnlyThisPage:
    """ASGI middleware: refuses what ``refusal`` names, and adds HEADERS to every answer. ``port``: that of the page."""

    def __init__(self, app: Any, port: int) -> None:
        self._app, self._port = app, port

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        refused = refusal(scope["method"], Headers(scope=scope), self._port)
        answer = self._app if refused is None else JSONResponse({"error": refused[1]}, refused[0])
        await answer(scope, receive, with_headers)
