"""The tritonservers of all shards of one version on this machine, each with its watchdog."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from serving.door.options import AccessOptions
from serving.door.trust import UNTRUSTED
from serving.launcher import TritonServer
from serving.repository import read_config
from serving.server_options import ServerOptions, shard_environment
from serving.shard_addresses import ShardAddresses, credentials_from
from serving.shards.calls import OTHER_SHARD, OTHER_VERSION, SILENT, RemoteShards
from serving.watchdog import Metrics, Watchdog
from serving.wheel import ServerError
from vivace import contract
from vivace.http_pool import UNIX
from vivace.run import Run
from vivace.shard_contract import SHARD_PREFIX

TRIES = 6  # a port that wants TLS, or another certificate, may close the connection before its reason is read


@dataclass
class ShardServer:
    """One server of shard ``shard``; ``twin``: its number among those of the shard."""

    shard: int
    twin: int
    server: TritonServer
    watchdog: Watchdog

    def fault(self) -> str:
        """What is wrong with it, or ""."""
        faults = self.watchdog.health.faults
        return "; ".join(f"{part}: {why}" for part, why in faults.items() if why)


def shard_count(release: Path) -> int:
    """Shards of a published version; 0 where one graph scores all items."""
    return sum(1 for path in release.glob(f"{SHARD_PREFIX}*") if path.is_dir())


class ShardMetrics:
    """Metrics of the shards that this process started, of ``servers()`` at that moment."""

    def __init__(self, servers: Callable[[], list[ShardServer]]) -> None:
        self._servers = servers

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("vivace_shard_up", "1 while this server of a shard works", labels=["shard", "twin"])
        restarts = CounterMetricFamily(
            "vivace_shard_restarts", "Times that a shard's server ended by itself", labels=["shard", "twin"]
        )
        for each in self._servers():
            place = [str(each.shard), str(each.twin)]
            up.add_metric(place, float(not each.fault()))
            restarts.add_metric(place, each.watchdog.metrics.server_restarts.labels("tritonserver")._value.get())
        yield up
        yield restarts


class ShardServers:
    """Ready servers of all shards of the version in ``options.repository``, behind Unix sockets that only this user
    opens. ``aside``: others serve while they start. Raises ServerError where one does not come up."""

    def __init__(self, options: ServerOptions, say: Callable[[str], None], aside: bool = False) -> None:
        self._say = say
        count, twins = shard_count(options.repository), options.shard_twins
        places = [(shard, twin) for shard in range(count) for twin in range(twins)]
        # its threads live as long as the servers: the kernel ends a server with the thread that started it
        self._pool = ThreadPoolExecutor(len(places), "shards")
        starting = [self._pool.submit(self._started, options, *place, aside) for place in places]
        self.servers, self._stopping = list[ShardServer](), list[Future[None]]()
        faults = list[BaseException]()
        for future in starting:
            if (fault := future.exception()) is None:
                self.servers.append(future.result())
            else:
                faults.append(fault)
        if faults:
            self.stop()
            raise faults[0]

    def _started(self, options: ServerOptions, shard: int, twin: int, aside: bool) -> ShardServer:
        name = f"shard-{shard}" + (f"-twin-{twin}" if twin else "")
        log = options.log.with_name(f"{options.log.stem}-{name}{options.log.suffix}") if options.log else None
        server = TritonServer(as_shard(options, shard, log), None, aside)
        try:
            server.start()
            server.take_over()
            watchdog = Watchdog(server, Metrics(), on_event=lambda text: self._say(f"{name}: {text}"))
            watchdog.__enter__()
        except BaseException:
            server.stop()
            raise
        return ShardServer(shard, twin, server, watchdog)

    @property
    def addresses(self) -> ShardAddresses:
        shards: dict[int, list[str]] = {}
        for each in self.servers:
            assert each.server.sockets is not None
            shards.setdefault(each.shard, []).append(f"{UNIX}{each.server.sockets.http}")
        return ShardAddresses(tuple(tuple(shards[shard]) for shard in sorted(shards)))

    def report(self) -> list[dict[str, object]]:
        """Of each server, for ``/health``."""
        return list(self._reports())

    def _reports(self) -> Iterator[dict[str, object]]:
        for each in self.servers:
            fault = each.fault()
            yield {"shard": each.shard, "twin": each.twin, "ok": not fault, **({"why": fault} if fault else {})}

    def begin_stop(self) -> None:
        """Nothing is asked any more: they end while others do."""
        self._stopping += [self._pool.submit(self._stop, each) for each in self.servers]
        self.servers = []

    def stop(self) -> None:
        self.begin_stop()
        wait(self._stopping)
        self._pool.shutdown()

    @staticmethod
    def _stop(each: ShardServer) -> None:
        each.watchdog.__exit__()
        each.server.stop()


class ShardGroups:
    """The shards that a process started, by the version that they are of."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._groups = say, dict[Path, ShardServers]()

    def told(self, options: ServerOptions, aside: bool) -> ServerOptions:
        """``options`` with where the shards of its version are; they are started where nobody named others. Raises
        ServerError."""
        release = options.repository.resolve()
        count = shard_count(release) if options.shard is None else 0
        if not options.shards and (options.shard_cert or options.shard_ca):
            raise ServerError("--shard-cert, --shard-ca: expected --shard-hosts, as shards that start here need none")
        if options.shards:
            check_hosts(options, self._say)
        if options.shards or not count:
            return options
        check_stages(release, options.profile)
        if release not in self._groups:
            self._say(f"starting {count} shards" + (f", {options.shard_twins} of each" * (options.shard_twins > 1)))
            self._groups[release] = ShardServers(replace(options, repository=release), self._say, aside)
        return replace(options, shards=str(self._groups[release].addresses))

    @property
    def servers(self) -> list[ShardServer]:
        return [each for group in list(self._groups.values()) for each in group.servers]

    def report(self) -> list[dict[str, object]]:
        """Of each server, for ``/health``."""
        return [report for group in list(self._groups.values()) for report in group.report()]

    def begin_stop(self) -> None:
        for group in self._groups.values():
            group.begin_stop()

    def drop(self, but: set[Path]) -> None:
        """Ends the shards of all versions but those."""
        for release in set(self._groups) - but:
            self._groups.pop(release).stop()


def as_shard(options: ServerOptions, shard: int, log: Path | None) -> ServerOptions:
    """Those of a shard on this machine of a server with ``options``."""
    return replace(
        options, shard=shard, shards="", log=log, guard=True, access=AccessOptions(), cache_bytes=0, trace_url="",
        impressions=False, store="", host="127.0.0.1", http_port=0, grpc_port=0, metrics_port=0,
    )  # fmt: skip


def check_shard(release: Path, shard: int) -> None:
    """Raises ServerError where ``shard`` is none of the version's."""
    count = shard_count(release)
    if not count:
        raise ServerError(f"--shard {shard}: this version has no shards; run 'vivace compile --shards S' first")
    if not 0 <= shard < count:
        raise ServerError(f"--shard {shard}: expected 0 to {count - 1}, as this version has {count} shards")


def check_stages(release: Path, profile: str) -> None:
    """Raises ServerError for a profile whose stages are one model, which would hold all items itself."""
    if read_config(release, contract.ENSEMBLE, profile).platform != "ensemble":
        raise ServerError(
            f"--profile {profile}: expected a profile of separate stages, as it is retrieval that asks the shards; "
            "serve it by --profile ensemble, or compile without --shards"
        )


def check_hosts(options: ServerOptions, say: Callable[[str], None]) -> None:
    """Asks the shards that ``options.shards`` names. Raises ServerError where those are not this version's, or none
    answers; one of several that does not is only told of."""
    release = options.repository.resolve()
    check_stages(release, options.profile)
    count = shard_count(release)
    if not count:
        raise ServerError("--shard-hosts: this version has no shards; run 'vivace compile --shards S', or leave it out")
    shapes = Run(release.parent).shapes()
    version = next(p.name for p in (release / contract.RETRIEVAL).iterdir() if p.name.isdigit())
    try:
        addresses = ShardAddresses.parse(options.shards, count)
        credentials = credentials_from(shard_environment(options))
    except ValueError as error:
        raise ServerError(str(error)) from None
    for _ in range(TRIES):
        with contextlib.closing(RemoteShards(addresses, version, shapes, 5.0, credentials=credentials)) as shards:
            missing = shards.ask_once()
        if SILENT not in missing.values():
            break
    untrusted = any(why.startswith(UNTRUSTED) for why in missing.values())
    if len(missing) == count or untrusted or {OTHER_VERSION, OTHER_SHARD} & set(missing.values()):
        named = ", ".join(f"{shard} at {'|'.join(addresses.twins[shard])}: {why}" for shard, why in missing.items())
        raise ServerError(
            f"--shard-hosts: expected servers of version {version} ('vivace serve --shard I' there), got: {named}"
        )
    for shard, why in missing.items():
        say(f"shard {shard} at {'|'.join(addresses.twins[shard])}: {why}; answers do without it until it comes")
