"""Finds and revives models whose worker process died, and the server itself where that ended.

Triton 2.51 never restarts a killed Python worker, and goes on answering 200 to both readiness probes. So each model
is asked a real question every ``interval_s``, and the worker processes are counted; a model that fails is unloaded and
loaded again (``load`` alone does not help), then the dead worker's shared memory is removed.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import psutil
import tritonclient.grpc as grpcclient
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from serving.health import Health
from serving.launcher import TritonServer
from serving.process import STUB, SilenceWatch, living
from serving.wheel import ServerError
from vivace import contract

log = logging.getLogger("vivace.serve")

LOOK_S = 0.05  # how often the server's own process is looked at
BACK_OFF_S = (0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 2.0, 5.0, 10.0)  # before one that ends again and again is started again
STEADY_S = 1.0  # a server that was ready for so long starts again at once
HUNG_S = 15.0  # a tritonserver, which answers whether it lives without any model, is ended if it does not for so long
SETTLED_S = 2.0  # a worker maps its segment within milliseconds of its making


class Metrics:
    """What the watchdog counts, for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.restarts = Counter("vivace_model_restarts", "Models revived after a dead worker", ["model"], registry=r)
        self.failures = Counter(
            "vivace_model_probe_failures", "Questions a model did not answer", ["model"], registry=r
        )
        self.healthy = Gauge("vivace_model_healthy", "1 if the model answered its last question", ["model"], registry=r)
        self.recovery = Histogram(
            "vivace_model_recovery_seconds", "From noticing a dead worker to the first answer", registry=r,
            buckets=(0.25, 0.5, 1, 2, 3, 5, 10, 30),
        )  # fmt: skip
        self.server_restarts = Counter(
            "vivace_server_restarts", "Times that tritonserver or the door ended by itself", ["which"], registry=r
        )
        self.server_up = Gauge("vivace_server_up", "1 while tritonserver runs and is ready", registry=r)
        self.server_recovery = Histogram(
            "vivace_server_recovery_seconds", "From tritonserver's end until it is ready again", registry=r,
            buckets=(1, 2, 3, 5, 10, 30, 60),
        )  # fmt: skip
        self.swept = Counter("vivace_shm_segments_removed", "Shared memory segments of dead workers", registry=r)


def question(config: pb.ModelConfig, fresh: np.random.Generator | None = None) -> list[grpcclient.InferInput]:
    """The smallest valid request of a model, from its configuration: one row, free axes of length 1, zeros and "".
    ``fresh``: with a history that nobody asked before, so that no cache can answer in a dead worker's place."""
    inputs = []
    items = {t.name: t.dims[-1] for t in config.input}.get("EXCLUDE", contract.FIRST_ID + 1)
    for tensor in config.input:
        shape = [1] * bool(config.max_batch_size) + [d if d > 0 else 1 for d in tensor.dims]
        datatype = pb.DataType.Name(tensor.data_type).removeprefix("TYPE_").replace("STRING", "BYTES")
        item = grpcclient.InferInput(tensor.name, shape, datatype)
        if datatype == "BYTES":
            value = np.full(shape, b"", object)
        elif tensor.name == contract.TOP_K.name:
            value = np.ones(shape, np.int32)
        else:
            value = np.zeros(shape, triton_to_np_dtype(datatype))
            if fresh is not None and tensor.name == "HISTORY_IDS":
                value[..., -4:] = fresh.integers(contract.FIRST_ID, items, value[..., -4:].shape)
        item.set_data_from_numpy(value)
        inputs.append(item)
    return inputs


def died(error: InferenceServerException) -> bool:
    """Whether the error says that the model has no worker; a refusal such as "expected a user id" is life."""
    text = error.message() or ""
    return any(
        sign in text for sign in ("not healthy", "Stub process", "unexpectedly", "is not ready", "no available version")
    )


class Watchdog:
    """Asks every model in turn, in a thread of its own. ``ask_timeout_s`` without any answer counts as dead."""

    def __init__(
        self,
        server: TritonServer,
        metrics: Metrics | None = None,
        interval_s: float = 0.5,
        ask_timeout_s: float = 20.0,
        on_event: Callable[[str], None] | None = None,
    ) -> None:
        self.server, self.interval_s, self.ask_timeout_s = server, interval_s, ask_timeout_s
        self.reload_s = server.options.start_timeout_s / 2  # a model that is not loaded again by then never is
        self.metrics = metrics or Metrics()
        self._say = on_event or log.warning
        self._client = server.control_client()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in (("watchdog", self._run), ("watchdog: silence", self._run_silence))
        ]
        self._questions: dict[str, list[grpcclient.InferInput]] = {}
        self._ensemble: list[grpcclient.InferInput] = []  # its question, where ``recommend`` is one
        self._cached: dict[str, tuple[pb.ModelConfig, float]] = {}  # models with a cache: asked anew now and then
        self._rng = np.random.default_rng()
        self._failures, self._up_since = -1, time.monotonic()  # ends in a row; since when the server is ready
        self.ends = 0  # of tritonserver by itself
        self._workers: dict[int, str] = {}
        self._retired: dict[int, float] = {}  # workers of unloaded instances, and since when
        self.silence = SilenceWatch("tritonserver", HUNG_S, self._say)
        self._starting = False  # a server that starts answers nothing yet
        self._ill: set[str] = set()  # models that are being revived
        self._round = time.monotonic()  # when the last one ended
        self.health = Health(server, self.metrics.registry, {"watchdog": self.fault, "models": self.models_fault})

    def __enter__(self) -> Watchdog:
        for name in self.server.loads:
            if self._client.is_model_ready(name):
                config = self._client.get_model_config(name).config
                self.metrics.healthy.labels(name).set(1)
                self.metrics.restarts.labels(name)
                if config.platform == "ensemble":
                    self._ensemble = question(config)
                else:
                    self._questions[name] = question(config)
                    if config.response_cache.enable and self.server.options.cache_bytes:
                        self._cached[name] = (config, 0.0)
        self._workers = self.workers()
        self.metrics.server_up.set(1)
        for thread in self._threads:
            thread.start()
        self.health.__enter__()
        return self

    def alive_itself(self) -> bool:
        """Whether its threads run."""
        return all(thread.is_alive() for thread in self._threads)

    # -- for the health page -----------------------------------------------------------------------
    def fault(self) -> str:
        """What is wrong with the watchdog itself, or ""."""
        if not self.alive_itself():
            return "ended; start the server again"
        still_s = time.monotonic() - self._round
        late = still_s > self.ask_timeout_s + 10 and not self._ill and self.server.running()
        return f"has asked nothing for {still_s:.0f} s" if late else ""

    def models_fault(self) -> str:
        return f"{', '.join(sorted(self._ill))}: reloading, as they do not answer" if self._ill else ""

    def __exit__(self, *_: object) -> None:
        self.health.__exit__()
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=30)
        self._client.close()

    def workers(self) -> dict[int, str]:
        """Worker processes of the server: pid to the model it serves."""
        workers = {}
        try:
            children = psutil.Process(self.server.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return {}
        for child in children:
            try:
                line = child.cmdline()
                if line and STUB in line[0] and child.status() != psutil.STATUS_ZOMBIE:
                    workers[child.pid] = next((m for m in self._questions if any(f"/{m}/" in a for a in line)), "")
            except psutil.Error:
                continue
        return workers

    def alive(self, model: str) -> bool:
        """Whether ``model`` answers its question."""
        inputs = self._questions.get(model, self._ensemble)
        config, last = self._cached.get(model, (None, 0.0))
        if config is not None and time.monotonic() - last > self.ask_timeout_s:  # seldom: each answer takes up cache
            self._cached[model] = (config, time.monotonic())
            inputs = question(config, self._rng)
        try:
            self._client.infer(model, inputs, request_id=contract.UNLOGGED, client_timeout=self.ask_timeout_s)
        except InferenceServerException as error:
            if died(error):
                return False
            if "Deadline" in str(error):
                self._say(f"{model}: no answer in {self.ask_timeout_s:.0f} s")
                return False
        return True

    def revive(self, model: str) -> float:
        """Unloads and loads ``model`` until it answers; returns the seconds it took. Where that does not end, as a
        worker died that Triton waits for, the server is ended, to be started anew."""
        started, segments = time.monotonic(), self.server.segments.names()
        self._retired.update({pid: started for pid, served in self.workers().items() if served == model})
        self.metrics.healthy.labels(model).set(0)
        self._ill.add(model)
        what = "its worker died" if model in self._questions else "it is not loaded"
        self._say(f"{model}: {what}; reloading it")
        answers, until = False, started + self.reload_s
        while not answers and not self._stop.is_set() and self.server.running():
            try:
                if not self._reloaded(model, until):
                    self._say(f"{model}: not loaded after {time.monotonic() - started:.0f} s; starting the server anew")
                    os.kill(self.server.pid, signal.SIGKILL)
                    break
                answers = self.alive(model)
            except InferenceServerException as error:
                if time.monotonic() < until:
                    self._say(f"{model}: reload failed: {error.message()}; trying again")
            self._stop.wait(0.0 if answers else 0.2)
        seconds = time.monotonic() - started
        removed = self.server.segments.sweep(segments, self.workers())
        self.server.segments.close()
        self.metrics.swept.inc(len(removed))
        self.metrics.restarts.labels(model).inc()
        self.metrics.recovery.observe(seconds)
        self.metrics.healthy.labels(model).set(1)
        self._ill.discard(model)
        if answers:
            self._say(f"{model}: answers again after {seconds:.2f} s; removed {len(removed)} shared memory segments")
        return seconds

    def _reloaded(self, model: str, until: float) -> bool:
        """Unloads and loads a model once; False where ``until``, of ``time.monotonic``, is over: Triton waits for ever
        for a worker that died at once. Raises InferenceServerException, at ``until`` at the latest."""
        for step in (partial(self._client.unload_model, unload_dependents=False), self._client.load_model):
            if (left_s := until - time.monotonic()) <= 0:
                return False
            step(model, client_timeout=left_s)
        return True

    def lost(self) -> set[str]:
        """Models a worker of which has ended since the last round."""
        ended = {pid: model for pid, model in self._workers.items() if model and not living(pid)}
        return {model for pid, model in ended.items() if pid not in self._retired}

    def check(self) -> list[str]:
        """One round: models revived."""
        now = {pid: model for pid, model in self._workers.items() if living(pid)}
        revived: list[str] = []
        for model in self._questions:
            if self._stop.is_set():
                break
            lost = self.lost()
            if len(lost) > max(1, len(self._questions) // 2):  # calls would wait for one dead stage after the other
                self._say("most workers died; starting the server anew, which loads them side by side")
                os.kill(self.server.pid, signal.SIGKILL)
                return revived
            if model in lost or not self.alive(model):
                self.metrics.failures.labels(model).inc()
                self.revive(model)
                revived.append(model)
        if self._ensemble and not self._stop.is_set() and not self._client.is_model_ready(contract.ENSEMBLE):
            self.metrics.failures.labels(contract.ENSEMBLE).inc()
            self.revive(contract.ENSEMBLE)
        self._round = time.monotonic()
        self._workers = self.workers() if revived else now
        self.sweep(self._workers)
        return revived

    def sweep(self, workers: dict[int, str]) -> None:
        """Removes what a reload left: the other workers of a model that was unloaded with a dead one among them may
        stay for ever, and go when they have had the time to finish."""
        for pid, since in list(self._retired.items()):
            if time.monotonic() - since > SETTLED_S:
                if pid not in workers:
                    del self._retired[pid]
                    continue
                os.kill(pid, signal.SIGKILL)
        segments = self.server.segments.names(older_than_s=SETTLED_S)
        if len(segments) > len(workers):  # a worker that someone else's reload started is not among ``workers``
            self._workers = self.workers()
            self.metrics.swept.inc(len(self.server.segments.sweep(segments, self._workers)))

    def bring_back(self) -> None:
        """Starts tritonserver again until it stays, behind the same ports."""
        ended = time.monotonic()
        self.metrics.server_up.set(0)
        self.metrics.server_restarts.labels("tritonserver").inc()
        self.ends += 1
        self._failures = 0 if ended - self._up_since > STEADY_S else self._failures + 1
        wait_s = BACK_OFF_S[min(self._failures, len(BACK_OFF_S) - 1)]
        self._say(f"tritonserver {self.server.end()}; starting it again" + (f" in {wait_s:.1f} s" if wait_s else ""))
        if self._stop.wait(wait_s):
            return
        self._starting = True
        try:
            self.server.relaunch()
        except ServerError as error:
            self._say(f"tritonserver: {error}")
            return
        finally:
            self._starting = False
        self._client.close()
        self._client, self._retired, self._workers = self.server.control_client(), {}, self.workers()
        self._up_since = time.monotonic()
        self.metrics.server_up.set(1)
        self.metrics.server_recovery.observe(self._up_since - ended)
        self._say(f"tritonserver: ready again after {self._up_since - ended:.1f} s")

    def _run(self) -> None:
        """Rounds until the end. Nothing that goes wrong in one ends the thread: with it would go, by PR_SET_PDEATHSIG,
        the server that it started."""
        due = time.monotonic() + self.interval_s
        while not self._stop.wait(LOOK_S):
            try:
                if not self.server.running():
                    self.bring_back()
                elif time.monotonic() >= due:
                    due = time.monotonic() + self.interval_s
                    self.check()
            except InferenceServerException as error:
                self._say(f"watchdog: {error.message()}; asking again")
            except Exception as error:
                log.exception("watchdog")
                self._say(f"watchdog: {type(error).__name__}: {error}; going on")
                self._stop.wait(1.0)

    def _run_silence(self) -> None:
        """Ends a tritonserver that runs and says nothing: in a thread of its own, as the other one may wait for it."""
        while not self._stop.wait(1.0):
            try:
                if self.server.running() and not self._starting:
                    self.silence.look(self.server.pid, self.server.answers())
            except Exception as error:
                self._say(f"{error}; trying again")
