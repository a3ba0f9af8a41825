"""Open-loop load against a running server (``loadtest.generate.generator``).

    python -m loadtest.generate.open_loop artifacts/ml-1m --slo 20 --url 127.0.0.1:8001      # find the knee
    python -m loadtest.generate.open_loop artifacts/ml-1m --slo 20 --qps 300 --arrivals burst  # one run

Requests are those that the run recorded; users return as ``--repeat`` says. The last line of stdout is one JSON
object; ``--report`` writes an HTML page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from loadtest.generate.arrivals import REPEAT, due_times, picks
from loadtest.generate.generator import ATTAINED, LoadRun, best, knee, messages, run
from loadtest.reports.html import drawn, image, page, table
from loadtest.reports.record import record_line
from vivace.run import Run

console = Console(width=120)


def picture(runs: Sequence[LoadRun], slo_ms: float) -> bytes:
    def draw(plt: Any) -> Any:
        rates = [r.qps for r in runs]
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
        left.plot(rates, [r.attainment for r in runs], "o-", label="all answers")
        left.plot(rates, [r.full for r in runs], "o-", label="at full quality")
        left.legend()
        left.axhline(ATTAINED, color="grey", linestyle="--")
        left.set_ylabel(f"share answered within {slo_ms:g} ms")
        for name in ("p50", "p95", "p99"):
            right.plot(rates, [getattr(r, name) for r in runs], "o-", label=name)
        right.axhline(slo_ms, color="grey", linestyle="--")
        right.set_yscale("log")
        right.set_ylabel("ms from the moment due")
        right.legend()
        for axis in (left, right):
            axis.set_xlabel("offered requests a second")
            axis.grid(True, which="both", alpha=0.3)
        return figure

    return drawn(draw)


HEADER = (
    "offered", "answered", "refused", "p50 ms", "p95 ms", "p99 ms", "attainment", "goodput", "degraded",
    "generator late ms",
)  # fmt: skip


def row(r: LoadRun) -> list[str]:
    return [
        f"{r.qps:.0f}", str(r.answered), str(sum(r.refused.values())), f"{r.p50:.1f}", f"{r.p95:.1f}", f"{r.p99:.1f}",
        f"{r.attainment:.2%}", f"{r.goodput:.0f}", str(r.degraded), f"{r.late:.2f}",
    ]  # fmt: skip


def report_page(runs: Sequence[LoadRun], slo_ms: float, title: str) -> str:
    """A self-contained HTML report."""
    met = best(runs)
    highest = f"{met.qps:.0f} requests a second" if met else "no rate that was tried"
    return page(title, [
        f"<p>{ATTAINED:.0%} answered within {slo_ms:g} ms: up to {highest}. Latency counts from the moment due.</p>",
        image(picture(runs, slo_ms), "attainment and latency over offered load"),
        table(HEADER, [row(r) for r in runs]),
    ])  # fmt: skip


def main(
    root: Annotated[Path, typer.Argument(help="the served run, artifacts/<name>: where the recorded requests are")],
    url: Annotated[str, typer.Option(help="gRPC address of the server")] = "127.0.0.1:8001",
    slo: Annotated[float, typer.Option(help="ms within which a request must be answered")] = 20.0,
    qps: Annotated[float, typer.Option(help="offered rate (0: find the knee)")] = 0.0,
    arrivals: Annotated[str, typer.Option(help="poisson, constant, burst or diurnal")] = "poisson",
    seconds: Annotated[float, typer.Option(help="of one run")] = 10.0,
    first: Annotated[float, typer.Option(help="rate at which the search begins")] = 50.0,
    repeat: Annotated[float, typer.Option(help="exponent of the users' power law (0: all alike)")] = REPEAT,
    stored: Annotated[bool, typer.Option(help="send users alone: histories come from the feature store")] = False,
    report: Annotated[Path | None, typer.Option(help="HTML page to write")] = None,
    seed: int = 7,
) -> None:
    pool = messages(root, stored=stored)
    times: list[int] = []
    if arrivals == "diurnal":
        from vivace.store.lmdb_store import LmdbStore

        store = LmdbStore(Run(root).feature_store, readonly=True)
        times = [e.timestamp_ms for u, _ in zip(store.users(), range(2000), strict=False) for e in store.events(u)]
        store.close()

    def measure(rate: float) -> LoadRun:
        due = due_times(arrivals, rate, seconds, seed, times)
        chosen = picks(len(due), len(pool), repeat, seed)
        outcome = run(url, [pool[i] for i in chosen], due, seconds, slo)
        console.print("  ".join(f"{h} {v}" for h, v in zip(HEADER, row(outcome), strict=True)))
        return outcome

    runs = [measure(qps)] if qps else knee(measure, first)
    met = best(runs)
    shown = Table(*HEADER)
    for r in runs:
        shown.add_row(*row(r))
    console.print(shown)
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(report_page(runs, slo, f"{root.name}: open-loop load, {arrivals}"), encoding="utf-8")
    print(record_line(
        "open loop", data=root.name, arrivals=arrivals, slo_ms=slo, seed=seed, repeat=repeat,
        knee_qps=met.qps if met else None, runs=[asdict(r) for r in runs],
    ))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
