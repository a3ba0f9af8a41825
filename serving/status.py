"""The status port: metrics, readiness and health of a server, for an orchestrator and for people."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

if TYPE_CHECKING:
    from serving.watchdog import Watchdog


class _Handler(WSGIRequestHandler):
    timeout = 5  # seconds that a connection may say nothing

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are not news."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


def status_app(watchdog: Watchdog) -> Callable[[dict[str, Any], Any], Iterable[bytes]]:
    """``/metrics``; ``/health``: every part as JSON; ``/ready``: the same, 503 unless all work; ``/live``: 200 while
    the supervisor itself works."""
    metrics = make_wsgi_app(watchdog.metrics.registry)

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path in ("/", "/metrics"):
            answer: Iterable[bytes] = metrics(environ, start_response)
            return answer
        good, body = True, watchdog.health.report()
        if path == "/ready":
            good = watchdog.health.ready
        elif path == "/live":
            good, body = watchdog.alive_itself(), {"live": watchdog.alive_itself()}
        elif path != "/health":
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"no such path; there are /metrics, /health, /ready and /live\n"]
        start_response("200 OK" if good else "503 Service Unavailable", [("Content-Type", "application/json")])
        return [json.dumps(body, indent=1).encode() + b"\n"]

    return app


def start_status_page(host: str, port: int, watchdog: Watchdog) -> None:
    """Answers until the process ends. A connection that says nothing is closed."""
    server = make_server(host, port, status_app(watchdog), _Server, _Handler)
    threading.Thread(target=server.serve_forever, name="status page", daemon=True).start()
