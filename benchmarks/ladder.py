"""The parity ladder: one batch of real requests through every form of a model, each rung against the one before.

    python -m benchmarks.ladder artifacts/ml-1m            PyTorch, ONNX, engine, OpenVINO, served
    python -m benchmarks.ladder artifacts/ml-1m/compressed/small      the whole model's PyTorch before them

Scores are compared item by item, the first ten as sets, NDCG@10 on the same targets. What a rung may lose is in
``TOLERANCES``, with the reason. Exits with 1 if a rung loses more. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.parity import Offline, offline_answers, served_answers
from loadtest.generate.local_server import grpc_address, on_free_ports
from loadtest.reports.record import record_line
from preprocessing.features import Features
from serving.service import service
from training.checkpoints import load_ranker, load_retrieval
from training.compile.engine import Engine
from training.compile.onnx_export import example_requests, export
from training.compile.targets import on_openvino
from training.judge.gate import BOUND
from training.metrics import MISS, bootstrap, ndcg_of
from training.models.ranking import RankingGraph
from training.models.retrieval import RetrievalGraph
from training.presets import Preset, shapes
from vivace import contract
from vivace.run import Run

K = 10


@dataclass(frozen=True)
class Tolerance:
    """``score``: largest difference of an item's score; ``overlap``: least mean share of the first ten in common;
    ``ndcg``: largest relative fall of NDCG@10; and why."""

    score: float
    overlap: float
    ndcg: float
    reason: str


SAME = Tolerance(
    2e-3, 0.995, 0.002,
    "float32 sums in another order: 1e-5; two candidates within that swap their ranks, which the ranker reads",
)  # fmt: skip
TOLERANCES = {
    "same": SAME,
    "fewer bits": Tolerance(np.inf, 0.90, 0.01, "eight bits move scores by about a hundredth; the gate bounds quality"),
    "batch": Tolerance(0.5, 0.95, 0.01, "dynamic int8 scales activations over what shares the batch"),
    "fewer weights": Tolerance(
        np.inf, 0.0, BOUND, "another model: refused where the whole interval of its change lies below the gate's bound"
    ),
}


@dataclass(frozen=True)
class Answers:
    """Item names [users, N] and scores float32 [users, N] of one form of the model, best first."""

    items: np.ndarray
    scores: np.ndarray

    def ndcg(self, targets: list[str]) -> np.ndarray:
        """NDCG@10 of each user's target, float64 [users]."""
        rows = self.items[:, : contract.MAX_TOP_K].tolist()
        return ndcg_of(np.array([row.index(t) if t in row else MISS for row, t in zip(rows, targets, strict=True)]))


@dataclass(frozen=True)
class Rung:
    name: str
    against: str
    kind: str
    score: float
    overlap: float
    ndcg: float
    change: float
    holds: bool


def rung(name: str, kind: str, before: tuple[str, Answers], after: Answers, targets: list[str]) -> Rung:
    """Compares one form with the one before it."""
    t, (against, old) = TOLERANCES[kind], before
    apart, common = 0.0, []
    for a, x, b, y in zip(old.items, old.scores, after.items, after.scores, strict=True):
        known = {item: score for item, score in zip(a, x, strict=True) if item}
        now = {item: score for item, score in zip(b, y, strict=True) if item}
        apart = max([apart, *(abs(float(known[i] - now[i])) for i in now if i in known)])
        first = {i for i in a[:K] if i}
        common.append(len(first & set(b[:K])) / len(first) if first else 1.0)
    each, each_now = old.ndcg(targets), after.ndcg(targets)
    was, ndcg = max(float(each.mean()), 1e-12), float(each_now.mean())
    change = (ndcg - was) / was
    judged = bootstrap(each_now - each)[1] / was if kind == "fewer weights" else change
    overlap = float(np.mean(common))
    holds = apart <= t.score and overlap >= t.overlap and judged >= -t.ndcg
    return Rung(name, against, kind, apart, overlap, ndcg, change, holds)


def _of(offline: Offline) -> Answers:
    return Answers(offline.ranked, offline.scores)


def _names(features: Features) -> np.ndarray:
    return np.array(["", "", "", *features.items()[contract.ITEM]], object)


def climb(features: Features, preset: Preset, root: Path, users: int, whole: tuple[Preset, Path] | None) -> list[Rung]:
    """All rungs of a compiled run; ``whole``: preset and folder of the run that it was compressed from."""
    offline = offline_answers(features, preset, root, users)
    targets, rungs, names = offline.targets, [], _names(features)
    last = ("PyTorch", _of(offline))
    if whole is not None:
        first = ("PyTorch, whole model", _of(offline_answers(features, whole[0], whole[1], users)))
        last = ("PyTorch, compressed", last[1])
        rungs.append(rung(last[0], "fewer weights", first, last[1], targets))
    s = shapes(preset, features)
    request = offline.requests
    feed = request.inputs(s, features.schema.exclude_seen)

    def answers(ranked: list[np.ndarray]) -> Answers:
        return Answers(names[ranked[0]], ranked[1][:, 0])

    def step(name: str, kind: str, ranked: list[np.ndarray], moves: bool = True) -> None:
        nonlocal last
        rungs.append(rung(name, kind, last, answers(ranked), targets))
        if moves:
            last = (name, answers(ranked))

    with tempfile.TemporaryDirectory() as folder:
        step("ONNX Runtime, float32", "same", plain(features, preset, root, Path(folder))(feed))
    run = Run(root)
    card = run.card()
    exact = card["precision"] == card["tables"] == "fp32"
    kind = card["precision"] if card["tables"] == "fp32" else "int8 tables"
    step(f"engine, {kind}", "same" if exact else "fewer bits", Engine(run.compiled, s)(feed))
    try:
        step("OpenVINO", "same" if exact else "fewer bits", by_openvino(run, s, feed), moves=False)
    except (RuntimeError, ValueError) as error:
        Console(stderr=True).print(f"OpenVINO: {str(error).splitlines()[0]}")
    served = by_server(run, offline.histories, min(s.candidates, contract.MAX_TOP_K))
    rungs.append(rung("served", "batch" if card["precision"] == "int8" else "same", last, served, targets))
    return rungs


def by_openvino(run: Run, s: contract.StageTensors, feed: list[np.ndarray]) -> list[np.ndarray]:
    """Outputs of the compiled ranking graph where OpenVINO runs both graphs."""
    graphs = [on_openvino(run.graph(n)) for n in (contract.RETRIEVAL, contract.RANKING)]
    inputs = [[t.name for t in side] for side in (contract.retrieval_inputs(s), contract.ranking_inputs(s))]
    retrieved = graphs[0](dict(zip(inputs[0], feed, strict=False)))
    return graphs[1](dict(zip(inputs[1], (feed[0], *retrieved, *feed[s.passed_on :]), strict=True)))


def by_server(run: Run, histories: list[list[str]], count: int) -> Answers:
    """Answers of the live ensemble, padded to ``count`` items."""
    with service(on_free_ports(run.repository, log=run.server_log), lambda _: None) as (server, _):
        live = served_answers(grpc_address(server), histories)
    items, scores = np.full((len(live), count), "", object), np.zeros((len(live), count), np.float32)
    for i, answer in enumerate(live):
        items[i, : len(answer.items)], scores[i, : len(answer.items)] = answer.items, answer.scores
    return Answers(items, scores)


def plain(features: Features, preset: Preset, root: Path, folder: Path) -> Engine:
    """The float32 graphs without folding, exported anew."""
    s = shapes(preset, features)
    retriever, ranker = load_retrieval(features, preset, root).cpu(), load_ranker(features, preset, root).cpu()
    example = example_requests(features, preset)
    graph = RetrievalGraph(retriever, s.candidates, s.memory)
    sides = [
        [t.name for t in side]
        for side in (contract.retrieval_inputs(s), contract.retrieval_outputs(s), contract.ranking_inputs(s))
    ]
    export(graph, example, sides[0], sides[1], folder / "retrieval.onnx")
    rows = (example[0], *graph(*example), *example[s.passed_on :])
    outputs = [t.name for t in contract.ranking_outputs(s, features.schema.heads)]
    export(RankingGraph(ranker), rows, sides[2], outputs, folder / "ranking.onnx")
    return Engine(folder, s)


def main(
    run: Annotated[Path, typer.Argument(help="a compiled run: artifacts/<name>, or one of its compressed/<variant>")],
    users: Annotated[int, typer.Option(help="test requests")] = 500,
) -> None:
    from vivace.cli.options import chosen_preset

    whole = None
    root = Run(run).whole.root
    if root != run:
        whole = (chosen_preset("", root), root)
    rungs = climb(Features(Run(run).features), chosen_preset("", run), run, users, whole)
    table = Table("rung", "against", "scores apart", "top 10 in common", "NDCG@10", "change", "allowed", "holds")
    for r in rungs:
        t = TOLERANCES[r.kind]
        allowed = f"{t.score:g}, {t.overlap:.1%}, -{t.ndcg:.1%}"
        row = (f"{r.score:.2g}", f"{r.overlap:.2%}", f"{r.ndcg:.4f}", f"{r.change:+.2%}", allowed)
        table.add_row(r.name, r.against, *row, "yes" if r.holds else "NO")
    Console(width=140).print(table)
    for kind in dict.fromkeys(r.kind for r in rungs):
        print(f"{kind}: {TOLERANCES[kind].reason}")
    print(record_line("parity ladder", run=str(run), users=users, rungs=[asdict(r) for r in rungs]))
    if not all(r.holds for r in rungs):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
