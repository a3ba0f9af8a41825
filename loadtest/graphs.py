"""How fast the retrieval and ranking graphs of several runs are, in one run, taking turns.

    python -m loadtest.graphs artifacts/ml-1m artifacts/ml-1m/compressed/pruned --batch 1 --batch 16

Each folder is a compiled run (``vivace compile`` or ``vivace compress``). Every round measures each of them once, in an
order that changes; the figure is the median over the rounds, the ratio is to the first folder. ``--eager`` adds PyTorch
on the first run's models. The requests are those that the first run recorded. The last line of stdout is one JSON
object.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from loadtest.requests import recorded
from preprocessing import contract as c
from preprocessing.prepare import Features
from serving.feature_store import LmdbStore
from serving.stages import FeatureTransform, Row
from training.export import session
from training.presets import PRESET, from_json
from training.ranking_model import RankingGraph
from training.retrieval_model import RetrievalGraph
from training.targets import on_openvino
from training.train import WEIGHTS, load_retrieval
from training.train_ranking import load_ranker
from vivace.artifacts import commit, read_manifest
from vivace.doctor import cpu


class Graphs:
    """The two graphs of a compiled run. ``graphs(inputs)`` answers a batch of ready tensors."""

    def __init__(self, root: Path, threads: int) -> None:
        read_manifest(root / "compiled", "vivace compile")
        card = json.loads((root / "compiled" / "model_card.json").read_text())
        self.shapes = c.StageTensors(**card["shapes"])
        self.retrieval = session(root / "compiled" / "retrieval.onnx", threads)
        self.ranking = session(root / "compiled" / "ranking.onnx", threads)
        self.bytes = sum((root / "compiled" / f"{n}.onnx").stat().st_size for n in (c.RETRIEVAL, c.RANKING))

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        names = [t.name for t in c.retrieval_inputs(self.shapes)]
        found = self.retrieval.run(None, dict(zip(names, inputs, strict=True)))
        names = [t.name for t in c.ranking_inputs(self.shapes)]
        ranked: list[np.ndarray] = self.ranking.run(None, dict(zip(names, (inputs[0], *found), strict=True)))
        return ranked


class Eager:
    """The same two graphs of a run by PyTorch, as it runs them without compilation."""

    def __init__(self, root: Path, threads: int, like: Graphs) -> None:
        preset, features = from_json(json.loads((root / PRESET).read_text())), Features(root / "features")
        torch.set_num_threads(threads)
        s = self.shapes = like.shapes
        self.retrieval = RetrievalGraph(load_retrieval(features, preset, root).cpu(), s.candidates, s.memory).eval()
        self.ranking = RankingGraph(load_ranker(features, preset, root).cpu()).eval()
        self.bytes = sum((root / n / WEIGHTS).stat().st_size for n in (c.RETRIEVAL, c.RANKING))

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        tensors = [torch.from_numpy(x) for x in inputs]
        with torch.inference_mode():
            ranked = self.ranking(tensors[0], *self.retrieval(*tensors))
        return [x.numpy() for x in ranked]


class OpenVino:
    """The two graphs of a compiled run under OpenVINO, in float32."""

    def __init__(self, root: Path, threads: int) -> None:
        card = json.loads((root / "compiled" / "model_card.json").read_text())
        s = self.shapes = c.StageTensors(**card["shapes"])
        files = [root / "compiled" / f"{n}.onnx" for n in (c.RETRIEVAL, c.RANKING)]
        self.runs = [on_openvino(f, threads) for f in files]
        self.names = [[t.name for t in side] for side in (c.retrieval_inputs(s), c.ranking_inputs(s))]
        self.bytes = sum(f.stat().st_size for f in files)

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        found = self.runs[0](dict(zip(self.names[0], inputs, strict=True)))
        return self.runs[1](dict(zip(self.names[1], (inputs[0], *found), strict=True)))


Engines = Graphs | Eager | OpenVino


def batches_of(root: Path, shapes: c.StageTensors, batch: int, count: int) -> list[list[np.ndarray]]:
    """Inputs of the retrieval graph for recorded requests."""
    store = LmdbStore(root / "feature_store", readonly=True)
    seen = c.DataSchema.load(root / "compiled" / "schema.json").exclude_seen
    transform = FeatureTransform(root / "features" / "transform_request.onnx", store, shapes, seen)
    histories = recorded(root)[c.ITEM].tolist()
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
    store = first if (first / "feature_store").exists() else first.parents[1]
    inputs = {(name, size): batches_of(store, g.shapes, size, 64) for name, g in graphs.items() for size in batches}
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        order = list(inputs)
        rng.shuffle(order)
        for name, size in order:
            times.setdefault((name, size), []).append(milliseconds(graphs[name], inputs[name, size], seconds))
    found = []
    for name, g in graphs.items():
        for size in batches:
            own = np.array(times[name, size])
            ratio = float(np.median(np.array(times[str(first), size]) / own))
            found.append(Speed(name, size, round(float(np.median(own)), 3), round(ratio, 2), g.bytes))
    return found


def main(
    runs: Annotated[list[Path], typer.Argument(help="compiled runs; the first is the reference")],
    batch: Annotated[list[int], typer.Option(help="sizes of a batch")] = [1, 16],  # noqa: B006 - typer reads the default
    rounds: int = 7,
    seconds: Annotated[float, typer.Option(help="of one measurement")] = 1.0,
    threads: Annotated[int, typer.Option(help="of ONNX Runtime, PyTorch and OpenVINO")] = 1,
    eager: Annotated[bool, typer.Option(help="PyTorch on the first run's models too")] = False,
    openvino: Annotated[bool, typer.Option(help="OpenVINO on the same graphs too")] = False,
) -> None:
    found = measure(runs, batch, rounds, seconds, threads, eager, openvino)
    for x in found:
        print(
            f"{x.run:60} batch {x.batch:3}  {x.ms:8.2f} ms  {x.ratio:5.2f} times the first  {x.bytes / 2**20:7.1f} MiB"
        )
    rows = [asdict(x) for x in found]
    print(json.dumps({"benchmark": "graphs", "threads": threads, "rows": rows, "cpu": cpu()[0], "commit": commit()}))


if __name__ == "__main__":
    typer.run(main)
