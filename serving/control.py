"""How ``vivace publish`` speaks to a server that runs: HTTP over a Unix socket that only the owner opens.

    artifacts/<run>/servers/<pid>.json      where the server of that process listens, and what it serves

GET /         what is served, as JSON
POST /serve   {"version": 4}: serve that version; lines of text as it goes on, the last one JSON: {"error": "" or why}
POST /scale   {"replicas": 3}: so many servers; answered alike
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from serving.acceptance import Acceptance, recorded_calls
from serving.fleet import Fleet
from serving.process import living
from serving.releases import releases, version_of
from serving.unix_http import UnixHandler, UnixServer
from serving.wheel import ServerError
from vivace.http_pool import UnixConnection
from vivace.manifest import write_json
from vivace.run import Run

ASK_S = 5.0
LONGEST_S = 600.0  # of a change of versions
MAX_BODY = 1 << 16
SERVE, SCALE = "serve", "scale"
ENDED = "the server ended before that was done"
NUMBERS = {SERVE: "version", SCALE: "replicas"}  # what is given with each


@dataclass
class _Task:
    kind: str
    number: int
    lines: queue.Queue[str | None] = field(default_factory=queue.Queue)  # None: it ended
    error: str = ENDED  # until it is done


class Control:
    """Takes tasks in threads of its own and does them in the thread that calls ``work``: what starts a server must live
    as long as it."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._tasks: queue.Queue[_Task] = queue.Queue()
        self._busy = threading.Lock()

    def work(self, wait_s: float) -> None:
        """Does one task, if one comes within ``wait_s``."""
        with contextlib.suppress(queue.Empty):
            task = self._tasks.get(timeout=wait_s)
            try:
                if task.kind == SCALE:
                    self.fleet.scale(task.number, task.lines.put)
                else:
                    self._serve(task)
                task.error = ""
            except Exception as error:  # the server goes on with what it has
                task.error = f"{error}"
            finally:
                task.lines.put(None)

    def _serve(self, task: _Task) -> None:
        release = next((r for r in self._releases() if version_of(r) == task.number), None)
        if release is None:
            there = ", ".join(str(version_of(r)) for r in self._releases())
            raise ServerError(f"version {task.number}: expected one of {there}")
        if release == self.fleet.release:
            task.lines.put(f"{release.name}: is served already")
            return
        accept = Acceptance(recorded_calls(Run(release.parent)))
        self.fleet.serve(release, accept, task.lines.put)

    def _releases(self) -> list[Path]:
        return releases(Run(self.fleet.release.parent).repository)

    def state(self) -> dict[str, Any]:
        server = self.fleet.replicas[0].server
        return {
            "version": version_of(self.fleet.release), "release": str(self.fleet.release),
            "profile": server.options.profile, "ready": self.fleet.ready, "grpc_port": server.grpc_port,
            "replicas": len(self.fleet.replicas),
        }  # fmt: skip

    def ask(self, kind: str, number: int) -> Iterator[str]:
        """Lines of a change, the last one its end as JSON."""
        if not self._busy.acquire(blocking=False):
            yield json.dumps({"error": "another change is under way; try again when it has ended"})
            return
        try:
            task = _Task(kind, number)
            self._tasks.put(task)
            while (line := task.lines.get()) is not None:
                yield line
            yield json.dumps({"error": task.error})
        finally:
            self._busy.release()


class _Handler(UnixHandler):
    control: Control

    def do_GET(self) -> None:  # noqa: N802  # the name that http.server calls
        self.answer(200, json.dumps(self.control.state()).encode())

    def do_POST(self) -> None:  # noqa: N802
        try:
            length = min(int(self.headers.get("Content-Length", "0")), MAX_BODY)
            kind = self.path.strip("/")
            number = int(json.loads(self.rfile.read(length))[NUMBERS[kind]])
        except (ValueError, KeyError, TypeError):
            self.answer(400, json.dumps({"error": 'expected /serve {"version": 4} or /scale {"replicas": 3}'}).encode())
            return
        self.head(200)
        for line in self.control.ask(kind, number):
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
class RunningServer:
    """A server of a run, as it says itself."""

    pid: int
    socket: Path
    state: dict[str, Any]

    def serve(self, version: int, say: Callable[[str], None]) -> None:
        """Has it serve a version; raises ServerError with its reason where it does not."""
        if error := self._change(SERVE, version, say):
            stays = "" if error == ENDED else f"stays with version {self.state['version']}: "
            raise ServerError(f"server {self.pid}: {stays}{error}")

    def scale(self, replicas: int, say: Callable[[str], None]) -> None:
        """Has it run so many servers; raises ServerError with its reason where it does not."""
        if error := self._change(SCALE, replicas, say):
            raise ServerError(f"server {self.pid}: {error}")

    def _change(self, kind: str, number: int, say: Callable[[str], None]) -> str:
        """Why it was not done, or ""."""
        connection = UnixConnection(self.socket, LONGEST_S)
        try:
            connection.request("POST", f"/{kind}", json.dumps({NUMBERS[kind]: number}))
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
    """Servers of ``run`` that answer; word of those that are gone is removed."""
    servers = []
    for word in sorted(run.servers.glob("*.json")):
        try:
            said = json.loads(word.read_text())
            with contextlib.closing(UnixConnection(Path(said["socket"]), ASK_S)) as connection:
                connection.request("GET", "/")
                state = json.loads(connection.getresponse().read())
            servers.append(RunningServer(int(said["pid"]), Path(said["socket"]), state))
        except (OSError, HTTPException, ValueError, KeyError):
            if not living(int(word.stem)):
                word.unlink(missing_ok=True)
    return servers
