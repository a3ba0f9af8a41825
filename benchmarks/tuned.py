"""What tuning brought: the untuned profile and a tuned one in turns at the tuned one's objective.

    python -m benchmarks.tuned --name ml-1m --profile tuned --turns 5

Each turn finds, for both, the largest rate that meets the objective under open-loop load, and the processor time of a
request there (the server's whole process tree); the figure is the median of the turns, with the least and the largest.
Both are served as ``vivace serve`` serves them, limits under overload included. What the tuned one is stands beside it:
layers, precision, events read, candidates ranked. Its ranking quality is a share of the whole model's, paired request
by request, with a 95 % interval: on the validation requests, on which the tuner chose, and on the test requests, which
it did not read. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.knees import AtKnee, seek
from benchmarks.turns import in_turns, spread, with_spread
from loadtest.generate.generator import LoadRun, messages, run
from loadtest.generate.local_server import grpc_address, on_free_ports
from loadtest.reports.record import record_line
from loadtest.tune.decision import shows
from loadtest.tune.offline import gains, share_kept
from loadtest.tune.space import TOP_K, Answer, Objective, Trial, engines, untuned
from serving.fleet import warm_up
from serving.launcher import TritonServer
from serving.repository import served_from
from serving.runtime.pipeline import Pipeline
from training.presets import from_json
from vivace.machine import cores, cpu, memory_mib
from vivace.run import RECORDED_PARTS, Run
from vivace.store.lmdb_store import LmdbStore

console = Console(width=120)
UNTUNED = ""


def decided(root: Path, profile: str) -> dict[str, Any]:
    """The tuner's record of a profile. Raises FileNotFoundError that names the command to run."""
    path = Run(root).tuning / f"{profile}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there; run 'vivace tune --name {root.name} --save-as {profile}' first")
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def engine(root: Path, trial: Trial) -> dict[str, Any]:
    """What answers: layers of the retriever, width, precision, events read and candidates ranked."""
    part = Run(engines(root)[trial.engine])
    preset, card, shapes = from_json(json.loads(part.preset.read_text())), part.card(), part.shapes()
    return {
        "engine": trial.engine or "whole model", "family": preset.encoder.family, "layers": preset.encoder.layers,
        "width": preset.encoder.width, "precision": card["precision"], "tables": card["tables"],
        "events_read": trial.history, "of_events": shapes.history, "candidates_ranked": trial.ranked,
        "of_candidates": shapes.candidates, "layout": trial.layout, "instances": trial.instances,
        "threads": trial.threads, "batch": trial.batch,
    }  # fmt: skip


def quality(root: Path, answer: Answer, bound: float) -> dict[str, dict[str, Any]]:
    """By part of the split: NDCG@10 of the whole model and of ``answer``, the share kept and its 95 % interval, and
    whether that shows the bound."""
    whole, by_part = untuned(root).answer, {}
    store = LmdbStore(Run(root).feature_store, readonly=True)
    try:
        for part in RECORDED_PARTS:
            before, after = (
                np.array(gains(Pipeline.published(engines(root)[a.engine], store, 1, a.history, a.ranked), root, part))
                for a in (whole, answer)
            )
            share, interval = share_kept(before, after)
            by_part[part] = {
                "requests": len(before), "whole_model": round(float(before.mean()), 4),
                "tuned": round(float(after.mean()), 4), "share": round(share, 4),
                "interval": [round(x, 4) for x in interval], "bound": bound, "shown": shows(interval, bound),
            }  # fmt: skip
    finally:
        store.close()
    return by_part


def turn_of(
    root: Path, profile: str, pool: Sequence[bytes], objective: Objective, seconds: float, seed: int, last: float
) -> tuple[AtKnee, float]:
    """(knee, MiB of the server) of one turn of a profile, as it is published."""
    run_folder = Run(served_from(root, profile))
    with TritonServer(on_free_ports(run_folder.repository, profile, Run(root).server_log)) as server:
        warm_up(server)

        def send(due: np.ndarray, sent: list[bytes]) -> LoadRun:
            return run(grpc_address(server), sent, due, seconds, objective.ms)

        at = seek(send, server.pid, pool, seconds, seed, last, objective.attained)
        return at, memory_mib(server.pid)


def take_turns(
    root: Path, profile: str, objective: Objective, turns: int, seconds: float
) -> dict[str, list[tuple[AtKnee, float]]]:
    """What ``turn_of`` says of each turn, by profile."""
    pool = messages(root, TOP_K)
    outcomes: dict[str, list[tuple[AtKnee, float]]] = {UNTUNED: [], profile: []}
    for turn, name in in_turns(turns, list(outcomes)):
        last = outcomes[name][-1][0].rate if outcomes[name] else 0.0
        outcomes[name].append(turn_of(root, name, pool, objective, seconds, 7 + turn, last))
        at = outcomes[name][-1][0]
        console.print(
            f"turn {turn + 1}, {name or 'untuned'}: {at.rate:.0f} requests a second, {at.cpu_ms:.2f} ms CPU a request",
            highlight=False,
        )
    return outcomes


def summary(outcomes: dict[str, list[tuple[AtKnee, float]]], profile: str) -> dict[str, Any]:
    """Rates, processor time and memory with their spread, and the gain turn by turn (none where the untuned profile met
    the objective at no rate)."""
    figures: dict[str, Any] = {
        name or "untuned": {
            "rate": spread([at.rate for at, _ in turns]), "cpu_ms": spread([at.cpu_ms for at, _ in turns]),
            "mib": spread([mib for _, mib in turns]),
        }
        for name, turns in outcomes.items()
    }  # fmt: skip
    pairs = list(zip(outcomes[UNTUNED], outcomes[profile], strict=True))
    if all(before.rate and after.rate for (before, _), (after, _) in pairs):
        figures["gain_rate"] = spread([after.rate / before.rate for (before, _), (after, _) in pairs])
        figures["gain_cpu"] = spread([before.cpu_ms / after.cpu_ms for (before, _), (after, _) in pairs])
    return figures


def print_tables(figures: dict[str, Any], judged: dict[str, dict[str, Any]], title: str) -> None:
    console.print(title, highlight=False)
    table = Table()
    for column in ("", "QPS within the objective", "CPU ms a request", "MiB"):
        table.add_column(column, justify="right" if column else "left")
    for name, f in figures.items():
        if "rate" in f:
            table.add_row(name, with_spread(f["rate"]), with_spread(f["cpu_ms"], 2), f"{f['mib']['median']:.0f}")
    console.print(table)
    if "gain_rate" in figures:
        console.print(
            f"tuned over untuned, turn by turn: {with_spread(figures['gain_rate'], 2)} times the rate, "
            f"{with_spread(figures['gain_cpu'], 2)} times less processor time"
        )
    for part, q in judged.items():
        verdict = "shows" if q["shown"] else "does not show"
        console.print(
            f"NDCG@10 on {part}: {q['tuned']:.4f} of {q['whole_model']:.4f}, {q['share']:.1%} "
            f"({q['interval'][0]:.1%} to {q['interval'][1]:.1%}, {q['requests']:,} requests): "
            f"{verdict} {q['bound']:.1%}"
        )


def main(
    name: str = "shop",
    artifacts: Path = Path("artifacts"),
    profile: Annotated[str, typer.Option(help="saved by vivace tune")] = "tuned",
    turns: Annotated[int, typer.Option(help="of each; 5 or more for a claim")] = 5,
    seconds: Annotated[float, typer.Option(help="of one run under load")] = 5.0,
) -> None:
    root = artifacts / name
    record = decided(root, profile)
    objective, trial = Objective(**record["objective"]), Trial(**record["chosen"]["trial"])
    what = engine(root, trial)
    outcomes = take_turns(root, profile, objective, turns, seconds)
    figures, judged = summary(outcomes, profile), quality(root, trial.answer, objective.quality)
    print_tables(figures, judged, f"{name}: {objective}; {turns} turns on {cores()} cores of {cpu()[0]}")
    console.print(f"{profile}: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in what.items()))
    runs = {n or "untuned": [[asdict(r) for r in at.runs] for at, _ in each] for n, each in outcomes.items()}
    print(record_line(
        "tuned against untuned", data=name, objective=asdict(objective), profile=profile, turns=turns, seconds=seconds,
        figures=figures, engine=what, quality=judged, tuned_by=record["commit"], runs=runs,
    ))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
