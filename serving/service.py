"""``vivace serve``: the server and its watchdog until a signal comes."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import tritonclient.grpc as grpcclient

from serving.door.access import check_access
from serving.door.config import DoorOptions
from serving.launcher import ServerOptions, TritonServer
from serving.logs import rotate
from serving.process import Reaper, adopt_orphans
from serving.repository import check_profile
from serving.start_checks import (
    check_cache,
    check_exposure,
    check_log,
    check_ports,
    check_store,
    check_trace_url,
    local_address,
    raise_descriptor_limit,
)
from serving.status import start_status_page
from serving.watchdog import Metrics, Watchdog
from serving.wheel import ServerError
from vivace import contract
from vivace.client import inputs_of
from vivace.client_request import request_tensors

WARM_AT_ONCE = DoorOptions.max_recommends
WARM_EVENTS = 200
WARM_S = 20.0


def warm_up(server: TritonServer) -> float:
    """Answers requests of someone unknown, many at once, before anyone else asks: buffers then have the size that they
    have under load, and the first users wait no longer than others. Returns the seconds it took.

    What they are answered or refused does not matter; after ``WARM_S`` no more is waited for."""
    started, left, done = time.monotonic(), threading.Semaphore(0), 0
    question = inputs_of(grpcclient, request_tensors(history=["-"] * WARM_EVENTS))
    more = {"client_timeout": WARM_S, "headers": server.own.headers}
    with server.own.grpc_client(grpcclient, f"{server.address}:{server.grpc_port}") as client:
        for _ in range(WARM_AT_ONCE):
            client.async_infer(contract.ENSEMBLE, question, lambda result, error: left.release(), **more)
        while done < WARM_AT_ONCE and left.acquire(timeout=max(0.0, started + WARM_S - time.monotonic())):
            done += 1
    return time.monotonic() - started


@contextmanager
def service(
    options: ServerOptions, say: Callable[[str], None], starting: str = ""
) -> Iterator[tuple[TritonServer, Watchdog]]:
    """A ready server with its watchdog; nothing is left when the block ends. ``starting``: why it does not say that it
    is ready until ``watchdog.health.starting`` is taken back."""
    with TritonServer(options) as server:
        watchdog = Watchdog(server, Metrics(), on_event=say)
        watchdog.health.starting = starting
        with watchdog:
            try:
                yield server, watchdog
            finally:
                watchdog.health.starting = "stopping"
                server.refuse()


def interrupt_on_signals() -> None:
    """SIGINT, SIGTERM and SIGHUP, a closed terminal, raise KeyboardInterrupt once; a second one does not cut the
    clean-up short. Under ``nohup``, which has SIGHUP ignored, it stays ignored."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, interrupt)


def check_options(options: ServerOptions, status_port: int) -> None:
    """Raises ServerError or ValueError that names the option, before anything is started."""
    ports = {"http": options.http_port, "grpc": options.grpc_port, "metrics": options.metrics_port}
    named = {f"--{name}-port": port for name, port in ports.items()} | {"--status-port": status_port}
    address = local_address(options.host)
    check_access(options.access)
    check_exposure(options.host, address, options.guard, options.access)
    check_ports(address, named)
    check_profile(options.repository, options.profile)
    check_cache(options.repository, options.profile, options.cache_bytes)
    check_trace_url(options.trace_url)
    check_store(options.store)
    if options.log is not None:
        check_log(options.log)
    raise_descriptor_limit()


def run_until_signal(
    options: ServerOptions, status_port: int, say: Callable[[str], None], on_ready: Callable[[], None] | None = None
) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP; a server that ends by itself is started again. What is under way then is
    answered, and what comes later refused."""
    check_options(options, status_port)
    adopt_orphans()
    interrupt_on_signals()
    say("starting Triton")
    try:
        with service(options, say, starting="warming up") as (server, watchdog):
            if status_port:
                start_status_page(server.host, status_port, watchdog)
            say(f"warm-up: {warm_up(server):.1f} s")
            watchdog.health.starting = ""
            say(
                f"ready: http {server.host}:{server.http_port}, grpc {server.host}:{server.grpc_port}, "
                f"metrics {server.host}:{server.metrics_port}"
                + (f", status {server.host}:{status_port}" if status_port else "")
                + f"; log {server.log}; Ctrl-C stops"
            )
            if on_ready is not None:
                on_ready()
            _watch(server, watchdog)
    except KeyboardInterrupt:
        say("stopped")


def _watch(server: TritonServer, watchdog: Watchdog) -> None:
    """Until a signal comes. A server that ends is brought back by the watchdog."""
    reaper = Reaper()
    while not threading.Event().wait(1.0):
        if not watchdog.alive_itself():
            raise ServerError("watchdog: it ended; the log says why. Start 'vivace serve' again")
        reaper.reap(but=server.processes())
        for log in server.logs():
            rotate(log)
