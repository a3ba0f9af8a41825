"""Processor time of a request: the server's profiles, the same graphs in process, and Merlin by hand, in turns.

    python -m benchmarks.processor_time artifacts/shop --turns 5                               # ensemble, fused, graphs
    python -m benchmarks.processor_time artifacts/ml --profile fused --merlin --turns 5

All servers are started once and idle while another has its turn: ``--requests`` recorded requests, ``--callers`` at a
time, and the processor time of the server's whole process tree, without the generator's. A rate on cores that others
use as well says little; the processor time says what a request costs. The graphs in process are those of each profile
(``benchmarks.bound``), on batches of the mean size that its server formed in that turn. The last line of stdout is one
JSON object, which ``--out`` keeps.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import tritonclient.grpc as grpcclient
import typer

from benchmarks.bench import GRAPHS, PLAIN, graphs_of
from benchmarks.bound import Bound
from benchmarks.peers.systems import TOP_K, Served, merlin, vivace
from benchmarks.turns import in_turns, spread, with_spread
from loadtest.generate.generator import complete
from loadtest.generate.statistics import between, statistics
from loadtest.reports.record import record_line
from preprocessing.requests import recorded
from serving.repository import served_from
from serving.runtime.stages import Row
from vivace import contract
from vivace.machine import cores, cpu, processor_seconds

MERLIN, WARM = "Merlin, by hand", 100
GRAPHS_S = 1.5  # of one turn of the graphs in process


async def _closed(served: Served, count: int, callers: int) -> None:
    """``count`` requests of the recorded ones, each caller sending its next when it is answered."""
    sent = itertools.islice(itertools.cycle(served.sent), count)

    async with served.connect() as call:

        async def caller() -> None:
            for body in sent:
                await call(body)

        await asyncio.gather(*(caller() for _ in range(callers)))


def measured(served: Served, count: int, callers: int) -> tuple[float, float]:
    """(ms of processor time of a request, mean batch of the stage with the larger ones) of one turn."""
    with grpcclient.InferenceServerClient(served.connect().url) as client:
        before, busy = statistics(client), processor_seconds(served.pid)
        complete(_closed(served, count, callers))
        busy, stages = processor_seconds(served.pid) - busy, between(before, statistics(client))
    return busy * 1000 / count, max(1.0, *(s["batch"] for m, s in stages.items() if m in GRAPHS))


def in_process(bound: Bound, batch: float) -> float:
    """Ms of processor time of a request by the graphs alone."""
    return bound.throughput(max(1, round(batch)), GRAPHS_S)["cpu_ms"]


def ratios(of: dict[str, list[float]], what: str, over: str) -> dict[str, Any]:
    return spread([a / b for a, b in zip(of[what], of[over], strict=True)])


def main(
    root: Annotated[Path, typer.Argument(help="the run, artifacts/<name>")],
    profile: Annotated[list[str], typer.Option(help="may be given again; 'ensemble' or one of --profile")] = [  # noqa: B006
        PLAIN,
        "fused",
    ],
    by_hand: Annotated[bool, typer.Option("--merlin", help="beside Merlin by hand (benchmarks/peers)")] = False,
    turns: int = 5,
    requests: Annotated[int, typer.Option(help="of a turn")] = 500,
    callers: Annotated[int, typer.Option(help="requests at once")] = 16,
    out: Annotated[Path | None, typer.Option(help="file for the JSON")] = None,
) -> None:
    frame = recorded(root).head(1000)
    rows = [Row(u, list(h), TOP_K) for u, h in zip(frame[contract.USER], frame[contract.ITEM], strict=True)]
    ms, batches = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    with ExitStack() as stack:
        systems = {p: stack.enter_context(vivace(root, "" if p == PLAIN else p)) for p in profile}
        bounds = {}
        for p in profile:
            name = "" if p == PLAIN else p
            bounds[p] = stack.enter_context(Bound(graphs_of(root, served_from(root, name), name), rows, 1))
        if by_hand:
            exports = stack.enter_context(tempfile.TemporaryDirectory(prefix="vivace-merlin-"))
            systems[MERLIN] = stack.enter_context(merlin(root, "best", Path(exports)))
        for served in systems.values():
            complete(_closed(served, WARM, callers))
        for turn, name in in_turns(turns, list(systems)):
            cost, batch = measured(systems[name], requests, callers)
            ms[name].append(cost)
            batches[name].append(batch)
            if name in bounds:
                ms[f"{name}, graphs"].append(in_process(bounds[name], batch))
            print(f"turn {turn + 1} {name}: {cost:.2f} ms, batch {batch:.1f}", flush=True)
    pairs = [(name, f"{name}, graphs") for name in bounds]
    pairs += [(name, "fused") for name in systems if "fused" in systems and name != "fused"]
    figures = {f"{a} over {b}": ratios(ms, a, b) for a, b in pairs}
    print(f"{root.name} on {cpu()[0]}, {cores()} cores; median of {turns} turns (least to largest)")
    for name in ms:
        print(f"{name:28} {with_spread(spread(ms[name]), 2)} ms a request")
    for what, figure in figures.items():
        print(f"{what:28} {with_spread(figure, 2)} times")
    record = record_line(
        "processor time of a request", data=root.name, turns=turns, requests=requests, callers=callers, ratios=figures,
        ms={n: spread(v) for n, v in ms.items()}, batch={n: spread(v) for n, v in batches.items()},
    )  # fmt: skip
    if out is not None:
        out.write_text(record + "\n", encoding="utf-8")
    print(record)


if __name__ == "__main__":
    typer.run(main)
