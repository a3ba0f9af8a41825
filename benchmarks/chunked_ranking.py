"""What it takes to rank many candidates at once, and in micro-batches of ``vivace compile --at-once``.

    python -m benchmarks.chunked_ranking --out docs/benchmarks/chunked_ranking.json

A ranker of the preset ``cpu``'s size with random weights (they do not change the time) over 20,000 items, a history of
``--history`` events, one request at a time on one thread of ONNX Runtime. Each form runs in a process of its own, so
that its peak of memory is its own: the largest resident set beyond that before the first request. The forms take turns.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.turns import in_turns, spread, with_spread
from loadtest.reports.record import record_line
from vivace import contract

ITEMS, SEED, FOLLOWERS = 20_000, 7, 64
REPEATS = 3
ALL = 0  # at once


def exported(folder: Path, history: int, sizes: list[int]) -> None:
    """The ranking graph in each form."""
    import torch

    from training.compile.graphs.chunked import export_in_chunks
    from training.compile.onnx_export import RANKING_AXES, names_of
    from training.models.item_table import ItemTables
    from training.models.ranking import RankingGraph, RankingModel
    from training.models.retrieval import RetrievalModel
    from training.presets import cpu

    torch.manual_seed(SEED)
    retriever = RetrievalModel(cpu().encoder, ITEMS, torch.rand(ITEMS))
    tables = ItemTables(
        torch.rand(ITEMS) * 50, torch.randint(3, ITEMS, (ITEMS, FOLLOWERS)), torch.rand(ITEMS, FOLLOWERS),
        torch.randint(0, 20, (ITEMS, 1)), (20,), torch.randn(ITEMS, 1),
    )  # fmt: skip
    model = RankingModel(cpu().ranker, tables, retriever, ("click", "buy")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    graph = RankingGraph(model, folded=True)
    example = tuple(torch.from_numpy(x) for x in inputs_of(history, 100))
    s = contract.StageTensors(history, 100, ITEMS, cpu().encoder.width)
    heads = tuple(contract.TaskHead(name, 0.0) for name in ("click", "buy"))
    names = names_of(contract.ranking_inputs(s)), names_of(contract.ranking_outputs(s, heads))
    for size in sizes:
        export_in_chunks(size)(graph, example, *names, folder / f"{size}.onnx", RANKING_AXES)


def inputs_of(history: int, candidates: int) -> list[np.ndarray]:
    rng = np.random.default_rng(SEED)
    ids = rng.choice(np.arange(contract.FIRST_ID, ITEMS), candidates, replace=False)[None]
    scores = np.sort(rng.normal(size=(1, candidates)).astype(np.float32))[:, ::-1].copy()
    return [
        rng.integers(contract.FIRST_ID, ITEMS, (1, history)), ids, scores,
        rng.normal(size=(1, history, 64)).astype(np.float32),
    ]  # fmt: skip


def _kib(of: str) -> int:
    """A figure of this process from the kernel."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(of))
    return int(line.split()[1])


def one(path: Path, history: int, candidates: int) -> dict[str, Any]:
    """Processor time of a request, memory beyond that before, and the answer's digest: in this process."""
    from vivace.onnx_session import open_session

    session = open_session(path)
    given = dict(zip([i.name for i in session.get_inputs()], inputs_of(history, candidates), strict=True))
    session.run(None, {n: v[:, :1] if n.startswith("CANDIDATE") else v for n, v in given.items()})
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    before = _kib("VmRSS")
    ids, values = session.run(None, given)
    peak = _kib("VmHWM") - before
    took = []
    for _ in range(REPEATS):
        began = time.process_time()
        session.run(None, given)
        took.append((time.process_time() - began) * 1000)
    return {"mib": peak / 1024, "ms": float(np.median(took)), "ids": ids[0].tolist(), "scores": values[0, 0].tolist()}


def main(
    history: Annotated[int, typer.Option(help="events", min=1)] = 1_000,
    candidates: Annotated[str, typer.Option(help="numbers of candidates")] = "100,1000,10000",
    at_once: Annotated[str, typer.Option(help="sizes of the micro-batches")] = "128,512",
    turns: Annotated[int, typer.Option(help="of each form", min=1)] = 3,
    out: Annotated[Path | None, typer.Option(help="JSON of all figures")] = None,
) -> None:
    sizes, figures = [ALL, *map(int, at_once.split(","))], []
    with tempfile.TemporaryDirectory() as name:
        exported(Path(name), history, sizes)
        for count in map(int, candidates.split(",")):
            of: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
            for _, size in in_turns(turns, sizes):
                call = f"print(json.dumps(one(Path({str(Path(name) / f'{size}.onnx')!r}), {history}, {count})))"
                code = f"import json; from pathlib import Path; from benchmarks.chunked_ranking import one; {call}"
                ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
                of[size].append(json.loads(ran.stdout.splitlines()[-1]))
            whole = of[ALL][0]
            for size, runs in of.items():
                apart = float(np.abs(np.array(runs[0]["scores"]) - whole["scores"]).max())
                same = float(np.mean(np.array(runs[0]["ids"]) == whole["ids"]))
                ms, mib = spread([r["ms"] for r in runs]), spread([r["mib"] for r in runs])
                figures.append({"candidates": count, "at_once": size, "ms": ms, "mib": mib, "scores_apart": apart,
                                "same_places": same})  # fmt: skip
                typer.echo(
                    f"{count} candidates, {size or 'all'} at once: {with_spread(ms, 1)} ms, {with_spread(mib, 1)} MiB; "
                    f"scores {apart:.1g} apart, {same:.4f} of the places the same"
                )
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n")
    typer.echo(record_line("chunked_ranking", history=history, figures=figures))


if __name__ == "__main__":
    typer.run(main)
