"""A long run under half the load that the server takes, with what ordinary and careless callers do: whether memory,
descriptors and shared memory stay flat, and whether every answer is right.

    python -m benchmarks.soak artifacts/shop --minutes 60 --qps 60 --save docs/benchmarks/soak-shop.json

``vivace serve`` runs with its guard on a copy of the run. Calls arrive at random at a fixed rate: ``recommend`` over
gRPC and HTTP with histories whose answers are known, appends, 5 % gRPC calls that are cancelled or time out, 2 %
malformed ones. Now and then a worker is killed. At the end the store is compared with what was acknowledged: every
event once, in order. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.soak_calls import APPENDS, CANCELLED, MALFORMED, Calls
from benchmarks.soak_server import ServedProcess
from loadtest.reports.record import record_line
from preprocessing.requests import recorded
from vivace import contract
from vivace.run import Run
from vivace.store.lmdb_store import LmdbStore

SAMPLE_S = 10.0
SETTLED_MINUTES = 5  # what is flat is compared from here on: buffers grow to their size first
WINDOW = 5  # minutes whose medians are compared, from there and at the end


def copy_of(run: Run, folder: Path) -> Run:
    """The parts of a run that are served, in ``folder``."""
    copy = Run(folder / run.root.name)
    release = run.repository.resolve()
    shutil.copytree(release, copy.root / release.name)
    copy.repository.symlink_to(release.name)
    shutil.copytree(run.feature_store, copy.feature_store)
    return copy


def lost_events(store: Path, calls: Calls) -> list[str]:
    """What was acknowledged and is not stored once and in order, or is stored and was never sent."""
    reader, faults = LmdbStore(store, readonly=True), []
    for user, acknowledged in calls.acknowledged.items():
        stored = [event.item_id for event in reader.events(user)]
        kept = [item for item in stored if item in set(acknowledged)]
        whole = kept == acknowledged if len(stored) < 4096 else kept == acknowledged[-len(kept) :]
        strange = set(stored) - set(acknowledged) - set(calls.unknown[user])
        if not whole or strange or len(set(stored)) != len(stored):
            faults.append(f"{user}: {len(acknowledged)} acknowledged, {len(kept)} stored, {len(strange)} never sent")
    reader.close()
    return faults


async def arrive(calls: Calls, qps: float, until: float, rng: random.Random) -> None:
    """Starts calls at random times, ``qps`` a second on the average, whatever became of those before."""
    running: set[asyncio.Task[None]] = set()
    due = time.monotonic()
    while (now := time.monotonic()) < until:
        if now < due:
            await asyncio.sleep(due - now)
        due += rng.expovariate(qps)
        task = asyncio.create_task(calls.one())
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)


async def kill_workers(server: ServedProcess, every_s: float, until: float, rng: random.Random) -> None:
    while every_s and time.monotonic() + every_s < until:
        await asyncio.sleep(every_s * rng.uniform(0.5, 1.5))
        server.kill_worker(rng)


async def sample(server: ServedProcess, calls: Calls, started: float, until: float, rows: list[dict]) -> None:
    """A row a minute: what was answered, how fast, and the largest of what the server's processes use."""
    while time.monotonic() < until:
        use, ends = server.use(), started + (len(rows) + 1) * 60
        while time.monotonic() < min(ends, until) - SAMPLE_S:
            await asyncio.sleep(SAMPLE_S)
            use = server.larger(use, server.use())
        await asyncio.sleep(max(0.0, min(ends, until) - time.monotonic()))
        rows.append({"minute": len(rows) + 1, **calls.minute(), **use, "killed": server.killed})
        print(json.dumps(rows[-1]), flush=True)


async def soak(server: ServedProcess, calls: Calls, minutes: float, qps: float, kill_every_s: float, seed: int) -> list:
    """Rows of ``minutes`` minutes."""
    await calls.learn()
    rows: list[dict] = []
    started = time.monotonic()
    until = started + minutes * 60
    async with asyncio.TaskGroup() as group:
        group.create_task(arrive(calls, qps, until, random.Random(seed)))
        group.create_task(kill_workers(server, kill_every_s, until, random.Random(seed + 1)))
        group.create_task(sample(server, calls, started, until, rows))
    await calls.close()
    return rows


def growth(rows: list[dict], key: str) -> dict[str, list[float]]:
    """Medians after the server has settled and at the end, by process."""
    first, last = rows[SETTLED_MINUTES : SETTLED_MINUTES + WINDOW] or rows, rows[-WINDOW:]
    names = sorted(set(first[0][key]) & set(last[-1][key]))
    middle = lambda part, name: round(float(np.median([r[key][name] for r in part if name in r[key]])), 1)  # noqa: E731
    return {name: [middle(first, name), middle(last, name)] for name in names}


def main(
    root: Annotated[Path, typer.Argument(help="a compiled run, such as artifacts/shop")],
    minutes: Annotated[float, typer.Option(min=0.1)] = 60,
    qps: Annotated[float, typer.Option(help="half of what the server takes", min=1)] = 60,
    kill_every_s: Annotated[float, typer.Option(help="a worker, about so often (0: none)", min=0)] = 90,
    save: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
    seed: int = 7,
) -> None:
    frame = recorded(root)
    histories = [list(h) for h in frame[contract.ITEM][:300]]
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of(Run(root), Path(folder))
        with ServedProcess(copy) as server:
            calls = Calls(server.grpc_url, server.http_url, histories, seed)
            rows = asyncio.run(soak(server, calls, minutes, qps, kill_every_s, seed))
            metrics = server.metrics()
            code = server.stop(signal.SIGTERM)
        left, ends = server.leftovers(), server.ends()
        lost = lost_events(copy.feature_store, calls)
    for text, count in calls.errors.most_common(12):
        print(f"{count:5}  {text}")
    line = record_line(
        "soak", data=root.name, minutes=minutes, qps=qps, seed=seed, kill_every_s=kill_every_s,
        shares={"cancelled": CANCELLED, "malformed": MALFORMED, "appends": APPENDS}, totals=dict(calls.totals),
        appended=sum(map(len, calls.acknowledged.values())), lost=lost, workers_killed=server.killed,
        pss_mib=growth(rows, "pss_mib"), descriptors=growth(rows, "descriptors"), shm=growth(rows, "shm"),
        errors=dict(calls.errors.most_common(20)), metrics=metrics, exit_code=code, left=left, ends=ends, rows=rows,
    )  # fmt: skip
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(json.dumps(json.loads(line), indent=1))
    print(line)
    if lost or calls.totals["wrong"] or calls.totals["malformed answered"] or code or left:
        raise typer.Exit(1)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        typer.run(main)
