"""Vivace beside its peers: one machine, one run, the same weights, requests, answers and load.

    python -m benchmarks.peers.compare artifacts/ml-1m --turns 5                                  # all systems
    python -m benchmarks.peers.compare artifacts/ml-1m --turns 5 --only fused --only "by hand"    # two, 12 minutes

Each peer must first give the ensemble's answers: ``--checked`` recorded requests, compared item by item in order, where
items whose scores differ by less than 1e-4 may change places; the counts are reported, and a system with fewer than
99.9 % of its places right is refused. Then the systems take turns, ``--turns`` times: latency of one request at a time,
the knee under open-loop load (largest rate with 99 % within the objective), the processor time of a request there (the
server's whole process tree), memory. The table and the last line of stdout, one JSON object that ``--out`` keeps, have
the median of the turns with the least and the largest.

Merlin's export asks for Triton's libtorch backend, which this server does not have: a Python stage with torch.jit.load
takes its place and answers each request by itself. Its row says so; libtorch itself may be faster.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.answers import Agreement, agreement
from benchmarks.knees import seek
from benchmarks.peers.systems import TOP_K, Served, fastapi, http_peer, litserve, merlin, reference, vivace
from benchmarks.turns import in_turns, spread, with_spread
from loadtest.generate.generator import LoadRun, complete, offer, summarize
from loadtest.reports.record import record_line
from preprocessing.requests import recorded
from vivace import contract
from vivace.machine import cores, cpu, memory_mib

ALONE = 300  # requests one at a time
LEAST_RIGHT = 0.999  # share of the places that a system must answer as the ensemble does

console = Console(width=140)
Systems = dict[str, Callable[[], Any]]


@dataclass
class Row:
    """What one system did in one turn. Times in ms."""

    system: str
    turn: int
    p50: float
    p99: float
    knee: float
    cpu_ms: float
    mib: float
    runs: list[LoadRun]


FIGURES = ("p50", "p99", "knee", "cpu_ms", "mib")


def measure(system: str, turn: int, served: Served, slo: float, seconds: float, last: float) -> Row:
    """One turn of a system; ``last``: its knee in an earlier turn (0: none)."""

    def send(due: np.ndarray, sent: Sequence[bytes]) -> LoadRun:
        async def inside() -> list[Any]:
            async with served.connect() as call:
                await call(sent[0])
                return await offer(call, due, sent)

        return summarize(complete(inside()), len(due) / seconds, seconds, slo)

    async def alone() -> list[float]:
        times = []
        async with served.connect() as call:
            for i in range(ALONE + 20):
                t = time.perf_counter()
                await call(served.sent[i % len(served.sent)])
                times.append((time.perf_counter() - t) * 1000)
        return times[20:]

    p50, p99 = (float(p) for p in np.percentile(complete(alone()), [50, 99]))
    at = seek(send, served.pid, served.sent, seconds, 7 + turn, last)
    return Row(system, turn, p50, p99, at.rate, at.cpu_ms, memory_mib(served.pid), at.runs)


def checked(system: str, served: Served, expected: Sequence[Any], histories: list[list[str]]) -> Agreement:
    """How the system's answers agree with the ensemble's. Raises ValueError where it does other work."""
    same = agreement(expected, (served.items(h) for h in histories), TOP_K)
    if same.share < LEAST_RIGHT:
        raise ValueError(f"{system}: not the same work: {same}; expected at least {LEAST_RIGHT:.1%} right")
    return same


def systems_of(root: Path, profiles: Sequence[str], only: Sequence[str], exports: Path) -> Systems:
    """All systems by name; ``only``: those whose names contain one of these words. Raises ValueError where a word names
    none, or none of ours is left."""
    everything: Systems = {
        "Vivace, untuned ensemble": lambda: vivace(root, ""),
        **{f"Vivace, {p}": partial(vivace, root, p) for p in profiles},
        "FastAPI, PyTorch, its threads": lambda: http_peer(root, "fastapi", fastapi),
        "FastAPI, PyTorch, one thread": lambda: http_peer(root, "fastapi", fastapi, VIVACE_TORCH_THREADS="1"),
        "LitServe, PyTorch, batches": lambda: http_peer(root, "litserve", litserve(root)),
        "Merlin Systems, its export with a Python stage in libtorch's place": lambda: merlin(root, "stock", exports),
        "Merlin, by hand": lambda: merlin(root, "best", exports),
    }
    for word in only:
        if not any(word.lower() in name.lower() for name in everything):
            raise ValueError(f"--only: expected part of one of {list(everything)}, got {word!r}")
    chosen = {n: s for n, s in everything.items() if not only or any(w.lower() in n.lower() for w in only)}
    if not any(name.startswith("Vivace") for name in chosen):
        raise ValueError(f"--only: expected one of ours among the systems, got {list(chosen)}")
    return chosen


def take_turns(
    systems: Systems, turns: int, check: Callable[[str, Served], None], slo: float, seconds: float
) -> tuple[list[Row], dict[str, str]]:
    """(rows, failures by system). A peer that does not run costs its own row alone; one of ours stops everything."""
    rows: list[Row] = []
    failed: dict[str, str] = {}
    rates: dict[str, float] = {}
    for turn, system in in_turns(turns, list(systems)):
        if system in failed:
            continue
        try:
            with systems[system]() as served:
                if system not in rates:
                    check(system, served)
                row = measure(system, turn, served, slo, seconds, rates.get(system, 0.0))
        except Exception as error:
            if system.startswith("Vivace"):
                raise
            failed[system] = f"{type(error).__name__}: {error}"
            console.print(f"{system}: {failed[system]}", style="red", markup=False)
            continue
        rates[system] = row.knee
        rows.append(row)
        console.print(
            f"turn {turn + 1}, {system}: p50 {row.p50:.1f} ms, knee {row.knee:.0f}, {row.cpu_ms:.2f} ms CPU a request",
            highlight=False,
        )
    return rows, failed


def by_system(rows: Sequence[Row], ours: str) -> dict[str, dict[str, Any]]:
    """Figures of each system over the turns, and ``ours`` over it by rate and by processor time, turn by turn."""
    out: dict[str, dict[str, Any]] = {}
    reference_rows = {r.turn: r for r in rows if r.system == ours}
    for system in dict.fromkeys(r.system for r in rows):
        its = [r for r in rows if r.system == system]
        out[system] = {name: spread([getattr(r, name) for r in its]) for name in FIGURES}
        pairs = [(reference_rows[r.turn], r) for r in its if r.turn in reference_rows]
        if pairs and all(theirs.knee and mine.knee for mine, theirs in pairs):
            out[system]["rate_ratio"] = spread([mine.knee / theirs.knee for mine, theirs in pairs])
            out[system]["cpu_ratio"] = spread([theirs.cpu_ms / mine.cpu_ms for mine, theirs in pairs])
    return out


def print_table(figures: dict[str, dict[str, Any]], ours: str, title: str) -> None:
    table = Table(title=title, title_justify="left")
    columns = ("QPS at the knee", "CPU ms a request", f"{ours} over it, by rate", "by CPU", "p50 alone", "p99 alone",
               "MiB")  # fmt: skip
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for system, f in figures.items():
        ratios = [with_spread(f[k], 2) if k in f else "-" for k in ("rate_ratio", "cpu_ratio")]
        table.add_row(
            system, with_spread(f["knee"]), with_spread(f["cpu_ms"], 2), *ratios,
            *(f"{f[k]['median']:.1f}" for k in ("p50", "p99")), f"{f['mib']['median']:.0f}",
        )  # fmt: skip
    console.print(table)


def main(
    root: Annotated[Path, typer.Argument(help="the run, artifacts/<name>; its weights are what all serve")],
    tuned: Annotated[list[str], typer.Option(help="profiles of ours; the last is compared")] = ["fused"],  # noqa: B006
    other: Annotated[list[str], typer.Option(help="profiles that may answer otherwise (compressed)")] = [],  # noqa: B006
    only: Annotated[list[str], typer.Option(help="these systems alone, by a part of their names")] = [],  # noqa: B006
    slo: Annotated[float, typer.Option(help="ms")] = 20.0,
    seconds: Annotated[float, typer.Option(help="of one run")] = 5.0,
    turns: Annotated[int, typer.Option(help="of each system; 5 or more for a claim")] = 5,
    checked_requests: Annotated[int, typer.Option("--checked", help="answers compared before the first turn")] = 500,
    out: Annotated[Path | None, typer.Option(help="file for the JSON")] = None,
) -> None:
    histories = [list(h) for h in recorded(root)[contract.ITEM].head(checked_requests)]
    agreements: dict[str, Agreement] = {}
    with tempfile.TemporaryDirectory(prefix="vivace-merlin-") as exports:
        systems = systems_of(root, (*other, *tuned), only, Path(exports))
        expected = reference(root, histories)

        def check(system: str, served: Served) -> None:
            if system.removeprefix("Vivace, ") not in other:
                agreements[system] = checked(system, served, expected, histories)
                console.print(f"{system}: {agreements[system]}", highlight=False)

        rows, failed = take_turns(systems, turns, check, slo, seconds)
    ours = [name for name in systems if name.startswith("Vivace")][-1]
    figures = by_system(rows, ours)
    title = f"{root.name}: p99 within {slo:g} ms on {cpu()[0]}, {cores()} cores"
    print_table(figures, ours, f"{title}; median of {turns} turns (least to largest)")
    record = record_line(
        "peers", data=root.name, slo_ms=slo, seconds=seconds, turns=turns, ours=ours, systems=figures, failed=failed,
        answers={name: asdict(same) for name, same in agreements.items()}, rows=[asdict(r) for r in rows],
    )  # fmt: skip
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(record + "\n", encoding="utf-8")
    print(record)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
