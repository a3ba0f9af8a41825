"""Many changes of the served version under open load: what callers see of them, and what memory keeps.

    python -m benchmarks.version_changes artifacts/shop --changes 100 --qps 40

Recorded requests come at random (Poisson) over gRPC, whatever became of those before, while the fleet goes to another
version and back again, ``--changes`` times in all. Each change begins a part of ``--part`` seconds; what comes when it
is over is the comparison, so both are measured in turns. The other version is the served one once more, so every answer
is compared with that before the first change; at the end scores are compared too, bit for bit. Memory is that of all
processes of the fleet (PSS), at rest: before, when the first server has answered the recorded requests as each new one
does, after two changes and after all. The load comes from a process of its own. It works on a copy of the run. The last
line of stdout is one JSON object.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import psutil
import typer
from rich.console import Console
from tritonclient.grpc import service_pb2

from benchmarks.fault_kinds import copy_of, published_again, wait_well
from benchmarks.fault_load import TIMEOUT_S, WRONG, items_of
from benchmarks.load_process import LoadProcess
from loadtest.generate.arrivals import due_times
from loadtest.generate.generator import METHOD, messages
from loadtest.generate.local_server import on_free_ports
from loadtest.reports.record import record_line
from serving.acceptance import Acceptance, recorded_calls
from serving.fleet import Fleet
from vivace.run import Run

SETTLED_S = 0.5  # after a change its callers still count as beside it
console = Console(width=120)


def memory_mib(fleet: Fleet) -> dict[str, int]:
    """PSS of the fleet's processes and all below them, by program and together."""
    processes = [psutil.Process(pid) for pid in fleet.processes()]
    below = [child for process in processes for child in process.children(recursive=True)]
    mib: Counter[str] = Counter()
    for process in {p.pid: p for p in (*processes, *below)}.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            mib[process.name()] += process.memory_full_info().pss / (1 << 20)
    return {name: round(size) for name, size in mib.most_common()} | {"all": round(mib.total())}


def latencies(records: list[Any]) -> dict[str, Any]:
    ms = np.array([(r[2] - r[0]) * 1000 for r in records])
    refused = Counter(r[3] for r in records if r[3])
    return {
        "requests": len(records), "wrong": refused.pop(WRONG, 0), "refused": dict(refused),
        "p50_ms": round(float(np.percentile(ms, 50)), 1), "p99_ms": round(float(np.percentile(ms, 99)), 1),
    }  # fmt: skip


def main(
    root: Annotated[Path, typer.Argument(help="a compiled run, such as artifacts/shop")],
    changes: Annotated[int, typer.Option(help="half of them back", min=2)] = 100,
    qps: Annotated[float, typer.Option(help="offered requests a second")] = 40.0,
    part: Annotated[float, typer.Option(help="seconds of load from one change to the next")] = 14.0,
    profile: str = "fused",
    seed: int = 7,
) -> None:
    run = Run(root)
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of(run, Path(folder) / "run")
        sent = list(dict.fromkeys(messages(root)))[:200]
        options = on_free_ports(copy.repository, profile, copy.server_log, guard=True)
        with Fleet(options, lambda text: None) as fleet, contextlib.ExitStack() as stack:
            wait_well(fleet)
            server = fleet.replicas[0].server
            url = f"{server.address}:{server.grpc_port}"
            with grpc.insecure_channel(url) as channel:
                method = channel.unary_unary(METHOD)
                raw = [method(body, timeout=TIMEOUT_S) for body in sent]
            expected = [items_of(answer) for answer in raw]
            load_process = stack.enter_context(LoadProcess(url, sent, expected))
            with load_process.run(due_times("poisson", qps, part, seed)):
                pass
            accept, took_s = Acceptance(recorded_calls(copy)), list[float]()
            accept(server, server)
            mib, first = {"before": memory_mib(fleet)}, fleet.release
            versions = (published_again(copy), first)
            beside, between = list[Any](), list[Any]()
            for change in range(changes):
                with load_process.run(due_times("poisson", qps, part, seed + change)) as load:
                    began = time.monotonic()
                    fleet.serve(versions[change % 2], accept, lambda text: None)
                    took_s.append(time.monotonic() - began)
                over_s = took_s[-1] + SETTLED_S
                beside += [record for record in load.records if record[0] < over_s]
                between += [record for record in load.records if record[0] >= over_s]
                for answer, right in load.wrong:
                    console.print("wrong:", service_pb2.ModelInferResponse.FromString(answer), "expected:", right)
                if change == 1:
                    wait_well(fleet)
                    mib["after two"] = memory_mib(fleet)
                console.print(f"change {change + 1} of {changes}: {took_s[-1]:.1f} s", latencies(load.records))
            wait_well(fleet)
            with grpc.insecure_channel(url) as channel:
                method = channel.unary_unary(METHOD)
                again = [method(body, timeout=TIMEOUT_S) for body in sent]
            unlike = [(before, after) for before, after in zip(raw, again, strict=True) if before != after]
            for pair in unlike:
                console.print("not the same:", *(service_pb2.ModelInferResponse.FromString(answer) for answer in pair))
            mib["after all"] = memory_mib(fleet)
    if not between:
        raise typer.BadParameter(f"a change takes {np.median(took_s):.1f} s: expected a longer --part, got {part:g}")
    during, rest = latencies(beside), latencies(between)
    result = {
        "changes": changes, "change_s": {"median": round(float(np.median(took_s)), 1), "max": round(max(took_s), 1)},
        "beside_changes": during, "between_changes": rest,
        "p99_ratio": round(during["p99_ms"] / rest["p99_ms"], 2),
        "mib": mib, "bit_for_bit": f"{len(sent) - len(unlike)} of {len(sent)}",
    }  # fmt: skip
    console.print(result)
    load_average = [round(n, 1) for n in os.getloadavg()]
    print(record_line("version changes", data=root.name, profile=profile, qps=qps, load=load_average, **result))
    if any(figures["wrong"] or figures["refused"] for figures in (during, rest)):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
