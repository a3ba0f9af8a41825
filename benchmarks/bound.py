"""What the machine could do with the served graphs if there were no server and no client: the bound.

transform.onnx, retrieval.onnx and ranking.onnx of the served version, under ONNX Runtime with one thread, in processes
of their own, one a core: threads of one Python process would share its lock.
"""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.synchronize
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from serving.runtime.pipeline import Pipeline
from serving.runtime.stages import Row
from vivace.run import Run
from vivace.store.lmdb_store import LmdbStore

START_S = 120.0  # for all processes to be ready


@dataclass(frozen=True)
class Graphs:
    """Which graphs: the run's folder, the one that is served from, and how much they read (``Pipeline.published``)."""

    root: Path
    folder: Path
    history: int
    ranked: int
    whole: bool

    @contextmanager
    def opened(self) -> Iterator[Pipeline]:
        store = LmdbStore(Run(self.root).feature_store, readonly=True)
        try:
            yield Pipeline.published(self.folder, store, history=self.history, ranked=self.ranked, whole=self.whole)
        finally:
            store.close()


def alone(models: Pipeline, rows: list[Row], count: int) -> dict[str, float]:
    """Latency in ms of one request at a time, and ``cpu_ms``, the processor time of each."""
    for row in rows[:20]:
        models([row])
    times, busy = [], time.process_time()
    for row in itertools.islice(itertools.cycle(rows), count):
        t = time.perf_counter()
        models([row])
        times.append((time.perf_counter() - t) * 1000)
    cpu_ms = (time.process_time() - busy) * 1000 / count
    return {**{f"p{q}_ms": float(np.percentile(times, q)) for q in (50, 95, 99)}, "cpu_ms": cpu_ms}


_worker: dict[str, Any] = {}  # of a process of the pool: its graphs, its requests, and the common start


def _prepare(graphs: Graphs, rows: list[Row], together: multiprocessing.synchronize.Barrier) -> None:
    stack = ExitStack()
    _worker.update(models=stack.enter_context(graphs.opened()), stack=stack, rows=rows, together=together)


def _work(task: tuple[int, int, float]) -> tuple[int, float, float]:
    """(requests answered, seconds, processor seconds) of one process on batches; all processes begin together."""
    number, batch, seconds = task
    models, rows = _worker["models"], _worker["rows"]
    source = itertools.cycle(rows[number * 100 % len(rows) :] + rows)
    models(list(itertools.islice(source, batch)))
    _worker["together"].wait(START_S)
    began, busy, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        models(list(itertools.islice(source, batch)))
        count += batch
    return count, time.perf_counter() - began, time.process_time() - busy


class Bound:
    """One process a core, each with the graphs; they live as long as the block."""

    def __init__(self, graphs: Graphs, rows: list[Row], processes: int) -> None:
        self.processes = processes
        context = multiprocessing.get_context("spawn")
        self.pool = context.Pool(processes, _prepare, (graphs, rows, context.Barrier(processes)))

    def __enter__(self) -> Bound:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.terminate()
        self.pool.join()

    def throughput(self, batch: int, seconds: float) -> dict[str, float]:
        """Requests a second of all processes on batches of ``batch``, and ``cpu_ms``, the processor time of each."""
        tasks = [(number, batch, seconds) for number in range(self.processes)]  # the barrier gives each process one
        answers = self.pool.map_async(_work, tasks, chunksize=1).get(2 * START_S + seconds)
        count = sum(n for n, _, _ in answers)
        return {
            "qps": sum(n / elapsed for n, elapsed, _ in answers),
            "cpu_ms": sum(busy for _, _, busy in answers) * 1000 / count,
        }
