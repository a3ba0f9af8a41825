"""``make bench``: the live server against the same graphs in process, in one run.

    python -m benchmarks.bench --name shop --profile ensemble --profile fused

The bound runs transform.onnx, retrieval.onnx and ranking.onnx of the served version under ONNX Runtime with the same
thread settings and batch size, no server, no client: latency of one request alone, and throughput with as many threads
as there are cores, each taking batches of the mean size that the server formed (that of the ONNX stage with the larger
batches). perf_analyzer drives the live ensemble over gRPC at concurrency 1 and 16. Bound and ensemble are measured in
turn, ``rounds`` times, and the ratios are of the medians: a machine that drifts moves both. Each ``--profile`` has a
server and a bound of its own, one after the other; "ensemble" is what is served without a profile. The bound reads as
much history (with its padding, where the profile is an ensemble) and ranks as many candidates as the profile does; a
tuned one is served without its limits under overload, as a closed loop knows no objective. The last line of stdout is
one JSON object.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime as ort
import psutil
import tritonclient.grpc as grpcclient
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from loadtest.generate import perf_analyzer
from loadtest.generate.statistics import between, statistics
from loadtest.tune.space import Trial, drop_profile, write_profile
from preprocessing.requests import recorded
from serving.launcher import ServerOptions, TritonServer
from serving.repository import TUNED, read_config, served_from
from serving.runtime.pipeline import Pipeline
from serving.runtime.stages import Row
from serving.service import service
from vivace import contract
from vivace.machine import cpu
from vivace.manifest import commit
from vivace.store.lmdb_store import LmdbStore

console = Console(width=120)
TOP_K = 10
BENCH = "bench"  # profile of a run of this
HIGH = 16
PLAIN = "ensemble"  # no profile
GRAPHS = (
    contract.RETRIEVAL,
    contract.RANKING,
    contract.ENSEMBLE,
)  # those that run graphs; an ensemble forms no batches itself


def bound_latency(models: Pipeline, rows: list[Row], count: int) -> dict[str, float]:
    """Latency in ms of one request at a time."""
    for row in rows[:20]:
        models([row])
    times = []
    for row in itertools.islice(itertools.cycle(rows), count):
        t = time.perf_counter()
        models([row])
        times.append((time.perf_counter() - t) * 1000)
    return {f"p{q}_ms": float(np.percentile(times, q)) for q in (50, 95, 99)}


def bound_throughput(models: list[Pipeline], rows: list[Row], batch: int, seconds: float) -> float:
    """Requests a second of one thread a model set, each on batches of ``batch``."""
    counts = [0] * len(models)
    stop = time.perf_counter() + seconds

    def work(index: int) -> None:
        source = itertools.cycle(rows[index * 100 :] + rows)
        while time.perf_counter() < stop:
            models[index](list(itertools.islice(source, batch)))
            counts[index] += batch

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(models))]
    started = time.perf_counter()
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return sum(counts) / (time.perf_counter() - started)


def memory_mib(server: TritonServer) -> float:
    """Proportional set size of the server and its workers: shared pages are counted once."""
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    return sum(p.memory_full_info().pss for p in processes) / 2**20


def main(
    name: str = "shop",
    artifacts: Path = Path("artifacts"),
    profile: Annotated[list[str], typer.Option(help="may be given several times")] = [PLAIN, "fused"],  # noqa: B006
    seconds: Annotated[float, typer.Option(help="length of one measuring window")] = 4.0,
    rounds: Annotated[int, typer.Option(help="measurements of each, in turn")] = 3,
) -> None:
    perf_analyzer.binary()
    runs = [against_bound(artifacts / name, "" if p == PLAIN else p, seconds, rounds) for p in profile]
    print(
        json.dumps(
            {
                "benchmark": "server against the in-process bound, closed loop, perf_analyzer over gRPC",
                "data": name,
                "runs": runs,
                "commit": commit(),
                "cpu": cpu()[0],
                "cores": len(os.sched_getaffinity(0)),
                "onnxruntime": ort.__version__,
            }
        )
    )


def against_bound(root: Path, profile: str, seconds: float, rounds: int) -> dict[str, Any]:
    """Prints the tables of one profile; what the JSON says of it."""
    cores = len(os.sched_getaffinity(0))
    frame = recorded(root).head(1000)
    pairs = [(u, list(h)) for u, h in zip(frame[contract.USER], frame[contract.ITEM], strict=True)]
    rows = [Row(u, h, TOP_K) for u, h in pairs]
    inputs = root / "perf_input.json"
    perf_analyzer.write_input(pairs, TOP_K, inputs)
    folder, asked = served_from(root, profile), profile
    if profile and (record := root / TUNED / f"{profile}.json").exists():
        trial = Trial(**json.loads(record.read_text())["chosen"]["trial"])
        write_profile(folder, BENCH, trial.profile())
        profile = BENCH
    options = ServerOptions(
        folder / "model_repository", http_port=0, grpc_port=0, metrics_port=0, profile=profile, log=root / "triton.log"
    )
    store = LmdbStore(root / "feature_store", readonly=True)
    parameters, history, ranked = read_config(folder / "model_repository", contract.ENSEMBLE, profile).parameters, 0, 0
    if "ranked" in parameters:
        history = int(json.loads(parameters["shapes"].string_value)["history"])
        ranked = int(parameters["ranked"].string_value)
    whole = "ranked" not in parameters  # the ensemble's graphs read padding too
    models = [Pipeline.published(folder, store, history=history, ranked=ranked, whole=whole) for _ in range(cores)]
    served: dict[int, list[dict[str, float]]] = {1: [], HIGH: []}
    latencies: list[dict[str, float]] = []
    throughputs: list[float] = []
    stages: dict[int, Any] = {}
    with service(options, console.print) as (server, _):
        url = f"{server.host}:{server.grpc_port}"
        with grpcclient.InferenceServerClient(url) as client:
            perf_analyzer.measure(url, inputs, 4, 1.0, root, agree=100)  # warm-up
            for _round in track(range(rounds), description="bound and ensemble in turn", console=console):
                for concurrency, found in served.items():
                    before = statistics(client)
                    found.append(perf_analyzer.measure(url, inputs, concurrency, seconds, root))
                    stages[concurrency] = between(before, statistics(client))
                batch = max(1, *(round(s["batch"]) for m, s in stages[HIGH].items() if m in GRAPHS))
                latencies.append(bound_latency(models[0], rows, 300))
                throughputs.append(bound_throughput(models, rows, batch, seconds))
        memory = memory_mib(server)
    store.close()
    if asked != profile:
        drop_profile(folder, BENCH)
    return report(
        {n: medians(found) for n, found in served.items()},
        stages,
        medians(latencies),
        float(np.median(throughputs)),
        batch,
        memory,
        root.name,
        asked or PLAIN,
        cores,
    )


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {k: float(np.median([r[k] for r in runs])) for k in runs[0]}


def report(
    served: dict[int, dict[str, float]],
    stages: dict[int, Any],
    latency: dict[str, float],
    throughput: float,
    batch: int,
    memory: float,
    name: str,
    profile: str,
    cores: int,
) -> dict[str, Any]:
    table = Table(title=f"{name}, {profile}: one run on {cores} cores of {cpu()[0]}", title_justify="left")
    for column in ("", "QPS", "p50 ms", "p95 ms", "p99 ms"):
        table.add_column(column, justify="right" if column else "left")
    cells = lambda r: [f"{r[k]:.2f}" for k in ("p50_ms", "p95_ms", "p99_ms")]  # noqa: E731
    table.add_row("in process, one request at a time", f"{1000 / latency['p50_ms']:.0f}", *cells(latency))
    table.add_row(f"in process, {cores} threads x batch {batch}", f"{throughput:.0f}", "", "", "")
    for concurrency, r in served.items():
        table.add_row(f"served, concurrency {concurrency}", f"{r['qps']:.0f}", *cells(r))
    console.print(table)
    detail = Table(title="by stage (Triton's statistics)", title_justify="left")
    for column in ("stage", "concurrency", "mean batch", "queue ms", "compute ms", "total ms"):
        detail.add_column(column, justify="left" if column == "stage" else "right")
    for concurrency, found in stages.items():
        for model in found:
            s = found[model]
            detail.add_row(
                model, str(concurrency), f"{s['batch']:.1f}" if s["batch"] else "",
                *(f"{s[k]:.2f}" if s[k] else "" for k in ("queue_ms", "compute_ms", "total_ms")),
            )  # fmt: skip
    console.print(detail)
    return {
        "profile": profile,
        "throughput_ratio": round(served[HIGH]["qps"] / throughput, 3),
        "p50_over_bound_ms": round(served[1]["p50_ms"] - latency["p50_ms"], 3),
        "bound": {"qps": round(throughput, 1), "batch": batch, **{k: round(v, 3) for k, v in latency.items()}},
        "served": {str(n): {k: round(v, 3) for k, v in r.items()} for n, r in served.items()},
        "mean_batch": {m: round(s["batch"], 2) for m, s in stages[HIGH].items()},
        "memory_mib": round(memory),
    }


if __name__ == "__main__":
    typer.run(main)
