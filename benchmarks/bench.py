"""``make bench``: the live server against the same graphs alone, in one run.

    python -m benchmarks.bench --name shop --profile ensemble --profile fused

The bound (``benchmarks.bound``) runs transform.onnx, retrieval.onnx and ranking.onnx of the served version under ONNX
Runtime with the same thread settings, no server, no client: latency of one request alone, and throughput with one
process a core, each taking batches of the mean size that the server formed (that of the stage with the larger batches).
perf_analyzer drives the live server over gRPC at concurrency 1 and 16. Bound and server are measured in turn,
``--turns`` times, and the ratios are of the medians: a machine that drifts moves both. Beside each rate stands the
processor time of a request: of the server's processes, without perf_analyzer's. Each ``--profile`` has a server and a
bound of its own, one after the other; "ensemble" is what is served without a profile. The bound reads as much history
(with its padding, where the profile is an ensemble) and ranks as many candidates as the profile does; a tuned one is
served without its limits under overload, as a closed loop knows no objective. The last line of stdout is one JSON
object.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tritonclient.grpc as grpcclient
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.bound import Bound, Graphs, alone
from benchmarks.turns import medians, spread, with_spread
from loadtest.generate import perf_analyzer
from loadtest.generate.local_server import grpc_address, on_free_ports
from loadtest.generate.statistics import between, statistics
from loadtest.reports.record import record_line
from loadtest.tune.space import Trial, drop_profile, write_profile
from preprocessing.requests import recorded
from serving.launcher import TritonServer
from serving.repository import read_config, served_from
from serving.runtime.stages import Row
from serving.service import service
from vivace import contract
from vivace.machine import cores, cpu, memory_mib, processor_seconds
from vivace.run import Run

console = Console(width=120)
TOP_K = 10
BENCH = "bench"  # profile of a run of this
HIGH = 16
PLAIN = "ensemble"  # no profile
ALONE = 300  # requests of the bound, one at a time
GRAPHS = (contract.RETRIEVAL, contract.RANKING, contract.ENSEMBLE)  # run graphs; an ensemble forms no batches itself


@dataclass
class Turns:
    """What was measured of one profile: by concurrency the server's runs and its last stages, the bound's runs."""

    served: dict[int, list[dict[str, float]]] = field(default_factory=dict)
    stages: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)
    alone: list[dict[str, float]] = field(default_factory=list)
    bound: list[dict[str, float]] = field(default_factory=list)
    batch: int = 1
    memory_mib: float = 0.0


@contextmanager
def without_limits(root: Path, profile: str) -> Iterator[tuple[Path, str]]:
    """(folder of the run that is served, name of the profile): a tuned one as it is without limits under overload."""
    folder, record = served_from(root, profile), Run(root).tuning / f"{profile}.json"
    if not profile or not record.exists():
        yield folder, profile
        return
    write_profile(folder, BENCH, Trial(**json.loads(record.read_text())["chosen"]["trial"]).profile())
    try:
        yield folder, BENCH
    finally:
        drop_profile(folder, BENCH)


def graphs_of(root: Path, folder: Path, profile: str) -> Graphs:
    """The graphs that a profile runs, reading and ranking as much."""
    parameters = read_config(Run(folder).repository, contract.ENSEMBLE, profile).parameters
    if "ranked" not in parameters:  # an ensemble's graphs read padding too
        return Graphs(root, folder, 0, 0, whole=True)
    history = int(json.loads(parameters["shapes"].string_value)["history"])
    return Graphs(root, folder, history, int(parameters["ranked"].string_value), whole=False)


def measure_server(
    server: TritonServer, client: grpcclient.InferenceServerClient, inputs: Path, concurrency: int, seconds: float,
    root: Path,
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:  # fmt: skip
    """(rate, latencies and processor time of a request; by stage what the server counted) of one closed loop."""
    before, busy = statistics(client), processor_seconds(server.pid)
    figures = perf_analyzer.measure(grpc_address(server), inputs, concurrency, seconds, root)
    busy, stages = processor_seconds(server.pid) - busy, between(before, statistics(client))
    return {**figures, "cpu_ms": busy * 1000 / max(stages[contract.ENSEMBLE]["requests"], 1)}, stages


def measure(root: Path, profile: str, seconds: float, turns: int) -> Turns:
    """Server and bound of one profile in turn."""
    frame = recorded(root).head(1000)
    pairs = [(u, list(h)) for u, h in zip(frame[contract.USER], frame[contract.ITEM], strict=True)]
    rows, inputs, result = [Row(u, h, TOP_K) for u, h in pairs], root / "perf_input.json", Turns()
    perf_analyzer.write_input(pairs, TOP_K, inputs)
    with without_limits(root, profile) as (folder, name):
        graphs = graphs_of(root, folder, name)
        options = on_free_ports(Run(folder).repository, name, Run(root).server_log)
        with (
            service(options, console.print) as (server, _),
            grpcclient.InferenceServerClient(grpc_address(server)) as client,
            Bound(graphs, rows, cores()) as bound,
            graphs.opened() as models,
        ):
            perf_analyzer.measure(grpc_address(server), inputs, 4, 1.0, root, agree=100)  # warm-up
            for _turn in track(range(turns), description="bound and server in turn", console=console):
                for concurrency in (1, HIGH):
                    figures, stages = measure_server(server, client, inputs, concurrency, seconds, root)
                    result.served.setdefault(concurrency, []).append(figures)
                    result.stages[concurrency] = stages
                result.batch = max(1, *(round(s["batch"]) for m, s in stages.items() if m in GRAPHS))
                result.alone.append(alone(models, rows, ALONE))
                result.bound.append(bound.throughput(result.batch, seconds))
            result.memory_mib = memory_mib(server.pid)
    return result


def print_tables(result: Turns, title: str) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("", "QPS", "p50 ms", "p95 ms", "p99 ms", "CPU ms a request"):
        table.add_column(column, justify="right" if column else "left")
    latency, count = medians(result.alone), cores()

    def times(figures: dict[str, float]) -> list[str]:
        return [f"{figures[k]:.2f}" for k in ("p50_ms", "p95_ms", "p99_ms", "cpu_ms")]

    table.add_row("graphs alone, one request at a time", f"{1000 / latency['p50_ms']:.0f}", *times(latency))
    rate = with_spread(spread([r["qps"] for r in result.bound]))
    cpu_ms = f"{medians(result.bound)['cpu_ms']:.2f}"
    table.add_row(f"graphs alone, {count} processes x batch {result.batch}", rate, "", "", "", cpu_ms)
    for concurrency, runs in result.served.items():
        rate = with_spread(spread([r["qps"] for r in runs]))
        table.add_row(f"served, concurrency {concurrency}", rate, *times(medians(runs)))
    console.print(table)
    detail = Table(title="by stage (Triton's statistics)", title_justify="left")
    for column in ("stage", "concurrency", "mean batch", "queue ms", "compute ms", "total ms"):
        detail.add_column(column, justify="left" if column == "stage" else "right")
    for concurrency, stages in result.stages.items():
        for model, s in stages.items():
            detail.add_row(
                model, str(concurrency), f"{s['batch']:.1f}" if s["batch"] else "",
                *(f"{s[k]:.2f}" if s[k] else "" for k in ("queue_ms", "compute_ms", "total_ms")),
            )  # fmt: skip
    console.print(detail)


def record(result: Turns, profile: str) -> dict[str, Any]:
    """What the JSON says of one profile: figures with their spread over the turns, ratios of the medians."""
    served = {n: medians(runs) for n, runs in result.served.items()}
    latency, bound = medians(result.alone), medians(result.bound)
    return {
        "profile": profile or PLAIN,
        "throughput_ratio": round(served[HIGH]["qps"] / bound["qps"], 3),
        "cpu_ratio": round(served[HIGH]["cpu_ms"] / bound["cpu_ms"], 3),
        "p50_over_bound_ms": round(served[1]["p50_ms"] - latency["p50_ms"], 3),
        "bound": {
            "batch": result.batch, "processes": cores(), "alone": latency,
            **{k: spread([r[k] for r in result.bound]) for k in ("qps", "cpu_ms")},
        },
        "served": {str(n): {k: spread([r[k] for r in runs]) for k in runs[0]} for n, runs in result.served.items()},
        "mean_batch": {m: round(s["batch"], 2) for m, s in result.stages[HIGH].items()},
        "memory_mib": round(result.memory_mib),
    }  # fmt: skip


def main(
    name: str = "shop",
    artifacts: Path = Path("artifacts"),
    profile: Annotated[list[str], typer.Option(help="may be given several times")] = [PLAIN, "fused"],  # noqa: B006
    seconds: Annotated[float, typer.Option(help="length of one measuring window")] = 4.0,
    turns: Annotated[int, typer.Option(help="measurements of each, in turn")] = 3,
) -> None:
    perf_analyzer.binary()
    runs = []
    for p in profile:
        chosen = "" if p == PLAIN else p
        result = measure(artifacts / name, chosen, seconds, turns)
        print_tables(result, f"{name}, {p}: medians of {turns} turns on {cores()} cores of {cpu()[0]}")
        runs.append(record(result, chosen))
    print(record_line(
        "server against the graphs alone, closed loop, perf_analyzer over gRPC", data=name, turns=turns, runs=runs
    ))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
