"""Hostile accounts that click one item: into how many people's answers they push it, with and without limits of what
one user counts.

    python -m benchmarks.push --name globo --accounts 1,10,100 --events 1,10,100

A run with live counters answers validation requests as it is served, by ``LiveTable`` and the run's own models. Before
each of some moments so many accounts click a target so often, evenly in the minutes before it; all clicks of an account
are of one visit, in the context of an event that just came. Targets are items of the training events that nobody
clicked in the last hour. A row is a budget under a limit: the share of answers whose first ten hold the target (mean
over targets and moments, with its 95 % interval over targets), the median of its rank, and the clicks that counted. The
quality of each limit is NDCG@10 of test requests, or of validation requests of people whom the ranker has not learned
from, without any attack, paired by request. The last line of stdout is one JSON object.
Axis legend: B requests, N candidates, V item ids, C columns of the context.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import torch
import typer

from loadtest.reports.record import record_line
from preprocessing.features import Features
from training.data import batches
from training.data.counters import popularity
from training.judge.evaluate import Models
from training.learn.ranker import held_out_users
from training.metrics import bootstrap, ndcg_of
from training.presets import Preset, from_json, shapes
from training.scoring import SCORED
from vivace.cli.options import console
from vivace.cli.values import choice
from vivace.context import ContextColumns
from vivace.contract import FIRST_ID, TARGET_TIME
from vivace.limits import CountLimits
from vivace.live import LiveTable, Stream
from vivace.run import RANKING, Run

HOUR_MS, TOP = 3_600_000, 10
LIMITS = {
    "none": CountLimits(),
    "an item once in 30 minutes": CountLimits(same_item_ms=HOUR_MS // 2),
    "10 events in 10 minutes": CountLimits(user_events=10),
    "that, and of newcomers 2 for each other": CountLimits(same_item_ms=HOUR_MS // 2, newcomers=2.0),
}


@dataclass(frozen=True)
class Budget:
    """So many accounts click the target so often each, within ``minutes``; ``old`` of them have clicked another item an
    hour before, so that they are no newcomers."""

    accounts: int
    events: int
    minutes: int = 10
    old: int = 0

    def stream(self, target: int, now_ms: int, recent: Stream, limits: CountLimits, rng: np.random.Generator) -> Stream:
        """The clicks that count, in order of time."""
        users = np.tile(np.arange(self.accounts), self.events)
        times = now_ms - self.minutes * 60_000 + np.arange(len(users)) * self.minutes * 60_000 // len(users)
        context_NC = recent.context[rng.integers(0, len(recent), self.accounts)][users]  # of an account one context
        ids, first = np.full(len(users), target), slice(0, self.old)
        parts = (users, ids, times, context_NC)
        before = users[first], recent.ids[first], np.full(self.old, now_ms - HOUR_MS), context_NC[first]
        of, items, at, context = (np.concatenate(x) for x in zip(before, parts, strict=True))
        return Stream.of(of, items, at, context, limits)


class Moment:
    """A moment of the log: its counters, and the requests that came next."""

    def __init__(self, now_ms: int, table: LiveTable, requests: batches.Requests, context_BC: np.ndarray) -> None:
        self.now_ms, self.table, self.requests, self.context_BC = now_ms, table, requests, context_BC

    def ranks(self, models: Models, target: int, attack: Stream | None) -> np.ndarray:
        """Place of the target in each answer, int64 [B], 0 first; where it is not answered one behind the last."""
        table = self.table
        if attack is not None:
            table = copy.deepcopy(table)
            attack.into(table)
        newest_B = np.array([int(h[-1]) if len(h) else 0 for h in self.requests.histories])
        ids, features = table.rows(self.now_ms).of(self.context_BC, newest_B)
        request = replace(
            self.requests, rising_BM=torch.from_numpy(ids), live_BMF=torch.from_numpy(features.astype(np.float32))
        )
        proposed = models.retrieve(request)
        logits_BN = models.logits(request, proposed)[..., 0]
        logits_BN = logits_BN.masked_fill(proposed.ids_BN < FIRST_ID, -torch.inf)
        order_BN = proposed.ids_BN.gather(1, logits_BN.argsort(dim=1, descending=True))
        hit_BN = order_BN == target
        return torch.where(hit_BN.any(1), hit_BN.int().argmax(1), hit_BN.shape[1]).numpy()


def moments_of(features: Features, preset: Preset, models: Models, count: int, people: int) -> Iterator[Moment]:
    """``count`` moments, evenly among the validation requests in order of time, each with the next ``people`` ones."""
    files = features.files("valid")
    whole = batches.together(list(batches.requests(files, models.heads, preset.encoder.window, SCORED)))
    times = np.concatenate([pq.read_table(f, columns=[TARGET_TIME])[TARGET_TIME].to_numpy() for f in files])
    order = np.argsort(times, kind="stable")
    columns = features.context if preset.ranker.by_context else ContextColumns()
    stream = features.stream(columns, CountLimits.of(shapes(preset, features)))
    table, fed = LiveTable(features.item_count(), preset.ranker.rising, len(columns.counted)), 0
    for start in np.linspace(0, len(order) - people, count).astype(int):
        rows = order[start : start + people]
        now_ms = int(times[rows[0]])
        stop = int(np.searchsorted(stream.times_ms, now_ms))
        stream[fed:stop].into(table)
        fed = stop
        requests = whole.take(rows)
        context = requests.context[0] if requests.context is not None else None
        ids = np.empty((people, 0), np.int64) if context is None else context.numpy()[:, columns.counted]
        table.rows(now_ms)
        yield Moment(now_ms, table, requests, ids)


def pushed(
    features: Features, preset: Preset, models: Models, budgets: list[Budget], moments: int, people: int, targets: int
) -> list[dict[str, Any]]:
    """A row a budget and limit."""
    rng, columns = np.random.default_rng(0), features.context if preset.ranker.by_context else ContextColumns()
    stream, counts_V = features.stream(columns), popularity(features.files("train"), features.item_count())
    seen: dict[tuple[Budget, str], list[tuple[int, np.ndarray, int]]] = {}
    chosen: np.ndarray | None = None
    for moment in moments_of(features, preset, models, moments, people):
        recent = stream[(stream.times_ms < moment.now_ms) & (stream.times_ms > moment.now_ms - HOUR_MS)]
        if chosen is None:
            quiet = np.setdiff1d(np.flatnonzero(counts_V[FIRST_ID:] > 0) + FIRST_ID, recent.ids)
            chosen = rng.choice(quiet, targets, replace=False)
        for target in chosen.tolist():
            before = moment.ranks(models, target, None)
            seen.setdefault((Budget(0, 0), "none"), []).append((target, before, 0))
            for budget in budgets:
                done: dict[tuple[int, ...], np.ndarray] = {}
                for name, limits in LIMITS.items():
                    attack = budget.stream(target, moment.now_ms, recent, limits, np.random.default_rng(target))
                    key = tuple(attack.times_ms.tolist())
                    if key not in done:
                        done[key] = moment.ranks(models, target, attack)
                    seen.setdefault((budget, name), []).append((target, done[key], len(attack)))
        console.print(f"moment {moment.now_ms}: {len(moment.requests.histories)} requests")
    return [row_of(budget, name, measured) for (budget, name), measured in seen.items()]


def row_of(budget: Budget, limit: str, measured: list[tuple[int, np.ndarray, int]]) -> dict[str, Any]:
    by_target: dict[int, list[float]] = {}
    for target, rank_B, _ in measured:
        by_target.setdefault(target, []).append(float((rank_B < TOP).mean()))
    shares = np.array([np.mean(of) for of in by_target.values()])
    every = np.concatenate([rank_B for _, rank_B, _ in measured])
    return {
        "accounts": budget.accounts, "old": budget.old, "clicks": budget.accounts * budget.events, "limit": limit,
        "counted": float(np.mean([n for *_, n in measured])), "top 10": float(shares.mean()),
        "interval": bootstrap(shares), "median rank": float(np.median(every) + 1),
    }  # fmt: skip


def left_out(features: Features, preset: Preset) -> dict[str, float]:
    """Share of the log's own events that each limit leaves out of the counters."""
    columns = features.context if preset.ranker.by_context else ContextColumns()
    every = len(features.stream(columns))
    return {name: 1 - len(features.stream(columns, limits)) / every for name, limits in LIMITS.items()}


def quality(features: Features, preset: Preset, root: Path, seed: int, part: str) -> list[dict[str, Any]]:
    """NDCG@10 of requests of a part without an attack under each limit, of one ranker."""
    rows: list[dict[str, Any]] = []
    base = np.empty(0)
    for name, limits in LIMITS.items():
        limited = replace(
            preset,
            ranker=replace(
                preset.ranker, rising_same_item_s=limits.same_item_ms // 1000, rising_user_events=limits.user_events,
                rising_newcomers=limits.newcomers,
            ),
        )  # fmt: skip
        models, parts = Models(features, limited, root, [RANKING]), []
        for request in models.requests(part):
            if part == "valid":
                request = request.take(np.flatnonzero(held_out_users(request, preset.ranking.held_out, seed)))
            if len(request.target_B):
                proposed = models.retrieve(request)
                parts.append(models.ranked(request, proposed, models.logits(request, proposed)).numpy())
        values = ndcg_of(np.concatenate(parts))
        base = values if not rows else base
        rows.append({
            "limit": name, "NDCG@10": float(values.mean()), "change": float(values.mean() / base.mean() - 1),
            "interval": [x / base.mean() for x in bootstrap(values - base)], "requests": len(values),
        })  # fmt: skip
    return rows


def main(
    name: Annotated[str, typer.Option(help="a trained run with live counters")] = "globo",
    artifacts: Annotated[Path, typer.Option(help="where runs lie")] = Path("artifacts"),
    accounts: Annotated[str, typer.Option(help="by commas")] = "1,10,100",
    events: Annotated[str, typer.Option(help="clicks of each account, by commas")] = "1,10,100",
    moments: int = 5,
    people: Annotated[int, typer.Option(help="requests after each moment")] = 200,
    targets: int = 5,
    old: Annotated[str, typer.Option(help="accounts that clicked another item an hour before, by commas")] = "0",
    judge: Annotated[
        str, choice("--judge", ("valid", "test"), "NDCG@10 under each limit too, of requests of this part; minutes")
    ] = "",
) -> None:
    run = Run(artifacts / name)
    features, preset = Features(run.features), from_json(json.loads(run.preset.read_text()))
    if not preset.ranker.rising:
        raise typer.BadParameter(f"{name}: expected a run with live counters, got ranker.rising 0", param_hint="--name")
    if preset.ranker.shown_rates:
        raise typer.BadParameter(f"{name}: expected a run without ranker.shown_rates", param_hint="--name")
    seed = int(run.manifest(RANKING)["seed"])
    models = Models(features, preset, run.root, [RANKING])
    aged, counts, clicks = ([int(x) for x in text.split(",")] for text in (old, accounts, events))
    budgets = [Budget(a, e, old=o) for a in counts for e in clicks for o in aged if o <= a]
    dropped = left_out(features, preset)
    console.print(f"left out of the counters without an attack: {dropped}")
    rows = pushed(features, preset, models, budgets, moments, people, targets)
    for row in rows:
        console.print(row)
    of_quality = quality(features, preset, run.root, seed, judge) if judge else []
    for row in of_quality:
        console.print(row)
    print(record_line(
        "pushed by hostile accounts", data=name, seed=seed, rows=rows, left_out=dropped, quality=of_quality,
    ))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
