"""Starts the real Triton Inference Server from pip's ``nvidia-pytriton`` wheel and keeps it well.

The wheel carries ``tritonserver``, its Python backend and the local response cache; the Python-based ``onnxruntime``
backend is ours. Everything the server needs beside the model repository lives in one temporary folder that goes when
it stops; its shared-memory segments carry a prefix of their own, so that whatever a dead worker left can be found.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path

import tritonclient.grpc as grpcclient
from tritonclient.grpc import InferenceServerClientPlugin, Request
from tritonclient.utils import InferenceServerException

from serving.door.endpoints import Endpoints, Sockets, Turn
from serving.door.process import DRAIN_S, Door, health_over
from serving.logs import open_log, tail
from serving.process import IDLE_S, become_triton, living_workers, step_aside, step_closer, step_forward
from serving.releases import held, held_from_the_start, verify
from serving.repository import check_profile, models
from serving.runtime.drift import ENVIRONMENT as DRIFT
from serving.segments import Segments
from serving.server_options import ServerOptions, environment, with_files
from serving.start_checks import (
    LEFTOVER,
    PREFIX_FILE,
    check_cache,
    check_exposure,
    check_ports,
    check_store,
    check_trace_url,
    door_options,
    free_port,
    local_address,
    remove_environments,
    sweep_leftovers,
)
from serving.wheel import ServerError, backend_folder, wheel_folder
from vivace import contract
from vivace.client import VivaceClient
from vivace.shard_contract import shard_model
from vivace.store.forgetting import compact, is_due

log = logging.getLogger(__name__)

# what only the launcher may ask: otherwise anyone who reaches the port loads code into the server or takes models away
RESTRICTED = "model-repository,shared-memory,model-config,logging,trace,statistics"
KEY_HEADER = "vivace-key"
LOCK_LOST = "boost::interprocess::lock_exception"
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
TRIES = 5  # of a first start that crashes
UNNOTICED_S = 2.0  # a starting server that has not noticed for so long that a worker ended waits for it for ever


class _WithKey(InferenceServerClientPlugin):
    """Sends the key of the restricted calls with each request."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, request: Request) -> None:
        request.headers[f"triton-grpc-protocol-{KEY_HEADER}"] = self._key


class TritonServer:
    """One running ``tritonserver``; a context manager that is ready inside and leaves nothing behind. ``door``: one
    that stands before others too, and is told of this one, started and stopped by whoever made it; without it a
    guarded server makes its own. ``aside``: until ``take_over`` others have the processors first.

    Attributes: ``http_port``, ``grpc_port``, ``metrics_port`` as bound; ``segments``, its workers' shared memory;
    ``release``, the version that it serves.
    """

    def __init__(self, options: ServerOptions, door: Door | None = None, aside: bool = False) -> None:
        address = local_address(options.host)
        check_exposure(options.host, address, options.guard, options.access, options.shard is not None)
        self.segments = Segments()
        self.options = with_files(options, self.segments)
        self.host = address
        self.address = "127.0.0.1" if address == "0.0.0.0" else address  # where this machine reaches it
        chosen = options if door is None else door.options
        self.http_port, self.grpc_port, self.metrics_port = (
            port or free_port(address) for port in (chosen.http_port, chosen.grpc_port, chosen.metrics_port)
        )
        self._held = contextlib.ExitStack()
        self.release = options.repository
        self._key = secrets.token_urlsafe(32)
        self.door = door
        self._shared_door = door is not None
        self._aside = aside
        self._root: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.log = options.log
        self._log_start = 0  # where this server's own lines begin
        self._launched, self._crashed = 0.0, False  # whether a start crashed

    # -- life --------------------------------------------------------------------------------------
    def __enter__(self) -> TritonServer:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def command(self, root: Path) -> list[str]:
        o = self.options
        command = [
            str(wheel_folder() / "tritonserver" / "bin" / "tritonserver"),
            f"--model-repository={self.release}",
            f"--backend-directory={root / 'backends'}",
            f"--backend-config=python,shm-region-prefix-name={self.segments.prefix}",
            f"--backend-config=onnxruntime,shm-region-prefix-name={self.segments.prefix}",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in self.loads),
            *self._listens(),
            "--metrics-config=summary_latencies=true",
            "--metrics-config=summary_quantiles=0.5:0.01,0.95:0.002,0.99:0.001",
            "--exit-timeout-secs=5",
            "--disable-auto-complete-config",
        ]
        if o.profile:
            command.append(f"--model-config-name={o.profile}")
        if o.cache_bytes:
            command.append(f"--cache-config=local,size={o.cache_bytes}")
            command.append(f"--cache-directory={wheel_folder() / 'tritonserver' / 'caches'}")
        if o.trace_url:
            settings = (
                "mode=opentelemetry", f"rate={o.trace_rate}", "level=TIMESTAMPS", f"opentelemetry,url={o.trace_url}",
                "opentelemetry,resource=service.name=vivace", "opentelemetry,bsp_schedule_delay=1000",
            )  # fmt: skip
            command += [f"--trace-config={s}" for s in settings]
        if o.verbose:
            command.append(f"--log-verbose={o.verbose}")
        return [*command, *o.extra]

    @property
    def loads(self) -> list[str]:
        """Models that it loads."""
        if self.options.shard is not None:
            return [shard_model(self.options.shard)]
        return models(self.release, self.options.profile)

    def _listens(self) -> list[str]:
        if self.sockets is not None:  # each appends its port to the address, which only gRPC makes part of the path
            folder = self.sockets.folder
            return [
                a for s in ("http", "grpc", "metrics") for a in (f"--{s}-address=unix:{folder / s}", f"--{s}-port=1")
            ]
        ports = {"http": self.http_port, "grpc": self.grpc_port, "metrics": self.metrics_port}
        flags = [a for s, port in ports.items() for a in (f"--{s}-address={self.host}", f"--{s}-port={port}")]
        if self.options.restricted:
            flags.append(f"--http-restricted-api={RESTRICTED}:{KEY_HEADER}={self._key}")
            flags.append(f"--grpc-restricted-protocol={RESTRICTED}:{KEY_HEADER}={self._key}")
        return flags

    @property
    def sockets(self) -> Sockets | None:
        """Where Triton listens behind the guard."""
        return Sockets(self._root / "sockets") if self.options.guard and self._root is not None else None

    @property
    def drift(self) -> Path | None:
        """Folder in which its workers count what requests look like (``serving.runtime.drift``)."""
        return self._root and self._root / "drift"

    def client(self, timeout_s: float) -> VivaceClient:
        """Asks this server and no other, as whoever started it: behind a door, which it passes by, over HTTP, as
        Triton 2.51 ends by gRPC deadlines that it sees."""
        way = (f"{self.address}:{self.grpc_port}", "grpc")
        if self.sockets is not None:
            way = (f"unix:{self.sockets.http}", "http")
        return VivaceClient(*way, timeout_s=timeout_s, key="", ca="")

    def control_client(self) -> grpcclient.InferenceServerClient:
        """A client that may ask everything: any model, the repository, statistics. For this process alone."""
        if self.sockets is not None:
            return grpcclient.InferenceServerClient(self.sockets.grpc_url)
        client = grpcclient.InferenceServerClient(f"{self.host}:{self.grpc_port}")
        if self.options.restricted:
            client.register_plugin(_WithKey(self._key))
        return client

    def start(self) -> None:
        """Starts and waits until the server and every model are ready. Raises ServerError with the log's end, and
        ValueError for a profile that the repository does not have."""
        o = self.options
        try:
            if o.python == Path(sys.executable):  # another Python's workers find the project by other ways
                metadata.distribution("vivace")
        except metadata.PackageNotFoundError:
            raise ServerError("vivace is not installed in this environment; run 'make setup'") from None
        if not (o.repository / "recommend" / "config.pbtxt").exists():
            raise ServerError(f"model repository: nothing to serve in {o.repository}; run 'vivace compile' first")
        check_profile(o.repository, o.profile)
        check_cache(o.repository, o.profile, o.cache_bytes, o.answer_cache)
        check_trace_url(o.trace_url)
        check_store(o.store)
        self.release = o.repository.resolve()  # whatever is published since, this server stays with it
        verify(self.release)
        self._held.enter_context(held(self.release))
        ports = {"http": self.http_port, "grpc": self.grpc_port, "metrics": self.metrics_port}
        if not self._shared_door:
            check_ports(self.host, {f"--{name}-port": port for name, port in ports.items()})
        sweep_leftovers()
        self._root = Path(tempfile.mkdtemp(prefix=LEFTOVER))
        self._held.enter_context(held_from_the_start(self._root))
        self.log = o.log or self._root / "triton.log"
        (self._root / PREFIX_FILE).write_text(self.segments.prefix)
        backend_folder(self._root)
        if self.sockets is not None:
            self.sockets.folder.mkdir(mode=0o700)
        store = self.release.parent / "feature_store"
        if is_due(store) and not compact(store):
            log.warning("%s: what was forgotten stays in its file, as another process has it open", store)
        self._launch_first()
        if self.sockets is not None and not self._shared_door and o.shard is None:
            folder = self._root / "door"
            folder.mkdir(mode=0o700)
            listens = door_options(self.host, self.http_port, self.grpc_port, self.metrics_port)
            self.door = Door(listens, folder, o.access)
            endpoints: Endpoints = {self.sockets: Turn.TAKES}
            self.door.point(lambda: endpoints)
            self.door.start()

    def take_over(self) -> None:
        """From now on it serves callers, at a server's priority."""
        if self._aside:
            self._aside = False
            step_forward(self.pid)

    def _launch_first(self) -> None:
        """Again where Triton 2.51 crashed, as one start of some hundred does on a busy machine: a worker that gets no
        processor for a second is given up, and freeing its memory ends the server. Again it does not stand aside."""
        for tries in range(TRIES):
            try:
                return self._launch()
            except ServerError as error:
                crashed = self._process is not None and -(self._process.returncode or 0) in CRASHES
                if tries + 1 == TRIES or not (crashed or LOCK_LOST in str(error)):
                    raise
                log.warning("tritonserver %s while starting; starting it again", self.end())
                self._end_process()

    def _launch(self, again: bool = False) -> None:
        """One tritonserver, until it is ready. ``again``: in the place of one that was."""
        assert self._root is not None and self.log is not None
        self._launched = time.time()
        with open_log(self.log) as log:
            self._log_start = log.seek(0, os.SEEK_END)
            self._process = subprocess.Popen(
                self.command(self._root),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment(self.options, self.release) | {DRIFT: str(self.drift)},
                process_group=0,  # Ctrl-C reaches the launcher alone; it then stops the server in order
                preexec_fn=become_triton,
            )
        idle = self._aside and step_aside(self.pid)
        wait_s = self.options.start_timeout_s
        deadline = time.monotonic() + wait_s
        seen: set[int] = set()  # workers
        dead: dict[int, float] = {}  # and since when
        while not self.ready():
            if self._process.poll() is not None:
                self._crashed = True
                raise ServerError(f"tritonserver {self.end()} while starting\n{self.log_tail()}")
            now = living_workers(self.pid)
            seen |= now
            dead = {pid: dead.get(pid, time.monotonic()) for pid in seen - now}
            if again and any(time.monotonic() - since > UNNOTICED_S for since in dead.values()):
                raise ServerError(
                    f"tritonserver: a worker died while starting, which it would wait for\n{self.log_tail()}"
                )
            if time.monotonic() > deadline:
                raise ServerError(f"tritonserver was not ready after {wait_s:.0f} s\n{self.log_tail()}")
            if idle and (self._crashed or time.time() - self._launched > IDLE_S):
                idle = step_closer(self.pid)
            time.sleep(0.05)
        if idle:
            step_closer(self.pid)
        self.segments.close()

    def relaunch(self) -> float:
        """Starts a server again in the place of one that ended, behind the same ports; the seconds it took. Raises
        ServerError if it does not come up."""
        started = time.monotonic()
        self._end_process()
        if self.sockets is not None:
            for socket_file in (self.sockets.http, self.sockets.grpc, self.sockets.metrics):
                socket_file.unlink(missing_ok=True)
        try:
            self._launch(again=True)
        except ServerError:
            self._end_process()  # one that hangs is no server
            raise
        return time.monotonic() - started

    def end(self) -> str:
        """How the server's process ended, in words: its signal or its exit code."""
        code = self._process.returncode if self._process is not None else None
        if code is None:
            return "has not ended"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def ready(self) -> bool:
        """Whether all its models are ready, as it says."""
        return self._health("ready")

    def answers(self) -> bool:
        """Whether it answers at all."""
        return self._health("live")

    def _health(self, question: str) -> bool:
        if self.sockets is not None:
            return health_over(self.sockets.http, question)
        try:
            url = f"http://{self.host}:{self.http_port}/v2/health/{question}"
            with urllib.request.urlopen(url, timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ServerError("tritonserver: not started")
        return self._process.pid

    def log_tail(self, lines: int = 25) -> str:
        return tail(self.log, lines, self._log_start)

    def processes(self) -> set[int]:
        """What this process started and waits for itself."""
        return {self._process.pid} if self._process is not None else set()

    def stop(self) -> None:
        """Refuses what is new, waits for what is under way, ends the whole process group, then removes what it left.
        Behind a door of others nothing is under way any more: it was told to ask this server nothing."""
        if self.door is not None and not self._shared_door:
            self.door.finish()
            self.door.stop()
            self.door = None
        elif self.running() and self.sockets is None:
            self._finish()
        self._end_process()
        self._held.close()
        if self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)
            self._root = None

    def _finish(self) -> None:
        """Without a guard: the ensemble goes first and its calls under way are answered, as Triton, told to end, stops
        the stages before it."""
        with contextlib.suppress(InferenceServerException), self.control_client() as client:
            client.unload_model(contract.ENSEMBLE, unload_dependents=False)
            deadline = time.monotonic() + DRAIN_S
            while time.monotonic() < deadline:
                index = client.get_model_repository_index().models
                if not any(m.name == contract.ENSEMBLE and m.reason != "unloaded" for m in index):
                    return
                time.sleep(0.05)

    def _end_process(self) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)
                try:
                    self._process.wait(10)
                except subprocess.TimeoutExpired:
                    pass
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait()
            remove_environments(self._launched)
        self.segments.remove()
