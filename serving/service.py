"""``vivace serve``: the server and its watchdog until a signal comes."""

from __future__ import annotations

import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from types import FrameType
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import tritonclient.grpc as grpcclient
from prometheus_client import CollectorRegistry, make_wsgi_app

from serving.launcher import ServerOptions, TritonServer
from serving.start_checks import check_ports
from serving.watchdog import Metrics, Watchdog
from serving.wheel import ServerError
from vivace import contract
from vivace.client import inputs_of, request_tensors

WARM_AT_ONCE = 256  # requests in the server at one time, about what its queues hold
WARM_EVENTS = 200
WARM_S = 20.0


def warm_up(server: TritonServer) -> float:
    """Answers requests of someone unknown, many at once, before anyone else asks: buffers then have the size that they
    have under load, and the first users wait no longer than others. Returns the seconds it took.

    What they are answered or refused does not matter; after ``WARM_S`` no more is waited for."""
    started, left, done = time.monotonic(), threading.Semaphore(0), 0
    question = inputs_of(grpcclient, request_tensors(history=["-"] * WARM_EVENTS))
    with grpcclient.InferenceServerClient(f"{server.host}:{server.grpc_port}") as client:
        for _ in range(WARM_AT_ONCE):
            client.async_infer(contract.ENSEMBLE, question, lambda result, error: left.release(), client_timeout=WARM_S)
        while done < WARM_AT_ONCE and left.acquire(timeout=max(0.0, started + WARM_S - time.monotonic())):
            done += 1
    return time.monotonic() - started


@contextmanager
def service(options: ServerOptions, say: Callable[[str], None]) -> Iterator[tuple[TritonServer, Watchdog]]:
    """A ready server with its watchdog; nothing is left when the block ends."""
    with TritonServer(options) as server, Watchdog(server, Metrics(), on_event=say) as watchdog:
        yield server, watchdog


class _StatusHandler(WSGIRequestHandler):
    timeout = 5  # seconds that a connection may say nothing

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are not news."""


class _StatusServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True


def start_status_page(host: str, port: int, registry: CollectorRegistry) -> None:
    """Prometheus metrics of the watchdog, until the process ends. A connection that says nothing is closed."""
    server = make_server(host, port, make_wsgi_app(registry), _StatusServer, _StatusHandler)
    threading.Thread(target=server.serve_forever, name="status page", daemon=True).start()


def raise_descriptor_limit() -> None:
    """As many open files as the system lets this process have: connections are files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def interrupt_on_signals() -> None:
    """SIGINT and SIGTERM raise KeyboardInterrupt once; a second one does not cut the clean-up short."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


def run_until_signal(
    options: ServerOptions, status_port: int, say: Callable[[str], None], on_ready: Callable[[], None] | None = None
) -> None:
    """Serves until SIGINT or SIGTERM; a server that ends by itself is started again."""
    if status_port:
        ports = {
            "--http-port": options.http_port,
            "--grpc-port": options.grpc_port,
            "--metrics-port": options.metrics_port,
        }
        check_ports(options.host, ports | {"--status-port": status_port})
    raise_descriptor_limit()
    interrupt_on_signals()
    say("starting Triton")
    try:
        with service(options, say) as (server, watchdog):
            say(f"warm-up: {warm_up(server):.1f} s")
            if status_port:
                start_status_page(server.host, status_port, watchdog.metrics.registry)
            say(
                f"ready: http {server.host}:{server.http_port}, grpc {server.host}:{server.grpc_port}, "
                f"metrics {server.host}:{server.metrics_port}"
                + (f", watchdog {server.host}:{status_port}" if status_port else "")
                + f"; log {server.log}; Ctrl-C stops"
            )
            if on_ready is not None:
                on_ready()
            while not threading.Event().wait(1.0):  # a server that ends is brought back by the watchdog
                if not watchdog.alive_itself():
                    raise ServerError("watchdog: it ended; the log says why. Start 'vivace serve' again")
    except KeyboardInterrupt:
        say("stopped")
