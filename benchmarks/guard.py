"""What the guard costs: the same run with Envoy in front and on Triton's own ports, taking turns.

    python -m benchmarks.guard artifacts/shop --turns 5

Each turn asks ``recommend`` of the recorded requests one after the other over gRPC and over HTTP, then with several
callers at once over gRPC: p50 in ms, and processor milliseconds a request of Triton, its workers and Envoy together.
Differences and ratios are by turn, so that a machine that drifts moves both sides. The last line of stdout is one JSON
object.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.turns import in_turns, spread, with_spread
from loadtest.generate.local_server import on_free_ports
from loadtest.reports.record import record_line
from preprocessing.requests import recorded
from serving.launcher import TritonServer
from vivace import contract
from vivace.client import VivaceClient
from vivace.machine import processor_seconds
from vivace.run import Run

AT_ONCE = 8
MODES = (("grpc", 1), ("http", 1), ("grpc", AT_ONCE))


def ask(
    server: TritonServer, protocol: str, histories: list[list[str]], seconds: float, took_ms: list[float],
    access: dict[str, Any],
) -> None:  # fmt: skip
    """Asks for ``seconds``, one request after the other; adds the time of each. ``access``: of the client."""
    port = server.grpc_port if protocol == "grpc" else server.http_port
    with VivaceClient(f"{server.host}:{port}", protocol, **access) as client:
        stop, n = time.perf_counter() + seconds, 0
        while (started := time.perf_counter()) < stop:
            client.recommend(history=histories[n % len(histories)], top_k=10)
            took_ms.append((time.perf_counter() - started) * 1000)
            n += 1


def measure(
    server: TritonServer, protocol: str, callers: int, histories: list[list[str]], seconds: float, **access: Any
) -> dict[str, float]:
    """p50 in ms, and processor milliseconds a request: of all processes, and of Envoy alone."""
    door = [server.door.pid] if server.door is not None else []
    pids = [server.pid, *door]
    took_ms: list[list[float]] = [[] for _ in range(callers)]
    busy, door_busy = processor_seconds(pids), processor_seconds(door)
    threads = [
        threading.Thread(
            target=ask, args=(server, protocol, histories[i:] + histories[:i], seconds, took_ms[i], access)
        )
        for i in range(callers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    every = np.concatenate(took_ms)
    return {
        "p50_ms": float(np.median(every)),
        "cpu_ms": (processor_seconds(pids) - busy) * 1000 / len(every),
        "door_cpu_ms": (processor_seconds(door) - door_busy) * 1000 / len(every),
    }


def main(
    root: Annotated[Path, typer.Argument(help="a compiled run, such as artifacts/shop")],
    turns: Annotated[int, typer.Option(min=1)] = 5,
    seconds: Annotated[float, typer.Option(help="of one measurement", min=0.5)] = 4.0,
    profile: Annotated[str, typer.Option(help="configs/<profile>.pbtxt")] = "",
) -> None:
    run = Run(root)
    histories = [list(h) for h in recorded(root)[contract.ITEM][:300]]
    figures: dict[tuple[str, int, bool], list[dict[str, float]]] = {}
    with (
        TritonServer(on_free_ports(run.repository, profile, root / "guard-off.log")) as plain,
        TritonServer(on_free_ports(run.repository, profile, root / "guard-on.log", guard=True)) as guarded,
    ):
        for server in (plain, guarded):
            measure(server, "grpc", AT_ONCE, histories, seconds)  # warm
        for _, server in in_turns(turns, (plain, guarded)):
            for protocol, callers in MODES:
                row = measure(server, protocol, callers, histories, seconds)
                figures.setdefault((protocol, callers, server is guarded), []).append(row)
    rows = []
    for protocol, callers in MODES:
        off, on = (figures[protocol, callers, guard] for guard in (False, True))
        more_ms = spread([b["p50_ms"] - a["p50_ms"] for a, b in zip(off, on, strict=True)])
        cpu = spread([b["cpu_ms"] / a["cpu_ms"] for a, b in zip(off, on, strict=True)])
        p50 = spread([b["p50_ms"] for b in on])
        rows.append({"protocol": protocol, "callers": callers, "p50_ms": p50, "more_ms": more_ms, "cpu_ratio": cpu})
        print(
            f"{protocol}, {callers} at once: p50 {with_spread(p50, 2)} ms with the guard, "
            f"{with_spread(more_ms, 2)} more than without; processor time {with_spread(cpu, 2)} times"
        )
    print(record_line("guard", turns=turns, seconds=seconds, profile=profile, rows=rows))


if __name__ == "__main__":
    typer.run(main)
