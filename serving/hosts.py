"""``vivace door``: one door before servers on other machines, until a signal comes."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily

from serving.door.access import check_access
from serving.door.endpoints import RECOMMEND, Endpoints, Turn
from serving.door.hosts import Upstream
from serving.door.keeper import DoorKeeper
from serving.door.options import AccessOptions, Balance, DoorOptions
from serving.door.process import Door
from serving.door.statistics import DoorStatistics
from serving.logs import rotate
from serving.process import adopt_orphans
from serving.releases import held_from_the_start
from serving.service import interrupt_on_signals
from serving.start_checks import (
    LEFTOVER,
    check_exposure,
    check_ports,
    connections_for,
    free_port,
    local_address,
    raise_descriptor_limit,
)
from serving.unix_http import UnixHandler, UnixServer
from serving.wheel import ServerError

log = logging.getLogger("vivace.serve")
LOOK_S = 0.25
ANY = "0.0.0.0"


@dataclass(frozen=True, kw_only=True)
class HostsDoorOptions:
    """Where the door listens (port 0: any free one), who is let in, and who answers."""

    upstream: Upstream
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    access: AccessOptions = field(default_factory=AccessOptions)
    balance: Balance = "load"

    def checked(self) -> HostsDoorOptions:
        """With ports chosen. Raises ServerError that names the option, before anything is started."""
        address = local_address(self.host)
        check_access(self.access)
        check_exposure(self.host, address, True, self.access)
        ports = {name: getattr(self, name) or free_port(address) for name in ("http_port", "grpc_port", "metrics_port")}
        check_ports(address, {f"--{name.replace('_', '-')}": port for name, port in ports.items()})
        for host in self.upstream.hosts:
            itself = host.ip == address or (address == ANY and _is_of_this_machine(host.ip))
            if itself and {host.http_port, host.grpc_port} & set(ports.values()):
                raise ServerError(
                    f"--hosts: {host.name}:{host.http_port}:{host.grpc_port} is where this door itself listens; give "
                    "it other ports by --http-port and --grpc-port, or name the server that is meant"
                )
        raise_descriptor_limit()
        return replace(
            self, host=address, http_port=ports["http_port"], grpc_port=ports["grpc_port"],
            metrics_port=ports["metrics_port"],
        )  # fmt: skip


class HostsDoor:
    """A context manager: inside it listens. ``well``: whether each server said lately that it works, by its address."""

    def __init__(self, options: HostsDoorOptions, say: Callable[[str], None]) -> None:
        self.options, self.say = options.checked(), say
        self.well: dict[str, bool] = {}
        self._life = contextlib.ExitStack()
        self.registry = CollectorRegistry()
        self._restarts = Counter(
            "vivace_server_restarts", "Ends of Envoy by itself", ["process"], registry=self.registry
        )
        self._restarts.labels("envoy")

    def __enter__(self) -> HostsDoor:
        o = self.options
        try:
            folder = tempfile.TemporaryDirectory(prefix=LEFTOVER, ignore_cleanup_errors=True)
            private = Path(self._life.enter_context(folder))
            self._life.enter_context(held_from_the_start(private))
            listens = DoorOptions(
                host=o.host, http_port=o.http_port, grpc_port=o.grpc_port, metrics_port=o.metrics_port,
                max_connections=connections_for(DoorOptions.max_connections), upstream=o.upstream,
                several=len(o.upstream.hosts) > 1, balance=o.balance,
            )  # fmt: skip
            self.door = Door(listens, private, o.access)
            self.door.metrics = private / "metrics"
            self._serve_metrics(self.door.metrics)
            self.door.point(self.endpoints)
            self._life.callback(self.door.stop)
            self.door.start()
            restarted = self._restarts.labels("envoy").inc
            self._life.enter_context(DoorKeeper(self.door, lambda: True, self.endpoints, restarted, self.say))
            self.look()
        except BaseException:
            self._life.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Refuses what is new, waits for what is under way, and ends."""
        self.door.finish()
        self._life.close()

    def endpoints(self) -> Endpoints:
        return dict.fromkeys(self.options.upstream.hosts, Turn.TAKES)

    def look(self) -> None:
        """Asks the door who is well, and says what has changed."""
        upstream = self.options.upstream
        hosts = {host.sign(RECOMMEND): host for host in upstream.hosts}
        now = self.door.well()
        for address, well in now.items():
            if self.well.get(address, True) == well:
                continue
            why = "" if well else upstream.why_not(hosts[address]) or "does not say that it works"
            self.say(f"{address}: {'answers again' if well else f'{why}; others are asked'}")
        self.well = now

    def _serve_metrics(self, path: Path) -> None:
        self.registry.register(DoorStatistics(lambda page: self.door.ask("GET", page)))
        self.registry.register(self)  # type: ignore[arg-type]  # it collects, which is all that is asked
        registry = self.registry

        class Handler(UnixHandler):
            def do_GET(handler) -> None:  # noqa: N802, N805
                handler.answer(200, generate_latest(registry), CONTENT_TYPE_LATEST)

        server = UnixServer(path, Handler)
        server.start()
        self._life.callback(server.stop)

    def describe(self) -> Iterator[Metric]:
        """Nothing, so that a registry does not ask before there is a door."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("vivace_host_up", "1 while this server says that it works", labels=["host"])
        for address, well in self.well.items():
            up.add_metric([address], float(well))
        yield up


def _is_of_this_machine(ip: str) -> bool:
    try:
        local_address(ip)
    except ServerError:
        return False
    return True


def run_door(options: HostsDoorOptions, say: Callable[[str], None]) -> None:
    """Until SIGINT, SIGTERM or SIGHUP."""
    adopt_orphans()
    interrupt_on_signals()
    try:
        with HostsDoor(options, say) as running:
            o = running.options
            none = "" if any(running.well.values()) else ", none of which says yet that it works"
            say(
                f"ready: http {o.host}:{o.http_port}, grpc {o.host}:{o.grpc_port}, metrics {o.host}:{o.metrics_port}; "
                f"before {', '.join(running.well)}{none}; Ctrl-C stops"
            )
            while True:
                time.sleep(LOOK_S)
                running.look()
                rotate(running.door.log)
    except KeyboardInterrupt:
        say("stopped")
