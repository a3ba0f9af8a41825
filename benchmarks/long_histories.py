"""What the length of a history is worth on a log whose users come back to what they liked long ago, and what it costs.

    python -m benchmarks.long_histories --artifacts artifacts/long --out docs/benchmarks/long_histories.json

Prepares the made-up shop with ``long_taste`` (once), trains a small retriever and ranker for each length; then rankers
over the retrievers of short histories that choose among the older events too (``RankerConfig.nearest``), by candidate
and by request. Judged on the test requests like any run: NDCG@10 over all items, seen ones not left out, with 95 %
bootstrap intervals over users. The cost is the processor time of retrieval and ranking, one request at a time, as
exported graphs in this process with one thread, in turns. What is there is not made again; give it one core
(OMP_NUM_THREADS=1). The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.turns import in_turns, spread, with_spread
from loadtest.reports.record import record_line
from preprocessing.features import Features
from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers.shop import Shop, ShopConfig
from training.checkpoints import load_ranker, load_retrieval
from training.compile.onnx_export import RANKING_AXES, RETRIEVAL_AXES, example_requests, export, names_of
from training.intervals import bootstrap, ndcg_of
from training.judge.evaluate import Models
from training.learn.ranker import train_ranker
from training.learn.retriever import train_retrieval
from training.models.ranking import RankerConfig, RankingGraph
from training.models.retrieval import EncoderConfig, RetrievalGraph
from training.presets import Preset, RankerTraining, RetrievalTraining, shapes
from vivace import contract
from vivace.onnx_session import open_session, session_options
from vivace.run import RANKING, Run

SEED, CHOSEN, EVENTS_A_STEP, TIMED = 7, 20, 3_200, 40


@dataclass(frozen=True)
class Form:
    """A length of history, and how much of it what reads: ``reads`` by the encoder (0: all), ``nearest`` chosen."""

    history: int
    reads: int = 0
    nearest: int = 0
    to: Any = "candidate"
    stochastic: float = 0.0

    @property
    def name(self) -> str:
        """For folders and tables."""
        if self.stochastic:
            return f"{self.history}-stochastic"
        return f"{self.reads}+{self.nearest}-of-{self.history}-by-{self.to}" if self.nearest else str(self.history)

    def preset(self, epochs: int) -> Preset:
        """Small, so that a core trains it in minutes."""
        step = max(3, EVENTS_A_STEP // (self.reads or self.history))
        return Preset(
            encoder=EncoderConfig(
                width=32, layers=2, heads=2, history=self.history, reads=self.reads, ffn_factor=2, context=False
            ),
            retrieval=RetrievalTraining(
                epochs=epochs, batch_size=step, ema=0.99, probe_users=0, stochastic_length=self.stochastic
            ),
            ranker=RankerConfig(
                candidates=50, experts=2, expert_width=32, nearest=self.nearest, nearest_to=self.to
            ),
            ranking=RankerTraining(
                epochs=6, batch_size=64, past_events=5, held_out=0.2, learning_rate=4e-3, patience=3
            ),
        )  # fmt: skip


def forms_of(lengths: list[int], stochastic: float) -> list[Form]:
    """Each length but the longest, whole and with a choice among the older events of the longest, of the shortest also
    by request; the longest, whole and trained with windows of stochastic length, if that is asked for."""
    longest = max(lengths)
    short = [n for n in lengths if n < longest]
    whole_and_chosen = [form for n in short for form in (Form(n), Form(longest, n, CHOSEN))]
    last = [Form(longest, stochastic=stochastic)] if stochastic else []
    return [*whole_and_chosen, Form(longest), Form(longest, short[0], CHOSEN, "request"), *last]


def trained(form: Form, features: Features, artifacts: Path, epochs: int) -> dict[str, float]:
    """Seconds of both trainings; the retriever of a form that chooses is that of the history that it reads."""
    root, chosen = artifacts / form.name, form.preset(epochs)
    run, say = Run(root, features.folder), lambda line: typer.echo(f"{form.name}: {line}")
    if form.nearest:
        if not run.retrieval.exists():
            shutil.copytree(Run(artifacts / str(form.reads)).retrieval, run.retrieval)
        of_retriever = json.loads((run.retrieval / "manifest.json").read_text())
    else:
        of_retriever = train_retrieval(features, chosen, root, SEED, say, quiet=True)
    of_ranker = train_ranker(features, chosen, root, SEED, say, quiet=True)
    return {"retriever_s": of_retriever["seconds"], "ranker_s": of_ranker["seconds"]}


def ranks_of(form: Form, features: Features, artifacts: Path, epochs: int) -> dict[str, np.ndarray]:
    """Ranks int64 of all test requests' targets."""
    models = Models(features, form.preset(epochs), artifacts / form.name, [RANKING])
    out: dict[str, list[np.ndarray]] = {"retrieval": [], "ranked": []}
    for request in models.requests("test"):
        proposed = models.retrieve(request)
        out["retrieval"].append(proposed.rank_B.numpy())
        out["ranked"].append(models.ranked(request, proposed, models.logits(request, proposed)).numpy())
    return {name: np.concatenate(parts) for name, parts in out.items()}


def served(form: Form, features: Features, artifacts: Path, epochs: int) -> Callable[[int], tuple[float, float]]:
    """Processor ms of (retrieval, ranking) of a request by its number, by the exported graphs."""
    root, chosen = artifacts / form.name, form.preset(epochs)
    s, run = shapes(chosen, features), Run(root, features.folder)
    retriever, ranker = load_retrieval(features, chosen, root).cpu(), load_ranker(features, chosen, root).cpu()
    example = example_requests(features, chosen)
    first, second = RetrievalGraph(retriever, s.candidates, s.memory), RankingGraph(ranker, folded=True)
    with torch.no_grad():
        ids, scores, encoded = first.eval()(*example)
    given = (example[0], ids, scores, encoded, *example[2:])
    names = names_of(contract.retrieval_inputs(s)), names_of(contract.ranking_inputs(s))
    folder = run.root / "graphs"
    outs = names_of(contract.retrieval_outputs(s)), ["RANKED_IDS", "RANKED_VALUES"]
    export(first, example, names[0], outs[0], folder / "retrieval.onnx", RETRIEVAL_AXES)
    export(second, given, names[1], outs[1], folder / "ranking.onnx", RANKING_AXES)
    sessions = [open_session(folder / f"{n}.onnx", options=session_options(1)) for n in ("retrieval", "ranking")]

    def once(number: int) -> tuple[float, float]:
        row = slice(number % (len(example[0]) - 1), number % (len(example[0]) - 1) + 1)  # the last has no history
        times = []
        for session, tensors, called in zip(sessions, (example, given), names, strict=True):
            inputs = {n: x[row].numpy() for n, x in zip(called, tensors, strict=True)}
            began = time.process_time()
            session.run(None, inputs)
            times.append((time.process_time() - began) * 1000)
        return times[0], times[1]

    return once


def costs(forms: list[Form], features: Features, artifacts: Path, epochs: int, turns: int) -> dict[str, Any]:
    """Processor ms a request of each form: the median over turns of a turn's medians."""
    calls = {form.name: served(form, features, artifacts, epochs) for form in forms}
    ms: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _, name in in_turns(turns, list(calls)):
        each = [calls[name](number) for number in range(TIMED)]
        ms[name].append(tuple(np.median(each, axis=0)))  # type: ignore[arg-type]
    return {
        name: {"retrieval_ms": spread([a for a, _ in t]), "ranking_ms": spread([b for _, b in t])}
        for name, t in ms.items()
    }


def judged(ranks: dict[str, dict[str, np.ndarray]], against: str) -> dict[str, Any]:
    """NDCG@10 and HR@10 with intervals, and the paired difference of the ranked from those of ``against``."""
    out: dict[str, Any] = {}
    for name, of_form in ranks.items():
        row = {}
        for stage, rank in of_form.items():
            ndcg = ndcg_of(rank)
            row[stage] = {
                "NDCG@10": float(ndcg.mean()),
                "interval": bootstrap(ndcg),
                "HR@10": float((rank < 10).mean()),
            }
        apart = ndcg_of(of_form["ranked"]) - ndcg_of(ranks[against]["ranked"])
        out[name] = row | {"ranked_difference": [float(apart.mean()), *bootstrap(apart)]}
    return out


def line(name: str, row: dict[str, Any]) -> str:
    """A row of the table of docs/results.md."""
    cells = [f"{row[s]['NDCG@10']:.4f} ({row[s]['interval'][0]:.3f} to {row[s]['interval'][1]:.3f})"
             for s in ("retrieval", "ranked")]  # fmt: skip
    mean, low, high = row["ranked_difference"]
    ms = [with_spread(row[f"{s}_ms"], 2) for s in ("retrieval", "ranking")]
    seconds = f"{row['retriever_s']:.0f} + {row['ranker_s']:.0f}"
    return "| " + " | ".join([name, *cells, f"{mean:+.4f} ({low:+.3f} to {high:+.3f})", *ms, seconds]) + " |"


def main(
    artifacts: Annotated[Path, typer.Option(help="folder of the data and the runs")],
    lengths: Annotated[str, typer.Option(help="events of a history, by commas")] = "50,200,1000",
    users: Annotated[int, typer.Option(help="of the shop", min=1)] = 500,
    items: Annotated[int, typer.Option(help="of the shop", min=40)] = 1_000,
    events: Annotated[int, typer.Option(help="of the shop, about", min=1)] = 500_000,
    long_taste: Annotated[float, typer.Option(help="share of the views that it decides")] = 0.6,
    epochs: Annotated[int, typer.Option(help="of the retrievers", min=1)] = 4,
    stochastic: Annotated[float, typer.Option(help="train the longest with this alpha as well (0: do not)")] = 0.0,
    turns: Annotated[int, typer.Option(help="of the timing", min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="JSON of all figures")] = None,
) -> None:
    torch.set_num_threads(1)
    shop = Shop(ShopConfig(users=users, items=items, events=events, long_taste=long_taste))
    prepare(shop, PrepareConfig(), artifacts / "long", SEED, typer.echo)
    features, sizes = Features(artifacts / "long" / "features"), [int(n) for n in lengths.split(",")]
    forms = forms_of(sizes, stochastic)
    seconds = {form.name: trained(form, features, artifacts, epochs) for form in forms}
    ranks = {form.name: ranks_of(form, features, artifacts, epochs) for form in forms}
    of_quality, of_cost = judged(ranks, str(sizes[0])), costs(forms, features, artifacts, epochs, turns)
    rows = {name: seconds[name] | of_quality[name] | of_cost[name] for name in ranks}
    head = ("history", "retrieval NDCG@10", "ranked NDCG@10", f"ranked - that of {sizes[0]}", "retrieval, ms",
            "ranking, ms", "trained in s")  # fmt: skip
    typer.echo("| " + " | ".join(head) + " |")
    typer.echo("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        typer.echo(line(name, row))
    figures = {
        "users": users,
        "items": items,
        "events": events,
        "long_taste": long_taste,
        "epochs": epochs,
        "rows": rows,
    }
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n")
    typer.echo(record_line("long_histories", figures=figures))


if __name__ == "__main__":
    typer.run(main)
