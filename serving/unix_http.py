"""HTTP on a Unix socket that only its owner opens."""

from __future__ import annotations

import logging
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

log = logging.getLogger(__name__)
SILENT_S = 5.0  # a connection may say nothing for so long


class UnixHandler(BaseHTTPRequestHandler):
    """Answers without a log; ``do_GET`` and ``do_POST`` are of those who derive from it."""

    timeout = SILENT_S

    def log_message(self, format: str, *args: object) -> None:
        """Not among the lines of Triton and Envoy."""

    def head(self, status: int, content_type: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.end_headers()

    def answer(self, status: int, body: bytes, content_type: str = "text/plain; charset=utf-8") -> None:
        self.head(status, content_type)
        self.wfile.write(body)


class UnixServer(ThreadingMixIn, UnixStreamServer):
    """Answers in threads of its own between ``start`` and ``stop``."""

    daemon_threads = True

    def __init__(self, path: Path, handler: type[UnixHandler]) -> None:
        super().__init__(str(path), handler)
        path.chmod(0o600)

    def get_request(self) -> tuple[Any, Any]:
        connection, _ = super().get_request()
        return connection, ("owner", 0)  # the handler's address; that of a Unix socket is empty

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One that hung up is no news; what else went wrong is."""
        if not isinstance(sys.exception(), OSError):
            log.exception("unix http")

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, name="unix http", daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
