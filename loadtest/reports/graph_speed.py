"""How fast the retrieval and ranking graphs of several runs are, in one run, taking turns."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from preprocessing.features import Features
from preprocessing.requests import recorded
from serving.runtime.stages import FeatureTransform, Row
from training.checkpoints import WEIGHTS, load_ranker, load_retrieval
from training.compile.targets import on_openvino
from training.models.ranking import RankingGraph
from training.models.retrieval import RetrievalGraph
from training.presets import from_json
from vivace import contract
from vivace.onnx_session import open_session
from vivace.run import COMPILED, Run
from vivace.store.lmdb_store import LmdbStore


class Graphs:
    """The two graphs of a compiled run. ``graphs(inputs)`` answers a batch of ready tensors."""

    def __init__(self, root: Path, threads: int) -> None:
        run = Run(root)
        run.manifest(COMPILED)
        self.shapes = run.shapes()
        files = [run.graph(n) for n in (contract.RETRIEVAL, contract.RANKING)]
        self.retrieval, self.ranking = (open_session(f, threads) for f in files)
        self.bytes = sum(f.stat().st_size for f in files)

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        names = [t.name for t in contract.retrieval_inputs(self.shapes)]
        retrieved = self.retrieval.run(None, dict(zip(names, inputs, strict=False)))
        names = [t.name for t in contract.ranking_inputs(self.shapes)]
        rows = (inputs[0], *retrieved, *inputs[self.shapes.passed_on :])
        ranked: list[np.ndarray] = self.ranking.run(None, dict(zip(names, rows, strict=True)))
        return ranked


class Eager:
    """The same two graphs of a run by PyTorch, as it runs them without compilation."""

    def __init__(self, root: Path, threads: int, like: Graphs) -> None:
        preset, features = from_json(json.loads(Run(root).preset.read_text())), Features(Run(root).features)
        torch.set_num_threads(threads)
        s = self.shapes = like.shapes
        self.retrieval = RetrievalGraph(load_retrieval(features, preset, root).cpu(), s.candidates, s.memory).eval()
        self.ranking = RankingGraph(load_ranker(features, preset, root).cpu()).eval()
        self.bytes = sum((root / n / WEIGHTS).stat().st_size for n in (contract.RETRIEVAL, contract.RANKING))

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        tensors = [torch.from_numpy(x) for x in inputs]
        with torch.inference_mode():
            retrieved = self.retrieval(*tensors[: len(contract.retrieval_inputs(self.shapes))])
            ranked = self.ranking(tensors[0], *retrieved, *tensors[self.shapes.passed_on :])
        return [x.numpy() for x in ranked]


class OpenVino:
    """The two graphs of a compiled run under OpenVINO, in float32."""

    def __init__(self, root: Path, threads: int) -> None:
        s = self.shapes = Run(root).shapes()
        files = [Run(root).graph(n) for n in (contract.RETRIEVAL, contract.RANKING)]
        self.runs = [on_openvino(f, threads) for f in files]
        self.names = [[t.name for t in side] for side in (contract.retrieval_inputs(s), contract.ranking_inputs(s))]
        self.bytes = sum(f.stat().st_size for f in files)

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        retrieved = self.runs[0](dict(zip(self.names[0], inputs, strict=False)))
        rows = (inputs[0], *retrieved, *inputs[self.shapes.passed_on :])
        return self.runs[1](dict(zip(self.names[1], rows, strict=True)))


Engines = Graphs | Eager | OpenVino


def batches_of(root: Path, shapes: contract.StageTensors, batch: int, count: int) -> list[list[np.ndarray]]:
    """Inputs of the retrieval graph for recorded requests."""
    run = Run(root)
    store = LmdbStore(run.feature_store, readonly=True)
    transform = FeatureTransform(run.features / "transform_request.onnx", store, shapes, run.schema().exclude_seen)
    histories = recorded(root)[contract.ITEM].tolist()
    rows = [Row("", list(h) or None, 10) for h in histories]
    picked = [[rows[(i * batch + j) % len(rows)] for j in range(batch)] for i in range(count)]
    out = [transform(chosen)[0] for chosen in picked]
    store.close()
    return out


def milliseconds(graphs: Engines, inputs: list[list[np.ndarray]], seconds: float) -> float:
    """Mean time of a batch."""
    graphs(inputs[0])
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        graphs(inputs[done % len(inputs)])
        done += 1
    return (time.perf_counter() - started) / done * 1000


@dataclass(frozen=True)
class Speed:
    """Milliseconds of a batch by one engine, its ratio to the first (larger is faster), and the bytes of its files."""

    run: str
    batch: int
    ms: float
    ratio: float
    bytes: int


def measure(
    runs: Sequence[Path],
    batches: Sequence[int],
    rounds: int = 7,
    seconds: float = 1.0,
    threads: int = 1,
    eager: bool = False,
    openvino: bool = False,
) -> list[Speed]:
    """Speeds of the graphs of ``runs``, taking turns; the first is what the ratios refer to."""
    compiled = {str(r): Graphs(r, threads) for r in runs}
    graphs: dict[str, Engines] = dict(compiled)
    if eager:
        graphs["PyTorch " + str(runs[0])] = Eager(runs[0], threads, compiled[str(runs[0])])
    if openvino:
        for r in runs:
            try:
                graphs["OpenVINO " + str(r)] = OpenVino(r, threads)
            except RuntimeError as error:
                print(f"OpenVINO does not take {r}: {str(error).splitlines()[0]}")
    first, rng = runs[0], random.Random(0)
    whole = Run(first).whole.root
    inputs = {(name, size): batches_of(whole, g.shapes, size, 64) for name, g in graphs.items() for size in batches}
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        order = list(inputs)
        rng.shuffle(order)
        for name, size in order:
            times.setdefault((name, size), []).append(milliseconds(graphs[name], inputs[name, size], seconds))
    speeds = []
    for name, g in graphs.items():
        for size in batches:
            ms = np.array(times[name, size])
            ratio = float(np.median(np.array(times[str(first), size]) / ms))
            speeds.append(Speed(name, size, round(float(np.median(ms)), 3), round(ratio, 2), g.bytes))
    return speeds
