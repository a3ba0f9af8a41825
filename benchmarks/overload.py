"""Several times the knee, and after: does goodput stay, is the latency back, has a process grown?

    python -m benchmarks.overload artifacts/ml-1m --profile tuned --knee 2600 --report overload.html

One timetable: calm at a third of the knee, ``--factor`` times the knee for ``--seconds``, calm again. What counts is by
hand-over of the timetable (open loop): goodput is what came in time a second, degraded answers included and counted.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from loadtest.generate.arrivals import REPEAT, due_times, picks
from loadtest.generate.generator import ATTAINED, CODE_DEGRADED, METHOD, complete, messages, offer
from loadtest.generate.local_server import grpc_address, on_free_ports
from loadtest.reports.html import drawn, image, page
from loadtest.reports.record import record_line
from serving.fleet import warm_up
from serving.launcher import TritonServer
from serving.repository import served_from
from vivace.machine import memory_by_process, process_tree
from vivace.run import Run

console = Console(width=120)
CALM_S, AFTER_S, SHARE = 6.0, 12.0, 1 / 3
LEAK_S = 10.0  # buffers have their size by then; what grows after it would go on growing
WIDE = 1.5  # latency is normal again if p50 of a second is within so many times that of the calm before


def timetable(knee: float, factor: float, seconds: float, seed: int) -> np.ndarray:
    """Seconds at which requests are due: calm, overload, calm."""
    before = due_times("poisson", knee * SHARE, CALM_S, seed)
    during = due_times("poisson", knee * factor, seconds, seed + 1) + CALM_S
    after = due_times("poisson", knee * SHARE, AFTER_S, seed + 2) + CALM_S + seconds
    return np.concatenate([before, during, after])


def by_second(records: Sequence[Any], slo_ms: float) -> list[dict[str, float]]:
    """For each second in which requests were due: how many, in time, degraded, refused, p50 and p99 of the answered."""
    due = np.array([r[0] for r in records])
    latency = np.array([(r[2] - r[0]) * 1000 for r in records])
    cheaper = np.array([r[3] == CODE_DEGRADED for r in records])
    ok = cheaper | np.array([r[3] == "" for r in records])
    out = []
    for second in range(int(due.max()) + 1):
        here = (due >= second) & (due < second + 1)
        answered = latency[here & ok]
        p50, p99 = np.percentile(answered, [50, 99]) if answered.size else (np.nan, np.nan)
        out.append({
            "due": int(here.sum()), "in_time": int((answered <= slo_ms).sum()), "p50": float(p50), "p99": float(p99),
            "degraded": int((here & cheaper).sum()), "refused": int((here & ~ok).sum()),
        })  # fmt: skip
    return out


def recovery(seconds: Sequence[dict[str, float]], normal: float, slo_ms: float) -> int | None:
    """How many seconds after overload the first is from which all are normal: p50 near ``normal``, p99 in time, and as
    many whole answers in time as at the knee. None if none is."""
    good = [
        s["p50"] <= WIDE * normal and s["p99"] <= slo_ms and s["degraded"] + s["refused"] <= (1 - ATTAINED) * s["due"]
        for s in seconds
    ]
    for start in range(len(good)):
        if all(good[start:]):
            return start
    return None


def memory(pid: int) -> dict[str, float]:
    """MiB (PSS) of the server and of each of its workers, by process and the model that it serves."""
    mib = memory_by_process(pid)
    by_role = {}
    for p in process_tree(pid):
        if p.pid not in mib:  # ended meanwhile
            continue
        role = "tritonserver" if p.pid == pid else next((a for a in reversed(p.cmdline()) if "model.py" in a), p.name())
        by_role[f"{p.pid} {Path(role).parent.parent.name if '/' in role else role}"] = mib[p.pid]
    return by_role


def picture(seconds: Sequence[dict[str, float]], slo_ms: float, start: float, stop: float) -> bytes:
    def draw(plt: Any) -> Any:
        figure, (above, below) = plt.subplots(2, 1, figsize=(11, 7), sharex=True, constrained_layout=True)
        x = np.arange(len(seconds))
        for name in ("due", "in_time", "degraded", "refused"):
            above.plot(x, [s[name] for s in seconds], label=name.replace("_", " "))
        above.set_ylabel("requests a second")
        below.plot(x, [s["p50"] for s in seconds], label="p50 of the answered")
        below.plot(x, [s["p99"] for s in seconds], label="p99 of the answered")
        below.axhline(slo_ms, color="grey", linestyle="--")
        below.set_yscale("log")
        below.set_ylabel("ms from the moment due")
        below.set_xlabel("second")
        for axis in (above, below):
            axis.axvspan(start, stop, color="orange", alpha=0.15)
            axis.legend()
            axis.grid(True, alpha=0.3)
        return figure

    return drawn(draw)


@dataclass(frozen=True)
class Overload:
    """What was run: records of all requests as ``offer`` gives them, MiB by process before, early and after."""

    records: list[Any]
    before: dict[str, float]
    early: dict[str, float]
    after: dict[str, float]


def execute(root: Path, profile: str, due: np.ndarray, seconds: float, within_ms: float, seed: int) -> Overload:
    """Offers requests at ``due`` to a server of the profile; ``within_ms``: each carries a deadline (0: none)."""
    pool = messages(root)
    sent = [pool[i] for i in picks(len(due), len(pool), REPEAT, seed)]

    async def go(url: str, which: slice) -> list[Any]:
        async with grpc.aio.insecure_channel(url) as channel:
            method = channel.unary_unary(METHOD)
            await method(sent[0], timeout=10, wait_for_ready=True)
            return await offer(lambda m: method(m, timeout=10), due[which], sent[which], within_ms)

    early: dict[str, float] = {}
    options = on_free_ports(Run(served_from(root, profile)).repository, profile, root / "overload.log")
    with TritonServer(options) as server:
        warm_up(server)
        url = grpc_address(server)
        complete(go(url, slice(0, int((due < CALM_S).sum()))))  # what is set up late
        before = memory(server.pid)
        sample = threading.Timer(CALM_S + min(seconds, LEAK_S), lambda: early.update(memory(server.pid)))
        sample.start()
        records = complete(go(url, slice(None)))
        sample.join()
        return Overload(records, before, early, memory(server.pid))


def summary(outcome: Overload, knee: float, seconds: float, slo: float) -> dict[str, Any]:
    """Goodput and latencies of what was due in the overload, the recovery after it, and how processes grew."""
    records = outcome.records
    over = [r for r in records if CALM_S <= r[0] < CALM_S + seconds]
    answered = [r for r in over if r[3] in ("", CODE_DEGRADED)]
    latencies = [(r[2] - r[0]) * 1000 for r in answered] or [float("inf")]
    late = float(np.percentile([(r[1] - r[0]) * 1000 for r in over], 99))
    in_time = sum(t <= slo for t in latencies) / seconds
    calm = [(r[2] - r[0]) * 1000 for r in records if r[0] < CALM_S and r[3] == ""]
    normal = float(np.median(calm)) if calm else float("inf")
    before, early, after = outcome.before, outcome.early, outcome.after
    return {
        "offered_qps": len(over) / seconds, "seconds": seconds, "goodput": in_time, "goodput_over_knee": in_time / knee,
        "answered": len(answered), "degraded": sum(r[3] == CODE_DEGRADED for r in over),
        "p50": float(np.percentile(latencies, 50)), "p99": float(np.percentile(latencies, 99)),
        "refused": dict(Counter(r[3] for r in over if r[3] not in ("", CODE_DEGRADED))),
        "generator_late_p99_ms": late, "normal_p50": normal,
        "recovered_after_s": recovery(by_second(records, slo)[int(CALM_S + seconds) :], normal, slo),
        "processes_lost": len(set(before) - set(after)),
        "growth": {k: after[k] / before[k] - 1 for k in before if k in after},
        "growth_later": {k: after[k] / early[k] - 1 for k in early if k in after}, "mib": after,
    }  # fmt: skip


def print_seconds(each: Sequence[dict[str, float]], title: str, first: int, last: int) -> None:
    """The seconds around the beginning and the end of the overload."""
    table = Table(title=title, title_justify="left")
    for name in ("second", "due", "in time", "degraded", "refused", "p50 ms", "p99 ms"):
        table.add_column(name, justify="right")
    for i, s in enumerate(each):
        if i < first + 6 or i >= last - 3:
            table.add_row(
                str(i), *(str(s[k]) for k in ("due", "in_time", "degraded", "refused")), f"{s['p50']:.1f}",
                f"{s['p99']:.1f}",
            )  # fmt: skip
    console.print(table)


def main(
    root: Annotated[Path, typer.Argument(help="the run, artifacts/<name>")],
    knee: Annotated[float, typer.Option(help="requests a second that the profile holds (vivace tune says it)")],
    profile: str = "tuned",
    slo: Annotated[float, typer.Option(help="ms")] = 20.0,
    factor: Annotated[float, typer.Option(help="offered, in knees")] = 3.0,
    seconds: float = 60.0,
    deadlines: Annotated[bool, typer.Option(help="each request carries the objective as its deadline")] = True,
    report: Annotated[Path | None, typer.Option(help="HTML page to write")] = None,
    seed: int = 7,
) -> None:
    due = timetable(knee, factor, seconds, seed)
    outcome = execute(root, profile, due, seconds, slo if deadlines else 0.0, seed)
    result, each = summary(outcome, knee, seconds, slo), by_second(outcome.records, slo)
    first, last = int(CALM_S), int(CALM_S + seconds)
    print_seconds(each, f"{root.name}, {profile}: {factor:g} times {knee:g} requests a second", first, last)
    back = result["recovered_after_s"]
    sentence = (
        f"goodput {result['goodput']:.0f} a second, {result['goodput_over_knee']:.2f} of the knee; p99 of the answered "
        f"{result['p99']:.1f} ms; normal again after {'-' if back is None else back} s; largest growth of a process "
        f"{max(result['growth'].values(), default=0.0):.1%}, of it after the first {LEAK_S:g} s of overload "
        f"{max(result['growth_later'].values(), default=0.0):.1%}"
    )
    console.print(sentence)
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        parts = [f"<p>{sentence}</p>", image(picture(each, slo, first, last), "requests and latency by second")]
        report.write_text(page(f"{root.name}: overload", parts), encoding="utf-8")
    print(record_line(
        "overload", data=root.name, profile=profile, slo_ms=slo, deadlines=deadlines, knee_qps=knee, **result
    ))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
