"""How the cost of retrieval and ranking grows: with the catalogue (exact and FAISS), the candidates, the history.

    python -m benchmarks.growth --plot growth.png

Retrieval is the scoring of one state against all items of a synthetic catalogue (``benchmarks.tables``) and the choice
of the best; FAISS searches with the least effort that finds 98 % of the exact candidates. History and candidates:
untrained models of preset ``cpu``, whose weights change no time. One thread, one request at a time, median of the runs.
An exponent is the slope of the line through log(time) over log(size). The last line of stdout is one JSON object.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import faiss
import numpy as np
import torch
import typer

from benchmarks.tables import Scoring, catalogue
from benchmarks.turns import milliseconds
from loadtest.reports.record import record_line
from serving.runtime.item_index import ItemIndex
from training.compile.index import RECALL, Exact, Probe, tune
from training.compile.onnx_export import export
from training.models.item_table import ItemTables
from training.models.ranking import RankingGraph, RankingModel
from training.models.retrieval import RetrievalGraph, RetrievalModel
from training.presets import cpu as cpu_preset
from vivace.contract import FIRST_ID, TaskHead
from vivace.onnx_session import open_session

CATALOGUE = 3000  # items of the models whose history and candidates grow


def exponent(times: dict[int, float]) -> float:
    """Slope of log(time) over log(size)."""
    sizes = np.array(sorted(times), float)
    return float(np.polyfit(np.log(sizes), np.log([times[int(s)] for s in sizes]), 1)[0])


def retrieval(sizes: list[int], candidates: int, folder: Path, seconds: float) -> dict[str, dict]:  # type: ignore[type-arg]
    """Times of the exact graph and of FAISS by number of items, with the recall of FAISS and its effort."""
    exact, approximate, notes = {}, {}, {}
    for items in sizes:
        table, states, _ = catalogue(items, 64, requests=512)
        path = folder / f"{items}.onnx"
        export(Scoring(table, False, candidates), (states[:2],), ["STATES"], ["IDS", "SCORES"], path)
        graph, given = open_session(path), states.numpy()
        exact[items] = milliseconds(lambda i: graph.run(None, {"STATES": given[[i % 512]]}), seconds)  # noqa: B023
        best = np.concatenate([graph.run(None, {"STATES": given[i : i + 8]})[0] for i in range(0, 512, 8)])
        full = np.concatenate([np.zeros((FIRST_ID, 64), np.float32), table.numpy()])
        began = time.perf_counter()
        index = ItemIndex.build(full, np.zeros(len(full), np.float32), threads=os.cpu_count() or 1)
        built = time.perf_counter() - began
        faiss.omp_set_num_threads(1)
        exactly = Exact(full, np.zeros(len(full), np.float32))
        tuned = tune(index, exactly, [Probe("states", given[:256], RECALL)], candidates)
        nearest = index.search(given[256:], candidates)[0]
        held_out = float(np.mean([np.isin(a + FIRST_ID, b).mean() for a, b in zip(best[256:], nearest, strict=True)]))
        approximate[items] = milliseconds(lambda i: index.search(given[[i % 512]], candidates), seconds)  # noqa: B023
        notes[items] = {"effort": tuned.effort, "recall": round(held_out, 4), "built in s": round(built)}
        print(f"{items:>9,} items  exact {exact[items]:7.2f} ms  FAISS {approximate[items]:6.2f} ms  {notes[items]}")
    return {"exact": exact, "FAISS": approximate, "notes": notes}


def models(history: int, candidates: int, folder: Path, seconds: float) -> tuple[float, float]:
    """Times of the retrieval and ranking graphs at one history and number of candidates."""
    preset = cpu_preset()
    retriever = RetrievalModel(replace(preset.encoder, history=history), CATALOGUE, torch.ones(CATALOGUE))
    none = torch.zeros(CATALOGUE, 0)
    followers = torch.randint(FIRST_ID, CATALOGUE, (CATALOGUE, preset.ranker.followers))
    tables = ItemTables(torch.ones(CATALOGUE), followers, torch.rand(followers.shape), none.long(), (), none)
    heads = tuple(h.name for h in (TaskHead("click", float("-inf")), TaskHead("buy", 3.0)))
    ranker = RankingModel(replace(preset.ranker, candidates=candidates), tables, retriever, heads)
    first, second = RetrievalGraph(retriever.eval(), candidates), RankingGraph(ranker.eval(), folded=True)
    ids = torch.randint(FIRST_ID, CATALOGUE, (2, history))
    inputs: tuple[torch.Tensor, ...] = (ids, torch.zeros(2, CATALOGUE, dtype=torch.bool))
    out = []
    for number, graph in enumerate((first, second)):
        path = folder / f"{history}-{candidates}-{number}.onnx"
        names = [f"I{i}" for i in range(len(inputs))]
        with torch.no_grad():
            answers = graph(*inputs)
        export(graph, inputs, names, [f"O{i}" for i in range(len(answers))], path)
        ready = open_session(path)
        feed = {i.name: x[:1].numpy() for i, x in zip(ready.get_inputs(), inputs, strict=True)}
        out.append(milliseconds(lambda _: ready.run(None, feed), seconds))  # noqa: B023
        inputs = (ids, *answers)
    return out[0], out[1]


def main(
    plot: Annotated[Path, typer.Option(help="picture to write")] = Path("growth.png"),
    items: Annotated[list[int], typer.Option(help="sizes of the catalogue")] = [10_000, 100_000, 1_000_000],  # noqa: B006
    sizes: Annotated[list[int], typer.Option(help="of history and of candidates")] = [50, 100, 200, 500, 1000],  # noqa: B006
    candidates: Annotated[int, typer.Option(help="while the catalogue or the history grows")] = 200,
    history: Annotated[int, typer.Option(help="while the candidates grow")] = 200,
    seconds: Annotated[float, typer.Option(help="of one measurement")] = 3.0,
) -> None:
    torch.manual_seed(7)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        times = retrieval(items, candidates, folder, seconds)
        by_candidates = {n: models(history, n, folder, seconds)[1] for n in sizes}
        by_history = {t: models(t, candidates, folder, seconds) for t in sizes}
    curves = {
        "retrieval by items, exact": times["exact"],
        "retrieval by items, FAISS": times["FAISS"],
        "ranking by candidates": by_candidates,
        "retrieval by history": {t: both[0] for t, both in by_history.items()},
        "ranking by history": {t: both[1] for t, both in by_history.items()},
    }
    slopes = {name: round(exponent(curve), 2) for name, curve in curves.items()}
    for name, curve in curves.items():
        row = "  ".join(f"{size:,}: {ms:.2f}" for size, ms in curve.items())
        print(f"{name:28} exponent {slopes[name]:5.2f}   ms at {row}")
    draw(curves, slopes, plot)
    print(record_line(
        "growth", ms={k: {str(s): round(t, 3) for s, t in v.items()} for k, v in curves.items()}, exponents=slopes,
        faiss=times["notes"],
    ))  # fmt: skip


def draw(curves: dict[str, dict[int, float]], slopes: dict[str, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    for axis, kind, label in zip(
        axes, ("by items", "by candidates", "by history"), ("items", "candidates", "events of history"), strict=True
    ):
        for name, times in curves.items():
            if kind in name:
                axis.loglog(list(times), list(times.values()), "o-", label=f"{name}: exponent {slopes[name]:.2f}")
        axis.set_xlabel(label)
        axis.set_ylabel("ms a request, one thread")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
