"""What features and live counters cost a request: two runs that differ by them, served in turns at one rate.

    python -m benchmarks.live_cost artifacts/news48static artifacts/news48 --turns 5

Both are offered the same requests at random arrivals, by each profile, with the types and the context that each reads,
while events are appended at ``--events`` a second to both, so that the counters have something to count. Figures: p50
and the processor time a request of all the server's processes, and the ratio of the second run to the first, turn by
turn.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.tables import record_line
from benchmarks.turns import in_turns, spread, with_spread
from loadtest.generate.generator import LoadRun, at_rate, messages, run
from loadtest.generate.local_server import grpc_address, on_free_ports
from preprocessing.requests import recorded
from serving.launcher import TritonServer
from vivace import contract
from vivace.client import VivaceClient
from vivace.run import Run

SEED, TOP_K, SLO_MS, WARM_S = 7, 10, 1000.0, 1.0


def _appending(address: str, items: list[str], per_second: float, over: threading.Event) -> threading.Thread:
    """Appends events of ``items`` in turn until ``over``."""

    def append() -> None:
        with VivaceClient(address) as client:
            for number in range(1_000_000):
                if over.wait(1 / per_second):
                    return
                client.append(f"live cost {number % 500}", items[number % len(items)])

    thread = threading.Thread(target=append, daemon=True)
    thread.start()
    return thread


def _offered(address: str, seconds: float, due: np.ndarray, sent: list[bytes]) -> LoadRun:
    return run(address, sent, due, seconds, SLO_MS)


def measured(root: Path, profile: str, qps: float, seconds: float, events: float) -> tuple[float, float]:
    """(p50 in ms, processor time of a request in ms) of one server under load."""
    pool, over = messages(root, TOP_K), threading.Event()
    items = [str(history[-1]) for history in recorded(root)[contract.ITEM][:200]]
    with TritonServer(on_free_ports(Run(root).repository, profile)) as server:
        address = grpc_address(server)
        appending = _appending(address, items, events, over) if events else None
        for length in (WARM_S, seconds):
            outcome, processor_ms = at_rate(partial(_offered, address, length), server.pid, pool, qps, length, SEED)
        over.set()
        if appending is not None:
            appending.join(2)
    if not outcome.answered:
        raise RuntimeError(f"{root.name} {profile or 'default'}: {outcome.refused}")
    return outcome.p50, processor_ms


def main(
    without: Annotated[Path, typer.Argument(help="run without them")],
    with_: Annotated[Path, typer.Argument(metavar="WITH", help="run with them")],
    profile: Annotated[list[str], typer.Option(help="may be given again")] = ["", "fused"],  # noqa: B006
    turns: int = 5,
    qps: float = 50.0,
    seconds: float = 6.0,
    events: Annotated[float, typer.Option(help="appended a second")] = 20.0,
) -> None:
    systems = [(p, root) for p in profile for root in (without, with_)]
    p50, processor = defaultdict[tuple[str, Path], list[float]](list), defaultdict[tuple[str, Path], list[float]](list)
    for turn, (p, root) in in_turns(turns, systems):
        began = time.monotonic()
        figures = measured(root, p, qps, seconds, events)
        p50[p, root].append(figures[0])
        processor[p, root].append(figures[1])
        print(
            f"turn {turn + 1} {p or 'default':8} {root.name:16} p50 {figures[0]:.2f} ms, processor {figures[1]:.2f} ms "
            f"({time.monotonic() - began:.0f} s)",
            flush=True,
        )
    result = {}
    for p in profile:
        for what, of in (("p50", p50), ("processor time", processor)):
            ratios = [b / a for a, b in zip(of[p, without], of[p, with_], strict=True)]
            result[f"{p or 'default'}, {what}"] = {
                "ratio": spread(ratios),
                "without_ms": spread(of[p, without]),
                "with_ms": spread(of[p, with_]),
            }
            print(f"{p or 'default'}, {what}: {with_spread(spread(ratios), 2)} times")
    print(record_line("cost of features and live counters", turns=turns, qps=qps, events=events, results=result))


if __name__ == "__main__":
    typer.run(main)
