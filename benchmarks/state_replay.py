"""What the cache of states is worth on a real log: its users' histories grow as they did, each page is asked for.

    python -m benchmarks.state_replay artifacts/ml-1m --out docs/benchmarks/state_replay.json

Of each chosen user the first ``--past`` events are there; the others come in the order of time. Events of one moment
are one page: they are stored, then a request follows; a user who comes back after half an hour asks before that too, so
such a request finds nothing new. Two servers, profile ``fused``, one with the cache, read one store and are asked each
request one at a time, in changing order; their answers are compared. ``--length 0`` takes the run's models; another
length takes untrained ones of the preset ``cpu``'s size that read so many events (they do not change the time). The
last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.replay import PAUSE_MS
from benchmarks.state_reuse_served import ANEW, REUSED, SEED, SETTLE_S, Pair, apart, both, compiled, counted, in_words
from loadtest.reports.record import record_line
from preprocessing.features import Features
from vivace.run import Run
from vivace.store.interface import Event
from vivace.store.lmdb_store import LmdbStore, fill_store

Page = tuple[str, list[Event]]  # a user and what came with the request


def pages_of(events: list[Event]) -> Iterator[tuple[int, Page]]:
    """(time, page) of one user's events in the order of time."""
    last = events[0].timestamp_ms
    for time_ms, group in groupby(events, key=lambda e: e.timestamp_ms):
        if time_ms - last > PAUSE_MS:
            yield time_ms, (events[0].user_id, [])
        last = time_ms
        yield time_ms, (events[0].user_id, list(group))


def log_of(store: LmdbStore, least: int, past: int, requests: int) -> tuple[dict[str, list[Event]], list[Page]]:
    """(what is there before, pages in the order of time) of users with ``least`` events and more, drawn until they
    make so many requests. Raises ValueError where there are too few."""
    users = sorted(store.users())
    random.Random(SEED).shuffle(users)
    before: dict[str, list[Event]] = {}
    pages = list[tuple[int, Page]]()
    for user in users:
        events = sorted(store.events(user), key=lambda e: e.timestamp_ms)
        if len(events) >= max(least, past + 1):
            before[user] = events[:past]
            pages += pages_of(events[past:])
        if len(pages) >= requests:
            break
    else:
        raise ValueError(f"--requests: expected at most {len(pages)}, what this log's users give, got {requests}")
    return before, [page for _, page in sorted(pages, key=lambda p: p[0])]


def replayed(pair: Pair, store: LmdbStore, pages: list[Page], turns: int) -> dict[str, Any]:
    """All pages in ``turns`` parts."""
    for form in (ANEW, REUSED):  # whoever is nobody: what a first request costs is no one's
        pair.ask(form, "nobody")
    ms, cpu = ({form: list[float]() for form in (ANEW, REUSED)} for _ in range(2))
    same, tied, far = 0, 0, 0.0
    for part in np.array_split(np.arange(len(pages)), turns):
        used, took = pair.used(), {form: list[float]() for form in (ANEW, REUSED)}
        for number in part:
            user, events = pages[number]
            store.append(events)
            answers = {}
            for form in (ANEW, REUSED) if number % 2 else (REUSED, ANEW):
                began = time.perf_counter()
                answers[form] = pair.ask(form, user)
                took[form].append((time.perf_counter() - began) * 1000)
            equal, but_ties, by = apart(answers[REUSED], answers[ANEW])
            same, tied, far = same + equal, tied + but_ties, max(far, by)
        for form, seconds in pair.used().items():
            cpu[form].append((seconds - used[form]) * 1000 / len(part))
            ms[form].append(float(np.median(took[form])))
    time.sleep(SETTLE_S)
    pair.ask(REUSED, "nobody")  # counters come with a later batch
    rows = counted(pair.servers[REUSED])
    shares = {how: rows[how] / len(pages) for how in ("hit", "grown", "missed")}
    return {
        "requests": len(pages), "same_top": same, "same_but_ties": tied, "scores_apart": far, "shares": shares,
        "evicted": rows["evicted_total"], "bytes": rows["bytes"], "processor_ms": both(cpu), "p50_ms": both(ms),
    }  # fmt: skip


def main(
    root: Annotated[Path, typer.Argument(help="a run that was prepared from a log with times, such as ML-1M's")],
    length: Annotated[int, typer.Option(help="events that are read, by untrained models; 0: the run's own", min=0)] = 0,
    least: Annotated[int, typer.Option(help="users with so many events at least", min=1)] = 200,
    past: Annotated[int, typer.Option(help="events of each that are there before", min=0)] = 100,
    requests: Annotated[int, typer.Option(help="about", min=10)] = 2100,
    turns: Annotated[int, typer.Option(help="parts that the replay is cut into", min=1)] = 5,
    room_mb: Annotated[int, typer.Option(help="of the cache", min=1)] = 64,
    out: Annotated[Path | None, typer.Option(help="JSON of all figures")] = None,
) -> None:
    torch.set_num_threads(1)
    recorded = LmdbStore(Run(root).feature_store, readonly=True)
    before, pages = log_of(recorded, least, past, requests)
    recorded.close()
    with tempfile.TemporaryDirectory() as name, ExitStack() as life:
        copy = Run(Path(name) / "run")
        copy.root.mkdir()
        if length:
            (copy.root / "features").symlink_to(Run(root).features.resolve())
            compiled(Features(copy.features), length, copy.root)
        else:
            shutil.copytree(Run(root).repository, copy.repository)
        parts = (lambda e: e.item_id, lambda e: e.event_type, lambda e: e.timestamp_ms)
        rows = ((user, *([part(e) for e in events] for part in parts)) for user, events in before.items())
        fill_store(copy.feature_store, rows, ())  # type: ignore[arg-type]
        store = LmdbStore(copy.feature_store)
        life.callback(store.close)
        figures = replayed(Pair(life, copy.root, room_mb), store, pages, turns)
        at_the_end = [len(history or []) for history in store.histories(list(before))]
    figures |= {
        "length": length, "users": len(before), "past": past, "at_the_end": float(np.median(at_the_end)),
        "events": sum(len(events) for _, events in pages), "room_mb": room_mb, "trained": not length,
    }  # fmt: skip
    typer.echo(f"{len(before)} users, {in_words(figures)}; scores {figures['scores_apart']:.2g} apart")
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n")
    typer.echo(record_line("state_replay", data=root.name, figures=figures))


if __name__ == "__main__":
    typer.run(main)
