"""One or more tritonservers of one run behind one door, each with its watchdog; a newer version takes their places one
by one, without a refused request.

A version is never loaded beside another in one server: a server of the new one is started, warmed up and judged by
recorded requests before the first caller reaches it; then the door sends it what comes, the old one answers what it was
sent and ends. Whatever goes wrong before that leaves the old one in its place.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter

from serving.door.endpoints import Endpoint, Endpoints, Turn
from serving.door.keeper import DoorKeeper
from serving.door.options import DoorOptions
from serving.door.process import Door
from serving.door.statistics import DoorStatistics
from serving.drift import Drift
from serving.interleaving import interleaving
from serving.launcher import TritonServer
from serving.merged_metrics import TritonMetrics
from serving.releases import held_from_the_start
from serving.rules_keeper import RulesKeeper
from serving.runtime.rules import FILE, rules_file
from serving.segments import Segments
from serving.server_options import ServerOptions, with_files
from serving.shards.servers import ShardGroups, ShardMetrics, ShardServer
from serving.start_checks import LEFTOVER, PREFIX_FILE, check_ports, door_options
from serving.watchdog import Metrics, Watchdog
from serving.wheel import ServerError
from vivace.client import VivaceError
from vivace.contract import TRIAL, UNLOGGED

WARM_AT_ONCE = DoorOptions.max_recommends
WARM_EVENTS = 200
WARM_S = 20.0
READY_S = 60.0  # a new server has so long until its watchdog says that all parts work


def warm_up(server: TritonServer) -> float:
    """Answers requests of someone unknown, many at once, before anyone else asks: buffers then have the size that they
    have under load, and the first users wait no longer than others. Returns the seconds it took.

    What they are answered or refused does not matter; after ``WARM_S`` no more is waited for."""
    started = time.monotonic()

    def ask(number: int) -> None:  # none like another: those would be answered once
        with contextlib.suppress(VivaceError):
            client.recommend(history=[f"-{number}"] * WARM_EVENTS, request_id=UNLOGGED)

    with server.client(WARM_S) as client, ThreadPoolExecutor(WARM_AT_ONCE) as pool:
        list(pool.map(ask, range(WARM_AT_ONCE)))
    return time.monotonic() - started


Accept = Callable[[TritonServer, TritonServer], str]  # (old, new): what was seen; raises where the new one is no good


@dataclass
class Replica:
    """One server and who watches it. ``leaves``: it is sent nothing new."""

    server: TritonServer
    watchdog: Watchdog
    leaves: bool = False

    @property
    def turn(self) -> Turn:
        if self.leaves:
            return Turn.LEAVES
        return Turn.TAKES if self.watchdog.health.answers else Turn.ILL

    def stop(self) -> None:
        self.watchdog.__exit__()
        self.server.stop()


class Fleet:
    """A context manager: inside ``count`` servers are ready behind ``door`` (None without a guard, which takes one).

    Attributes: ``replicas``; ``private``, a folder of its own; ``starting``, why it does not say that it is ready
    although its servers are."""

    def __init__(self, options: ServerOptions, say: Callable[[str], None], count: int = 1) -> None:
        if count > 1 and not options.guard:
            raise ServerError(f"--replicas {count}: expected the guard, which stands before them; leave --no-guard out")
        self.options, self.say, self.count = options, say, count
        self.replicas: list[Replica] = []
        self.door: Door | None = None
        self.starting = ""
        self.private = Path()
        self.trial: Replica | None = None  # of a version that a share of the users gets
        self._candidate: Replica | None = None
        self.rules: RulesKeeper | None = None
        self.shards = ShardGroups(say)
        self._keeper: DoorKeeper | None = None
        self._life = contextlib.ExitStack()
        self.registry = CollectorRegistry()
        self._swaps = Counter(
            "vivace_version_changes", "Changes of the served version", ["result"], registry=self.registry
        )
        for result in ("done", "refused"):
            self._swaps.labels(result)
        self.drift = Drift(self.counting)
        self.registry.register(self.drift)  # type: ignore[arg-type]  # it collects, which is all that is needed
        self.registry.register(ShardMetrics(lambda: self.shards.servers))  # type: ignore[arg-type]
        self.registry.register(DoorStatistics(lambda path: self.door.ask("GET", path) if self.door is not None else ""))

    # -- life ----------------------------------------------------------------------------------------
    def __enter__(self) -> Fleet:
        try:
            self._make_private()
            if self.options.shard is None:
                self._keep_rules()
            self._start()
            self._life.enter_context(self.drift)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Refuses what is new, waits for what is under way, and ends everything."""
        self.starting = "stopping"
        if self.door is not None:
            self.door.finish()
        if self._keeper is not None:
            self._keeper.__exit__()
        replicas = self._all()
        for replica in replicas:
            replica.watchdog.__exit__()
        if self.door is not None:  # before them: its idle connections would keep each Triton from ending
            self.door.stop()
        self.shards.begin_stop()
        for replica in replicas:
            replica.server.stop()
        self.replicas, self.trial, self._candidate = [], None, None
        self._drop_shards()
        self._life.close()

    def _start(self) -> None:
        if self.options.guard:
            self.door = self._make_door()
            self.door.metrics = self.private / "metrics"
            self._life.enter_context(TritonMetrics(self.door.metrics, self._metrics_sockets))
        for place in range(self.count):
            self.replicas.append(self._started(self.options, place))
            self.options = replace(self.options, repository=self.release)  # whatever the link names later
        if self.door is not None:
            self.door.point(self.endpoints)
            self.door.start()
            for replica in self.replicas:  # they saw no door until now
                replica.watchdog.health.look()
            restarted = self.replicas[0].watchdog.metrics.server_restarts.labels("envoy").inc
            self._keeper = DoorKeeper(self.door, lambda: self.ready, self.endpoints, restarted, self.say).__enter__()

    def _make_private(self) -> None:
        """A folder that only the owner enters, swept by the next start if this process is killed outright."""
        folder = tempfile.TemporaryDirectory(prefix=LEFTOVER, ignore_cleanup_errors=True)
        self.private = Path(self._life.enter_context(folder))
        self.options = replace(self.options, answers=self.private / "answers")
        if self.options.answer_cache is not None or self.options.state_cache is not None:
            caches = Segments()
            (self.private / PREFIX_FILE).write_text(caches.prefix)
            self.options = with_files(self.options, caches)
            self._life.callback(caches.remove)
        self._life.enter_context(held_from_the_start(self.private))

    def _keep_rules(self) -> None:
        served, here = self.options.repository.resolve(), lambda: [r.server.release for r in self._all()]
        self.rules = RulesKeeper(rules_file(served), self.private / FILE, lambda: here() or [served], self.say)
        self.registry.register(self._life.enter_context(self.rules))  # type: ignore[arg-type]
        self.options = replace(self.options, rules=self.rules.accepted)

    def _make_door(self) -> Door:
        """Not started yet, on the ports of the options, or free ones."""
        probe = TritonServer(self.options)
        ports = {"--http-port": probe.http_port, "--grpc-port": probe.grpc_port, "--metrics-port": probe.metrics_port}
        check_ports(probe.host, ports)
        ports_of = (probe.http_port, probe.grpc_port, probe.metrics_port)
        listens = door_options(probe.host, *ports_of, self.options.shard)
        return Door(replace(listens, several=self.count > 1), self.private, self.options.access)

    def _started(self, options: ServerOptions, place: int | str, aside: bool = False) -> Replica:
        """A ready server with its watchdog; nothing is left where it does not come up. ``aside``: others serve."""
        if self.rules is not None:
            self.rules.check(options.repository.resolve())
        options, log = self.shards.told(options, aside), options.log
        if place and log is not None:
            options = replace(options, log=log.with_name(f"{log.stem}-{place}{log.suffix}"))
        server = TritonServer(options, self.door, aside)
        try:
            server.start()
            watchdog = Watchdog(server, Metrics(), on_event=self.say)
            watchdog.__enter__()
        except BaseException:
            server.stop()
            self._drop_shards()
            raise
        return Replica(server, watchdog)

    def _drop_shards(self) -> None:
        """Ends those of versions that no server serves any more."""
        self.shards.drop(but={r.server.release for r in self._all()})

    # -- for those who ask ---------------------------------------------------------------------------
    def endpoints(self) -> Endpoints:
        all_ = [(r.server.sockets, r.turn) for r in list(self.replicas)]
        endpoints: dict[Endpoint, Turn] = {sockets: turn for sockets, turn in all_ if sockets is not None}
        trial = self.trial
        if trial is not None and trial.server.sockets is not None and trial.turn is Turn.TAKES:
            endpoints[trial.server.sockets] = Turn.TRIES
        return endpoints

    def by_name(self) -> dict[str, Replica]:
        """Those that take calls, by their places, and "trial"."""
        staying = [r for r in list(self.replicas) if not r.leaves]
        named = {str(place): replica for place, replica in enumerate(staying)}
        return named | ({"trial": self.trial} if self.trial is not None else {})

    def _metrics_sockets(self) -> dict[str, Path]:
        return {name: r.server.sockets.metrics for name, r in self.by_name().items() if r.server.sockets is not None}

    def counting(self) -> list[tuple[Path, Path]]:
        """(version, folder of its workers' counts for drift) of each server."""
        return [(r.server.release, r.server.drift) for r in self._all() if r.server.drift is not None]

    def _all(self) -> list[Replica]:
        return [*self.replicas, *filter(None, [self.trial, self._candidate])]

    def _watched(self) -> list[Replica | ShardServer]:
        return [*self._all(), *self.shards.servers]

    @property
    def ready(self) -> bool:
        """Whether callers are answered: one of the servers works in all its parts."""
        return not self.starting and any(r.watchdog.health.ready and not r.leaves for r in self.replicas)

    def alive_itself(self) -> bool:
        """Whether all that watches runs."""
        keeper = self._keeper is None or self._keeper.alive_itself()
        watched: list[Replica | ShardServer] = [*self.replicas, *self.shards.servers]
        return keeper and all(each.watchdog.alive_itself() for each in watched)

    def report(self) -> dict[str, object]:
        """What ``/health`` answers: of one server its parts, of several those of each."""
        reports = [r.watchdog.health.report() for r in self.replicas]
        rules = self.rules.fault if self.rules is not None else ""
        told = {"why": self.starting, "shards": self.shards.report(), "rules": rules}
        why: dict[str, object] = {name: value for name, value in told.items() if value}
        if len(reports) == 1:
            return reports[0] | {"ready": self.ready} | why
        versions = sorted({str(r["version"]) for r in reports})
        return {"ready": self.ready, **why, "version": ", ".join(versions), "replicas": reports}

    @property
    def release(self) -> Path:
        """Folder of the version that is served."""
        return self.replicas[0].server.release

    def processes(self) -> set[int]:
        """What this process started and waits for itself."""
        pids = {pid for each in self._watched() for pid in each.server.processes()}
        return pids | ({self.door.pid} if self.door is not None and self.door.started else set())

    def logs(self) -> list[Path]:
        """What grows while it runs."""
        logs = {each.server.log for each in self._watched() if each.server.log is not None}
        return [*logs, *([self.door.log] if self.door is not None else [])]

    # -- another version -----------------------------------------------------------------------------
    def serve(self, release: Path, accept: Accept, say: Callable[[str], None]) -> None:
        """Serves the version in ``release`` in the place of the one that is served. Called by the thread that lives as
        long as the servers. Raises ServerError, DamagedError or ValueError where it does not come up or is not
        accepted; those of the old one that were there are there then."""
        if self.door is None:
            raise ServerError(
                "the server was started with --no-guard: nothing stands before it; stop it, give the command again, "
                "then start it"
            )
        if self.trial is not None and self.trial.server.release != release:
            name = self.trial.server.release.name
            raise ServerError(f"{name} is on trial; 'vivace rollout promote' or 'vivace rollout stop' first")
        before, options = self.options, replace(self.options, repository=release)
        place = 0
        try:
            for place in range(len(self.replicas)):
                self._exchange(place, options, accept, say)
        except BaseException as error:
            self._swaps.labels("refused").inc()
            for earlier in range(place) if isinstance(error, Exception) else ():
                self._exchange(earlier, before, lambda old, new: "back", say)
            raise
        self.options = options
        self._swaps.labels("done").inc()
        self.say(f"serving {release.name}, before {before.repository.name}")

    def begin_trial(self, release: Path, accept: Accept, say: Callable[[str], None], draft: str = "") -> None:
        """A server of the version in ``release`` beside the others, which the door sends nobody to yet, and which steps
        aside until its ``take_over``. ``draft``: the salt of the coins where its answers are drafts of both versions.
        Called and raises as ``serve``."""
        if self.door is None:
            raise ServerError("rollout: expected the guard, which deals the users; leave --no-guard out")
        if self.trial is not None:
            raise ServerError(f"{self.trial.server.release.name} is on trial; 'vivace rollout stop' first")
        name = release.name
        options = replace(self.options, repository=release, variant=TRIAL)
        if draft:
            options = replace(interleaving(self.options, release, draft), variant=TRIAL)
        say(f"starting {name}")
        with self._candidate_of(options, "trial") as new:
            say(f"{name}: {accept(self.replicas[0].server, new.server)}")
            self.trial = new
        self.door.point(self.endpoints)

    def end_trial(self, say: Callable[[str], None]) -> None:
        """Ends the server on trial, when it has answered what it was sent."""
        trial = self.trial
        if trial is None or self.door is None:
            return
        if not self.door.end_trial():
            say(f"{trial.server.release.name}: calls under way for long; ending it all the same")
        self.trial = None
        self.door.point(self.endpoints)
        trial.stop()
        self._drop_shards()
        say(f"{trial.server.release.name}: its trial is over")

    def scale(self, count: int, say: Callable[[str], None]) -> None:
        """As many servers of the served version as ``count``, from 1; calls go on. Called as ``serve`` is."""
        if self.door is None or count < 1:
            raise ServerError(f"replicas {count}: expected 1 and more, and the guard before them")
        while len(self.replicas) < count:
            place = len(self.replicas)
            say(f"starting replica {place}")
            with self._candidate_of(self.options, place) as new:
                new.server.take_over()
                self.replicas.append(new)
            say(f"replica {place}: takes what comes")
        while len(self.replicas) > count:
            old = self.replicas[-1]
            old.leaves = True
            self._retire(old, say)
        self.count = count

    def _exchange(self, place: int, options: ServerOptions, accept: Accept, say: Callable[[str], None]) -> None:
        old, name = self.replicas[place], options.repository.name
        say(f"starting {name}")
        with self._candidate_of(options, place) as new:
            say(f"{name}: {accept(old.server, new.server)}")
            new.server.take_over()
            old.leaves = True
            self.replicas[place : place + 1] = [new, old]
        say(f"{name}: takes what comes; {old.server.release.name} answers what it was sent")
        self._retire(old, say)

    @contextlib.contextmanager
    def _candidate_of(self, options: ServerOptions, place: int | str) -> Iterator[Replica]:
        """A server that is well and warm and that nobody asks yet, for the block to put among ``replicas``; it is gone
        where the block, or what comes before it, fails."""
        new = self._candidate = self._started(options, place, aside=True)
        try:
            warm_up(new.server)
            self._wait_ready(new)
            yield new
        except BaseException:
            self._candidate = None
            new.stop()
            self._drop_shards()
            raise
        self._candidate = None

    def _retire(self, old: Replica, say: Callable[[str], None]) -> None:
        """Ends a server that leaves, when it has answered what it was sent."""
        assert self.door is not None and old.server.sockets is not None
        self.door.point(self.endpoints)
        if not self.door.leave(old.server.sockets):
            say(f"{old.server.release.name}: calls under way for long; ending it all the same")
        self.replicas.remove(old)
        old.stop()
        self._drop_shards()
        say(f"{old.server.release.name}: stopped")

    def _wait_ready(self, replica: Replica) -> None:
        deadline = time.monotonic() + READY_S
        while not replica.watchdog.health.ready:
            if time.monotonic() > deadline or not replica.server.running():
                faults = {part: why for part, why in replica.watchdog.health.faults.items() if why}
                raise ServerError(f"{replica.server.release.name}: not ready after {READY_S:.0f} s: {faults}")
            time.sleep(0.1)
