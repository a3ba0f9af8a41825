"""What the length of a history is worth, and what it costs: on a log whose users come back to what they liked long ago,
or on ML-1M.

    python -m benchmarks.long_histories --artifacts artifacts/long --stochastic 1.6 --out docs/benchmarks/long.json
    python -m benchmarks.long_histories --artifacts artifacts/ml --data ml-1m-benchmark --path /folder/of/ml-1m

Prepares the log (once), trains a small retriever and ranker for each length; then rankers over the retrievers of short
histories that choose among the older events too (``RankerConfig.nearest``), by candidate and by request; with
``--stochastic`` the longest once more. Judged on the test requests like any run: NDCG@10 over all items, of ML-1M less
those seen, with 95 % bootstrap intervals over users. The cost is the processor time of retrieval and ranking, one
request at a time, as exported graphs in this process with one thread, in turns. Models and ranks that are there are not
made again, and ``--out`` is written after each form; give it one core (OMP_NUM_THREADS=1). The last line of stdout is
one JSON object.
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
from preprocessing.readers import SHOP, open_source
from training.checkpoints import load_ranker, load_retrieval
from training.compile.onnx_export import RANKING_AXES, RETRIEVAL_AXES, example_requests, export, names_of
from training.data.rows import values_a_row
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
OF_SHOP = {"users": 500, "items": 1_000, "events": 500_000, "long_taste": 0.6}


@dataclass(frozen=True)
class Task:
    """A prepared log and how much is learned from it: ``past_events`` and ``candidates`` of the rankers."""

    features: Features
    artifacts: Path
    epochs: int
    past_events: int
    candidates: int

    @property
    def events_a_user(self) -> float:
        """Mean number of training events."""
        return values_a_row(self.features.files("train"), [contract.ITEM])


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

    def preset(self, task: Task) -> Preset:
        """Small, so that a core trains it in minutes; about as many events a step whatever the length."""
        step = max(3, int(EVENTS_A_STEP // min(self.reads or self.history, task.events_a_user)))
        return Preset(
            encoder=EncoderConfig(
                width=32, layers=2, heads=2, history=self.history, reads=self.reads, ffn_factor=2, context=False
            ),
            retrieval=RetrievalTraining(
                epochs=task.epochs, batch_size=step, ema=0.99, probe_users=0, stochastic_length=self.stochastic
            ),
            ranker=RankerConfig(
                candidates=task.candidates, experts=2, expert_width=32, nearest=self.nearest, nearest_to=self.to
            ),
            ranking=RankerTraining(
                epochs=6, batch_size=64, past_events=task.past_events, held_out=0.2, learning_rate=4e-3, patience=3
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


def trained(form: Form, task: Task) -> dict[str, float]:
    """Seconds of both trainings; the retriever of a form that chooses is that of the history that it reads."""
    root, chosen = task.artifacts / form.name, form.preset(task)
    run, say = Run(root, task.features.folder), lambda line: typer.echo(f"{form.name}: {line}")
    if form.nearest:
        if not run.retrieval.exists():
            shutil.copytree(Run(task.artifacts / str(form.reads)).retrieval, run.retrieval)
        of_retriever = json.loads((run.retrieval / "manifest.json").read_text())
    else:
        of_retriever = train_retrieval(task.features, chosen, root, SEED, say, quiet=True)
    of_ranker = train_ranker(task.features, chosen, root, SEED, say, quiet=True)
    return {"retriever_s": of_retriever["seconds"], "ranker_s": of_ranker["seconds"]}


def ranks_of(form: Form, task: Task) -> dict[str, np.ndarray]:
    """Ranks int64 [R] of all test requests' targets, and ``events``, how many there are in each history; kept beside
    the models."""
    run = Run(task.artifacts / form.name, task.features.folder)
    kept = run.root / f"ranks-{run.key(RANKING)}.npz"
    if kept.exists():
        return dict(np.load(kept))
    models = Models(task.features, form.preset(task), run.root, [RANKING])
    out: dict[str, list[np.ndarray]] = {"retrieval": [], "ranked": [], "events": []}
    for request in models.requests("test"):
        proposed = models.retrieve(request)
        out["retrieval"].append(proposed.rank_B.numpy())
        out["ranked"].append(models.ranked(request, proposed, models.logits(request, proposed)).numpy())
        out["events"].append(np.array([len(h) for h in request.histories]))
    ranks = {name: np.concatenate(parts) for name, parts in out.items()}
    np.savez(kept, **ranks)
    return ranks


def served(form: Form, task: Task) -> Callable[[int], tuple[float, float]]:
    """Processor ms of (retrieval, ranking) of a request by its number, by the exported graphs."""
    features, root, chosen = task.features, task.artifacts / form.name, form.preset(task)
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


def costs(forms: list[Form], task: Task, turns: int) -> dict[str, Any]:
    """Processor ms a request of each form: the median over turns of a turn's medians."""
    calls = {form.name: served(form, task) for form in forms}
    ms: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _, name in in_turns(turns, list(calls)):
        each = [calls[name](number) for number in range(TIMED)]
        ms[name].append(tuple(np.median(each, axis=0)))  # type: ignore[arg-type]
    return {
        name: {"retrieval_ms": spread([a for a, _ in t]), "ranking_ms": spread([b for _, b in t])}
        for name, t in ms.items()
    }


def judged(ranks: dict[str, np.ndarray], against: dict[str, np.ndarray], long: int) -> dict[str, Any]:
    """NDCG@10 and HR@10 with intervals, of all and of the users of more than ``long`` events; and by stage the paired
    difference from ``against``."""
    row: dict[str, Any] = {"requests": len(ranks["events"])}
    for stage in ("retrieval", "ranked"):
        rank, ndcg = ranks[stage], ndcg_of(ranks[stage])
        apart, of_long = ndcg - ndcg_of(against[stage]), ranks["events"] > long
        row[stage] = {"NDCG@10": float(ndcg.mean()), "interval": bootstrap(ndcg), "HR@10": float((rank < 10).mean())}
        row[f"{stage}_difference"] = [float(apart.mean()), *bootstrap(apart)]
        if of_long.any():
            differs = [float(apart[of_long].mean()), *bootstrap(apart[of_long])]
            row[f"{stage}_of_long"] = {"users": int(of_long.sum()), "NDCG@10": float(ndcg[of_long].mean()),
                                       "difference": differs}  # fmt: skip
    return row


def line(name: str, row: dict[str, Any]) -> str:
    """A row of the table of docs/results.md."""
    cells = [f"{row[s]['NDCG@10']:.4f} ({row[s]['interval'][0]:.3f} to {row[s]['interval'][1]:.3f})"
             for s in ("retrieval", "ranked")]  # fmt: skip
    apart = ["{:+.4f} ({:+.3f} to {:+.3f})".format(*row[f"{s}_difference"]) for s in ("retrieval", "ranked")]
    ms = [with_spread(row[f"{s}_ms"], 2) if f"{s}_ms" in row else "" for s in ("retrieval", "ranking")]
    seconds = f"{row['retriever_s']:.0f} + {row['ranker_s']:.0f}"
    return "| " + " | ".join([name, *cells, *apart, *ms, seconds]) + " |"


def main(
    artifacts: Annotated[Path, typer.Option(help="folder of the data and the runs, one for each --data")],
    data: Annotated[str, typer.Option(help="shop, or another data set of 'vivace prepare'")] = SHOP,
    path: Annotated[Path | None, typer.Option(help="of a data set that is no shop: its folder")] = None,
    lengths: Annotated[str, typer.Option(help="events of a history, by commas")] = "50,200,1000",
    users: Annotated[int | None, typer.Option(help="of the shop, 500 by default", min=1)] = None,
    items: Annotated[int | None, typer.Option(help="of the shop, 1,000 by default", min=40)] = None,
    events: Annotated[int | None, typer.Option(help="of the shop, about; 500,000 by default", min=1)] = None,
    long_taste: Annotated[float | None, typer.Option(help="share of the shop's views that it decides; .6")] = None,
    epochs: Annotated[int, typer.Option(help="of the retrievers", min=1)] = 4,
    stochastic: Annotated[float, typer.Option(help="train the longest with this alpha as well (0: do not)")] = 0.0,
    turns: Annotated[int, typer.Option(help="of the timing (0: none)", min=0)] = 5,
    out: Annotated[Path | None, typer.Option(help="JSON of all figures")] = None,
) -> None:
    torch.set_num_threads(1)
    given = {"users": users, "items": items, "events": events, "long_taste": long_taste}
    size = {name: value for name, value in given.items() if value is not None}
    if data != SHOP and size:
        raise ValueError(f"--data {data}: {', '.join(size)} are of the shop; leave them out")
    sizes = sorted({int(n) for n in lengths.split(",")})
    if len(sizes) < 2:
        raise ValueError(f"--lengths: expected two at least, such as 50,200, got {lengths!r}")
    size = OF_SHOP | size if data == SHOP else {}
    prepare(open_source(data, path, size), PrepareConfig(), artifacts / "long", SEED, typer.echo)
    past_events, candidates = (5, 50) if data == SHOP else (0, 100)
    task = Task(Features(artifacts / "long" / "features"), artifacts, epochs, past_events, candidates)
    forms, rows = forms_of(sizes, stochastic), dict[str, Any]()
    figures: dict[str, Any] = {"data": data, **size, "epochs": epochs, "long": sizes[-2:][0], "rows": rows}

    def write() -> None:
        if out is not None:
            out.write_text(json.dumps(figures, indent=1) + "\n")

    for form in forms:
        seconds = trained(form, task)
        rows[form.name] = seconds | judged(ranks_of(form, task), ranks_of(forms[0], task), figures["long"])
        write()
    for name, ms in (costs(forms, task, turns) if turns else {}).items():
        rows[name] |= ms
    write()
    head = ("history", "retrieval NDCG@10", "ranked NDCG@10", f"retrieval - that of {sizes[0]}", "ranked, so",
            "retrieval, ms", "ranking, ms", "trained in s")  # fmt: skip
    typer.echo("| " + " | ".join(head) + " |")
    typer.echo("|" + "---|" * len(head))
    for name, row in rows.items():
        typer.echo(line(name, row))
    typer.echo(record_line("long_histories", figures=figures))


if __name__ == "__main__":
    typer.run(main)
