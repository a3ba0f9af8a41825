"""``vivace serve``: the servers and their watchdogs until a signal comes."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from serving.control import Control, control_socket
from serving.door.access import check_access
from serving.fleet import Fleet, warm_up
from serving.launcher import TritonServer
from serving.logs import rotate
from serving.process import Reaper, adopt_orphans
from serving.repository import check_profile
from serving.server_options import ServerOptions
from serving.shards.servers import check_shard, check_stages, shard_count
from serving.start_checks import (
    check_cache,
    check_explore,
    check_exposure,
    check_log,
    check_parity,
    check_path,
    check_ports,
    check_rules,
    check_state_cache,
    check_store,
    check_trace_url,
    check_variant,
    local_address,
    raise_descriptor_limit,
)
from serving.status import start_status_page
from serving.watchdog import Watchdog
from serving.wheel import ServerError

LOOK_S = 0.5


@contextmanager
def service(options: ServerOptions, say: Callable[[str], None]) -> Iterator[tuple[TritonServer, Watchdog]]:
    """One ready server with its watchdog; nothing is left when the block ends."""
    with Fleet(options, say) as fleet:
        yield fleet.replicas[0].server, fleet.replicas[0].watchdog


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
    check_exposure(options.host, address, options.guard, options.access, options.shard is not None)
    check_ports(address, named)
    check_path(options.repository)
    check_profile(options.repository, options.profile)
    check_cache(options.repository, options.profile, options.cache_bytes, options.answer_cache)
    check_state_cache(options.repository, options.profile, options.state_cache)
    if options.shard is not None:
        check_shard(options.repository, options.shard)
    elif shard_count(options.repository):
        check_stages(options.repository, options.profile)
    check_rules(options.repository.resolve())
    check_variant(options.variant, options.impressions)
    check_explore(options.explore, options.impressions, options.answer_cache is not None)
    check_parity(options.parity, options.impressions, options.repository)
    check_trace_url(options.trace_url)
    check_store(options.store)
    if options.log is not None:
        check_log(options.log)
    raise_descriptor_limit()


def run_until_signal(
    options: ServerOptions,
    status_port: int,
    say: Callable[[str], None],
    on_ready: Callable[[], None] | None = None,
    replicas: int = 1,
) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP; a server that ends by itself is started again, and a newer version served
    when the control socket is asked for it. What is under way at the end is answered, and what comes later refused."""
    check_options(options, status_port)
    adopt_orphans()
    interrupt_on_signals()
    say("starting Triton")
    fleet = Fleet(options, say, replicas)
    fleet.starting = "warming up"
    try:
        with fleet, control_socket(fleet) as control:
            server = fleet.replicas[0].server
            if status_port:
                start_status_page(server.host, status_port, fleet)
                control.status_port = status_port
            if options.shard is None:
                say(f"warm-up: {sum(warm_up(replica.server) for replica in fleet.replicas):.1f} s")
            fleet.starting = ""
            say(
                f"ready: http {server.host}:{server.http_port}, "
                + (f"grpc {server.host}:{server.grpc_port}, " if options.shard is None or not options.guard else "")
                + f"metrics {server.host}:{server.metrics_port}"
                + (f", status {server.host}:{status_port}" if status_port else "")
                + f"; log {server.log}; Ctrl-C stops"
            )
            if on_ready is not None:
                on_ready()
            _watch(fleet, control)
    except KeyboardInterrupt:
        say("stopped")


def _watch(fleet: Fleet, control: Control) -> None:
    """Until a signal comes. A server that ends is brought back by its watchdog."""
    reaper, due = Reaper(), time.monotonic()
    while True:
        control.work(LOOK_S)
        if time.monotonic() < due:
            continue
        due = time.monotonic() + 1.0
        if not fleet.alive_itself():
            raise ServerError("watchdog: it ended; the log says why. Start 'vivace serve' again")
        reaper.reap(but=fleet.processes())
        for log in fleet.logs():
            rotate(log)
