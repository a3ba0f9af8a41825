"""How ``vivace publish`` speaks to a server that runs: HTTP over a Unix socket that only the owner opens.

    artifacts/<run>/servers/<pid>.json      where the server of that process listens, and what it serves

GET /           what is served, as JSON
GET /drift      ``serving.drift.Drift.report``; /drift/3: of the hour three hours ago
POST /serve     {"version": 4, "least_quality": 0.67}: serve that version if its NDCG is so many times the old one's (0:
                any); lines of text as it goes on, the last one JSON: {"error": "" or why}
POST /scale     {"replicas": 3}: so many servers; answered alike, as are the others
POST /rollout   a ``serving.judgement.Plan``: try a version
POST /promote   {}: serve the version on trial to everyone
POST /withdraw  {}: end the trial
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from serving.acceptance import Acceptance, recorded_calls
from serving.fleet import Fleet
from serving.judgement import Plan
from serving.releases import put_in_use, releases, remember_served, version_of
from serving.rollout import Rollout
from serving.unix_http import UnixHandler, UnixServer
from serving.wheel import ServerError
from vivace.http_pool import UnixConnection
from vivace.manifest import write_json
from vivace.run import Run
from vivace.running import ASK_S, Running, running

LONGEST_S = 600.0  # of a change of versions
MAX_BODY = 1 << 16
SERVE, SCALE, ROLLOUT, PROMOTE, WITHDRAW = "serve", "scale", "rollout", "promote", "withdraw"
DRIFT = "drift"
ENDED = "the server ended before that was done"
NO_TRIAL = "no version is on trial; 'vivace rollout start' puts one"


def _given(kind: str, raw: Any) -> Any:
    """What a task is given, from its JSON. Raises ValueError, KeyError or TypeError for what is none."""
    if kind == ROLLOUT:
        return Plan(**{**raw, "shares": tuple(raw["shares"])})
    if kind in (PROMOTE, WITHDRAW):
        return None
    if kind == SERVE:
        return int(raw["version"]), float(raw["least_quality"])
    return int(raw[{SCALE: "replicas"}[kind]])


@dataclass
class _Task:
    kind: str
    given: Any
    lines: queue.Queue[str | None] = field(default_factory=queue.Queue)  # None: it ended
    error: str = ENDED  # until it is done


class Control:
    """Takes tasks in threads of its own and does them in the thread that calls ``work``: what starts a server must live
    as long as it."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.rollout: Rollout | None = None
        self.status_port = 0
        self._tasks: queue.Queue[_Task] = queue.Queue()
        self._busy = threading.Lock()

    def work(self, wait_s: float) -> None:
        """Does one task, if one comes within ``wait_s``, and looks after a version on trial."""
        with contextlib.suppress(queue.Empty):
            task = self._tasks.get(timeout=wait_s)
            try:
                self._do(task)
                task.error = ""
            except Exception as error:  # the server goes on with what it has, and so does one that starts later
                task.error = f"{error}"
                if task.kind in (SERVE, ROLLOUT):
                    self._keep_served()
            finally:
                task.lines.put(None)
        if self.rollout is not None and self.rollout.look() and self._busy.acquire(blocking=False):
            try:
                self._promote(self.rollout, lambda line: None)
            except Exception as error:  # as above; its users stay with it until someone says otherwise
                self.rollout.give_up(f"{error}")
            finally:
                self._busy.release()

    def _do(self, task: _Task) -> None:
        say = task.lines.put
        if task.kind == SCALE:
            self.fleet.scale(task.given, say)
        elif task.kind == SERVE:
            version, least_quality = task.given
            self._serve(version, least_quality, say)
        elif task.kind == ROLLOUT:
            rollout = Rollout(self.fleet, task.given, self.fleet.say)
            release = self._release(task.given.version)
            if release == self.fleet.release:
                raise ServerError(f"{release.name}: is served to everyone already")
            rollout.start(release, self._acceptance(release, task.given.least_quality), say)
            self.rollout = rollout
            self._keep_served()  # a server that starts meanwhile gets what everyone has, not what is on trial
        elif self.rollout is None or self.rollout.result:
            raise ServerError(NO_TRIAL)
        elif task.kind == PROMOTE:
            self._promote(self.rollout, say)
        else:
            self.rollout.stop("it was withdrawn")

    def _keep_served(self) -> None:
        """Servers that start from now on serve what this one does, and not what was refused or is on trial."""
        with contextlib.suppress(OSError):  # a run that is mounted read-only
            put_in_use(self.fleet.release, Run(self.fleet.release.parent).repository)

    def _promote(self, rollout: Rollout, say: Callable[[str], None]) -> None:
        """Serves the version on trial to everyone, then ends its trial."""
        release = self._release(rollout.plan.version)
        before = self.fleet.release
        self.fleet.serve(release, self._acceptance(release, rollout.plan.least_quality), say)
        rollout.promoted()
        repository = Run(release.parent).repository
        try:
            put_in_use(release, repository)
            remember_served(rollout.plan.version, repository, version_of(before))
        except OSError as error:  # a run that is mounted read-only
            self.fleet.say(f"{release.name}: is served, but not by servers that start from now on: {error}")

    def _serve(self, version: int, least_quality: float, say: Callable[[str], None]) -> None:
        release = self._release(version)
        if release == self.fleet.release:
            say(f"{release.name}: is served already")
            return
        if self.rollout is not None and not self.rollout.result:
            name = f"version {self.rollout.plan.version}"
            raise ServerError(f"{name} is on trial; 'vivace rollout promote' or 'vivace rollout stop' first")
        self.fleet.serve(release, self._acceptance(release, least_quality), say)

    def _acceptance(self, release: Path, least_quality: float) -> Acceptance:
        return Acceptance(recorded_calls(Run(release.parent)), least_quality)

    def _release(self, version: int) -> Path:
        release = next((r for r in self._releases() if version_of(r) == version), None)
        if release is None:
            there = ", ".join(str(version_of(r)) for r in self._releases())
            raise ServerError(f"version {version}: expected one of {there}")
        return release

    def _releases(self) -> list[Path]:
        return releases(Run(self.fleet.release.parent).repository)

    def state(self) -> dict[str, Any]:
        server = self.fleet.replicas[0].server
        return {
            "version": version_of(self.fleet.release), "release": str(self.fleet.release),
            "profile": server.options.profile, "ready": self.fleet.ready, "grpc_port": server.grpc_port,
            "http_port": server.http_port, "address": server.address, "shard": server.options.shard,
            "metrics_port": server.metrics_port, "status_port": self.status_port,
            "replicas": len(self.fleet.replicas), "rollout": self.rollout.state() if self.rollout else None,
        }  # fmt: skip

    def ask(self, kind: str, given: Any) -> Iterator[str]:
        """Lines of a change, the last one its end as JSON."""
        if not self._busy.acquire(blocking=False):
            yield json.dumps({"error": "another change is under way; try again when it has ended"})
            return
        try:
            task = _Task(kind, given)
            self._tasks.put(task)
            while (line := task.lines.get()) is not None:
                yield line
            yield json.dumps({"error": task.error})
        finally:
            self._busy.release()


class _Handler(UnixHandler):
    control: Control

    def do_GET(self) -> None:  # noqa: N802  # the name that http.server calls
        kind, _, hours = self.path.strip("/").partition("/")
        if kind == DRIFT and (not hours or hours.isdecimal()):
            drift = self.control.fleet.drift
            drift.look(time.time())
            self.answer(200, json.dumps(drift.report(int(hours or 0))).encode())
            return
        self.answer(200, json.dumps(self.control.state()).encode())

    def do_POST(self) -> None:  # noqa: N802
        try:
            length = min(int(self.headers.get("Content-Length", "0")), MAX_BODY)
            kind = self.path.strip("/")
            given = _given(kind, json.loads(self.rfile.read(length)))
        except (ValueError, KeyError, TypeError) as error:
            self.answer(400, json.dumps({"error": f"/{kind}: {error}"}).encode())
            return
        self.head(200)
        for line in self.control.ask(kind, given):
            with contextlib.suppress(OSError):  # whoever asked has gone: the change goes on
                self.wfile.write(line.encode() + b"\n")
                self.wfile.flush()


@contextlib.contextmanager
def control_socket(fleet: Fleet) -> Iterator[Control]:
    """Listens while the block runs, and leaves word beside the run."""
    control = Control(fleet)
    handler = type("Handler", (_Handler,), {"control": control})
    path = fleet.private / "control"
    word = Run(fleet.release.parent).servers / f"{os.getpid()}.json"
    server = UnixServer(path, handler)
    server.start()
    with contextlib.suppress(OSError):  # a run that is mounted read-only is changed by starting its server again
        word.parent.mkdir(exist_ok=True)
        write_json(word, {"pid": os.getpid(), "socket": str(path)})
    try:
        yield control
    finally:
        server.stop()
        with contextlib.suppress(OSError):  # the same
            word.unlink()


# -- the other side ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class RunningServer(Running):
    """A server of a run, and what it is told to do."""

    def drift(self, hours: int) -> list[dict[str, Any]]:
        """``serving.drift.Drift.report``; raises ServerError where it does not answer."""
        connection = UnixConnection(self.socket, ASK_S)
        try:
            connection.request("GET", f"/{DRIFT}/{hours}")
            report: list[dict[str, Any]] = json.loads(connection.getresponse().read())
        except (OSError, HTTPException, ValueError) as error:
            raise ServerError(f"server {self.pid}: does not say how its requests drift: {error}") from None
        finally:
            connection.close()
        return report

    def serve(self, version: int, say: Callable[[str], None], least_quality: float = 0.0) -> None:
        """Has it serve a version; raises ServerError with its reason where it does not."""
        if error := self._change(SERVE, {"version": version, "least_quality": least_quality}, say):
            stays = "" if error == ENDED else f"stays with version {self.state['version']}: "
            raise ServerError(f"server {self.pid}: {stays}{error}")

    def scale(self, replicas: int, say: Callable[[str], None]) -> None:
        """Has it run so many servers; raises ServerError with its reason where it does not."""
        self._asked(SCALE, {"replicas": replicas}, say)

    def rollout(self, plan: Plan, say: Callable[[str], None]) -> None:
        """Has it try a version; raises ServerError with its reason where it does not."""
        self._asked(ROLLOUT, asdict(plan), say)

    def promote(self, say: Callable[[str], None]) -> None:
        """Has it serve the version on trial to everyone; raises as above."""
        self._asked(PROMOTE, {}, say)

    def withdraw(self, say: Callable[[str], None]) -> None:
        """Has it end the trial; raises as above."""
        self._asked(WITHDRAW, {}, say)

    def _asked(self, kind: str, given: dict[str, Any], say: Callable[[str], None]) -> None:
        if error := self._change(kind, given, say):
            raise ServerError(f"server {self.pid}: {error}")

    def _change(self, kind: str, given: dict[str, Any], say: Callable[[str], None]) -> str:
        """Why it was not done, or ""."""
        connection = UnixConnection(self.socket, LONGEST_S)
        try:
            connection.request("POST", f"/{kind}", json.dumps(given))
            last = ""
            for raw in connection.getresponse():
                if last:
                    say(last)
                last = raw.decode().strip()
            return str(json.loads(last)["error"])
        except (OSError, HTTPException, ValueError, KeyError):  # cut off in the middle of a line, or before any
            return ENDED
        finally:
            connection.close()


def running_servers(run: Run) -> list[RunningServer]:
    """Servers of ``run`` that answer."""
    return [RunningServer(server.pid, server.socket, server.state) for server in running(run)]
