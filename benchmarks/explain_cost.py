"""What an explanation costs, and what the model ``explain`` costs whoever does not ask it.

    python -m benchmarks.explain_cost artifacts/shop --turns 5

One run, in turns. Cost of a call: ``recommend`` and ``explain`` of the same users at concurrency 1, on one server: p50
of each and the processor time a call of all the server's processes. Nothing paid: p50 and processor time of
``recommend`` at one rate, of a server with the model and of one whose repository lacks it; as a control a second server
without it. Flood: the same rate while ``--callers`` call ``explain`` without a pause. The last line of stdout is one
JSON object.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.turns import in_turns, spread, with_spread
from loadtest.generate.generator import LoadRun, at_rate, messages, run
from loadtest.generate.local_server import grpc_address, on_free_ports
from loadtest.reports.record import record_line
from preprocessing.requests import recorded, requests_of
from serving.fleet import Fleet
from serving.releases import seal
from vivace.client import VivaceClient, VivaceError
from vivace.explain_contract import EXPLAIN
from vivace.machine import processor_seconds
from vivace.run import Run

SEED, SLO_MS, WARM_S, IDLE_S = 7, 1000.0, 1.0, 2.0
WITHOUT, WITH, CONTROL = "without", "with", "control"


def copies(root: Path, folder: Path) -> dict[str, Path]:
    """Repositories with the model and without it, beside one store."""
    run_, out = Run(root), {}
    shutil.copytree(run_.feature_store, folder / "feature_store")
    for how in (WITH, WITHOUT):
        out[how] = folder / f"model_repository_{how}"
        shutil.copytree(run_.repository, out[how], ignore=shutil.ignore_patterns(*[EXPLAIN] * (how == WITHOUT)))
        seal(out[how])
    return out | {CONTROL: out[WITHOUT]}


def _offered(address: str, seconds: float, due: np.ndarray, sent: list[bytes]) -> LoadRun:
    return run(address, sent, due, seconds, SLO_MS)


def at_one_rate(fleet: Fleet, pool: list[bytes], qps: float, seconds: float) -> tuple[LoadRun, float]:
    """The run, and milliseconds of processor time a request."""
    server = fleet.replicas[0].server
    return at_rate(partial(_offered, grpc_address(server), seconds), server.pid, pool, qps, seconds, SEED)


def calls(fleet: Fleet, users: list[str], top_k: int) -> dict[str, float]:
    """p50 in ms of both calls at concurrency 1, and ms of processor time a call, less what the server takes idle."""
    server, out = fleet.replicas[0].server, dict[str, float]()
    with VivaceClient(grpc_address(server), timeout_s=30) as client:
        client.explain(users[0], top_k=top_k)  # which opens the graphs
        before = processor_seconds(server.pid)
        time.sleep(IDLE_S)
        idle = (processor_seconds(server.pid) - before) / IDLE_S
        for name, call in (("recommend", client.recommend), ("explain", client.explain)):
            times, before, since = list[float](), processor_seconds(server.pid), time.monotonic()
            for user in users:
                began = time.perf_counter()
                call(user, top_k=top_k)
                times.append(time.perf_counter() - began)
            out[f"{name} p50"] = float(np.median(times)) * 1000
            taken = processor_seconds(server.pid) - before - idle * (time.monotonic() - since)
            out[f"{name} processor"] = taken * 1000 / len(users)
    return out


@contextmanager
def flood(fleet: Fleet, users: list[str], callers: int) -> Iterator[dict[str, int]]:
    """``callers`` ask for explanations without a pause; counts of what came."""
    stop, counts = threading.Event(), {"explained": 0, "refused": 0}

    def ask() -> None:
        with VivaceClient(grpc_address(fleet.replicas[0].server), timeout_s=30) as client:
            for number in range(1 << 30):
                if stop.is_set():
                    return
                try:
                    client.explain(users[number % len(users)])
                    counts["explained"] += 1
                except VivaceError:
                    counts["refused"] += 1
                    time.sleep(0.01)  # a caller that is refused does not spin

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def main(
    root: Annotated[Path, typer.Argument(help="a compiled run; it is copied")],
    profile: str = "fused",
    turns: int = 5,
    qps: float = 40.0,
    seconds: float = 6.0,
    top_k: int = 10,
    users: Annotated[int, typer.Option(help="of a turn at concurrency 1")] = 60,
    callers: Annotated[int, typer.Option(help="of the flood")] = 12,
) -> None:
    pool, figures = messages(root, top_k), defaultdict[str, list[float]](list)
    who = [request.user for request in requests_of(recorded(root))][:users]
    with tempfile.TemporaryDirectory() as folder:
        repositories = copies(root, Path(folder))
        for turn, how in in_turns(turns, (WITHOUT, WITH, CONTROL)):
            options = on_free_ports(repositories[how], profile, guard=True)
            with Fleet(options, lambda _: None) as fleet:
                at_one_rate(fleet, pool, qps, WARM_S)
                plain, processor = at_one_rate(fleet, pool, qps, seconds)
                figures[f"{how} p50"].append(plain.p50)
                figures[f"{how} processor"].append(processor)
                if how == WITH:
                    for name, value in calls(fleet, who, top_k).items():
                        figures[name].append(value)
                    with flood(fleet, who, callers) as counts:
                        loaded, _ = at_one_rate(fleet, pool, qps, seconds)
                    for name, of in (("before", plain), ("flood", loaded)):
                        figures[f"{name} p50"].append(of.p50)
                        figures[f"{name} p99"].append(of.p99)
                        figures[f"{name} answered"].append(of.answered / of.due)
                        figures[f"{name} full"].append(of.full)
                    for name, count in counts.items():
                        figures[f"flood {name}"].append(count)
            print(f"turn {turn + 1} {how}: { ({k: round(v[-1], 2) for k, v in figures.items()}) }", flush=True)
    result: dict[str, Any] = {name: spread(values) for name, values in figures.items()}
    ratios = {
        "explain to recommend, p50": ("explain p50", "recommend p50"),
        "explain to recommend, processor": ("explain processor", "recommend processor"),
        "with to without, p50": (f"{WITH} p50", f"{WITHOUT} p50"),
        "with to without, processor": (f"{WITH} processor", f"{WITHOUT} processor"),
        "control to without, p50": (f"{CONTROL} p50", f"{WITHOUT} p50"),
        "control to without, processor": (f"{CONTROL} processor", f"{WITHOUT} processor"),
        "flood to before, p50": ("flood p50", "before p50"),
    }
    for name, (over, under) in ratios.items():
        result[name] = spread([a / b for a, b in zip(figures[over], figures[under], strict=True)])
        print(f"{name}: {with_spread(result[name], 2)}")
    print(record_line("cost of explanations", run=root.name, profile=profile, turns=turns, qps=qps, top_k=top_k,
                      users=users, callers=callers, results=result))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
