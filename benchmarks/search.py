"""Search beside recommendation on one live server: what does each cost?

    python -m benchmarks.search artifacts/shop --profile fused

Closed loop over gRPC at concurrency 1 and 16, the two kinds of requests taking turns in one run; queries are titles'
first words. Beside it a server of the same run without search answers the recommendations: what search costs those who
do not ask for it. From Triton's statistics: time of each stage, and of the ensemble beside the sum of its stages.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import pandas as pd
import tritonclient.grpc as grpcclient
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.turns import in_turns, medians
from loadtest.generate.generator import METHOD, complete, message
from loadtest.generate.local_server import grpc_address, on_free_ports
from loadtest.generate.statistics import between, statistics
from loadtest.reports.record import record_line
from preprocessing.features import CATALOGUE_FILE
from preprocessing.requests import recorded
from serving.launcher import TritonServer
from serving.releases import seal
from serving.repository import write_configs
from serving.server_options import ServerOptions
from vivace import contract
from vivace.client_request import request_tensors
from vivace.machine import cpu, memory_mib
from vivace.run import Run

console = Console(width=120)
TOP_K = 10
PLAIN = "recommend, a server without search"


def kinds(root: Path, count: int) -> dict[str, list[bytes]]:
    """The same users' requests without and with a query."""
    frame = recorded(root).head(count)
    titles = pd.read_parquet(Run(root).features / CATALOGUE_FILE).set_index(contract.ITEM)[contract.TITLE]
    out: dict[str, list[bytes]] = {"recommend": [], "search": []}
    for user, history, target in zip(frame[contract.USER], frame[contract.ITEM], frame[contract.TARGET], strict=True):
        query = " ".join(str(titles.get(target, "lamp")).split()[:3])
        for kind, q in (("recommend", ""), ("search", query)):
            out[kind].append(message(contract.ENSEMBLE, request_tensors(user, list(history), TOP_K, q)))
    return out


def closed(url: str, sent: list[bytes], concurrency: int, seconds: float) -> dict[str, float]:
    """QPS, p50 and p99 in ms."""

    async def go() -> list[float]:
        times: list[float] = []
        async with grpc.aio.insecure_channel(url) as channel:
            method = channel.unary_unary(METHOD)
            await method(sent[0], wait_for_ready=True)
            stop = time.perf_counter() + seconds

            async def one(start: int) -> None:
                i = start
                while time.perf_counter() < stop:
                    t = time.perf_counter()
                    await method(sent[i % len(sent)])
                    times.append((time.perf_counter() - t) * 1000)
                    i += concurrency

            await asyncio.gather(*(one(k) for k in range(concurrency)))
        return times

    times = complete(go())
    p50, p99 = np.percentile(times, [50, 99])
    return {"qps": len(times) / seconds, "p50_ms": float(p50), "p99_ms": float(p99)}


def spans(records: Sequence[dict[str, Any]]) -> list[dict[str, tuple[float, float]]]:
    """Of Triton's trace file: for each request of the ensemble when each stage began and ended, ms from its start."""
    name, parent, when = dict[int, str](), dict[int, int](), dict[int, dict[str, int]]()
    for r in records:
        if "model_name" in r:
            name[r["id"]], parent[r["id"]] = r["model_name"], int(r.get("parent_id", 0))
        for t in r.get("timestamps", ()):
            when.setdefault(r["id"], {})[t["name"]] = int(t["ns"])
    out = []
    for whole in (i for i, n in name.items() if n == contract.ENSEMBLE):
        start = when[whole]["REQUEST_START"]
        parts = [whole, *(i for i, p in parent.items() if p == whole)]
        edges = {name[i]: [(when[i][f"REQUEST_{e}"] - start) / 1e6 for e in ("START", "END")] for i in parts}
        out.append({n: (a, b) for n, (a, b) in edges.items()})
    return out


def traced(options: ServerOptions, sent: Sequence[bytes]) -> dict[str, Any]:
    """The trace of searches one at a time: median ms at which each stage began and ended."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        settings = ("mode=triton", f"triton,file={file}", "rate=1", "level=TIMESTAMPS")
        with TritonServer(replace(options, extra=tuple(f"--trace-config={s}" for s in settings))) as server:
            closed(grpc_address(server), list(sent), 1, 3.0)
        searches = spans(json.loads(file.read_text()))[20:]  # the first pay for what is set up late
    stages = {n: [float(np.median([r[n][e] for r in searches])) for e in (0, 1)] for n in searches[0]}
    return {"requests": len(searches), "stages_ms": stages}


@contextmanager
def without_search(root: Path) -> Iterator[Path]:
    """A copy of the run's repository whose configurations know no search."""
    with tempfile.TemporaryDirectory() as folder:
        run, copy = Run(root), Run(Path(folder))
        shutil.copytree(run.repository, copy.repository, ignore=shutil.ignore_patterns(contract.QUERY_SEARCH))
        copy.feature_store.symlink_to(run.feature_store.resolve())
        schema = run.schema()
        write_configs(copy.repository, replace(run.shapes(), search=0), schema.heads, schema.exclude_seen)
        seal(copy.repository)
        yield copy.repository


def measure(
    root: Path, profile: str, sent: dict[str, list[bytes]], seconds: float, rounds: int
) -> tuple[dict[tuple[str, int], dict[str, float]], dict[str, dict[str, dict[str, float]]], float]:
    """By kind and concurrency the medians of QPS and latencies, all kinds taking turns; by kind what each stage took
    (at concurrency 1); MiB of the server with search."""
    runs: dict[tuple[str, int], list[dict[str, float]]] = {}
    stages: dict[str, dict[str, dict[str, float]]] = {}
    run = Run(root)
    with (
        without_search(root) as folder,
        TritonServer(on_free_ports(folder, profile, run.server_log)) as plain,
        TritonServer(on_free_ports(run.repository, profile, run.server_log)) as server,
    ):
        url, other = grpc_address(server), grpc_address(plain)
        closed(url, sent["search"], 4, 2.0)
        closed(other, sent["recommend"], 4, 2.0)
        with grpcclient.InferenceServerClient(url) as client:
            for _, (kind, concurrency) in in_turns(rounds, list(itertools.product((PLAIN, *sent), (1, 16)))):
                before = statistics(client)
                address, messages = (other, sent["recommend"]) if kind == PLAIN else (url, sent[kind])
                runs.setdefault((kind, concurrency), []).append(closed(address, messages, concurrency, seconds))
                if concurrency == 1 and kind != PLAIN:
                    stages[kind] = between(before, statistics(client))
        return {key: medians(r) for key, r in runs.items()}, stages, memory_mib(server.pid)


def stage_sentence(took: dict[str, float]) -> str:
    """What a search takes in the server, by Triton's statistics."""
    stages = {name: ms for name, ms in took.items() if name != contract.ENSEMBLE}
    parts = ", ".join(f"{name} {ms:.2f}" for name, ms in stages.items())
    return f"a search takes {took[contract.ENSEMBLE]:.2f} ms in the server: {parts}; sum {sum(stages.values()):.2f}"


def main(
    root: Annotated[Path, typer.Argument(help="the run, artifacts/<name>, compiled with search")],
    profile: str = "",
    seconds: Annotated[float, typer.Option(help="of each measurement")] = 5.0,
    rounds: int = 3,
) -> None:
    if not Run(root).shapes().search:
        raise ValueError(
            f"{root}: expected a run compiled with search, got one without; run 'vivace train --task search', then "
            "'vivace compile'"
        )
    sent = kinds(root, 500)
    by_kind, stages, memory = measure(root, profile, sent, seconds, rounds)
    table = Table(title=f"{root.name}, profile {profile or 'default'}, {cpu()[0]}", title_justify="left")
    for name in ("", "concurrency", "QPS", "p50 ms", "p99 ms"):
        table.add_column(name, justify="right" if name else "left")
    for (kind, concurrency), r in by_kind.items():
        table.add_row(kind, str(concurrency), f"{r['qps']:.0f}", f"{r['p50_ms']:.2f}", f"{r['p99_ms']:.2f}")
    console.print(table)
    ratio = {str(n): by_kind["recommend", n]["p50_ms"] / by_kind[PLAIN, n]["p50_ms"] for n in (1, 16)}
    console.print(
        f"a recommendation takes {ratio['1']:.2f} times (16 at once: {ratio['16']:.2f}) what it takes without search"
    )
    trace = None
    if contract.RANKING in stages["search"]:
        options = on_free_ports(Run(root).repository, profile, Run(root).server_log)
        trace = traced(options, sent["search"])
        parts = (f"{n} {a:.1f} to {b:.1f}" for n, (a, b) in trace["stages_ms"].items())
        console.print(f"Triton's trace of {trace['requests']} searches, ms: {', '.join(parts)}")
    took = {m: s["total_ms"] for m, s in stages["search"].items() if s["total_ms"]}
    if took.get(contract.QUERY_SEARCH):
        console.print(stage_sentence(took))
    print(record_line(
        "search beside recommendation", data=root.name, profile=profile, p50_over_without=ratio, trace=trace,
        runs={f"{kind} {n}": r for (kind, n), r in by_kind.items()}, stages_ms=took, memory_mib=round(memory),
    ))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
