"""What a shared store costs a request: the same run with its LMDB and with a Valkey on loopback, taking turns.

    python -m benchmarks.shared_store artifacts/shop --turns 5

Requests name users alone, so each reads a history from the store. ``--callers`` are under way at once over one gRPC
channel, or ``--qps`` come at random. Of each turn: p50 in ms and processor milliseconds a request of the server's
processes and the Valkey's. Differences and ratios are by turn. The Valkey writes each event to its disk. The last line
of stdout is one JSON object.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from benchmarks.fault_kinds import copy_of, filled
from benchmarks.streams import answered_ms
from benchmarks.turns import in_turns, spread, with_spread
from loadtest.generate.generator import messages
from loadtest.generate.local_server import grpc_address, on_free_ports
from loadtest.reports.record import record_line
from serving.launcher import TritonServer
from vivace.machine import processor_seconds
from vivace.run import Run

console = Console(width=120)


def main(
    root: Annotated[Path, typer.Argument(help="a compiled run, such as artifacts/shop")],
    callers: Annotated[int, typer.Option(help="calls under way on the one channel", min=1)] = 16,
    qps: Annotated[float, typer.Option(help="offered at random instead; 0: callers", min=0)] = 0.0,
    turns: Annotated[int, typer.Option(min=1)] = 5,
    seconds: Annotated[float, typer.Option(help="of one turn", min=1)] = 5.0,
    profile: str = "fused",
) -> None:
    with contextlib.ExitStack() as stack:
        copy = copy_of(Run(root), Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run")
        sent = list(dict.fromkeys(messages(root, stored=True)))[:500]
        valkey = filled(stack, copy)
        assert valkey.process is not None
        servers = {}
        for name, url in (("lmdb", ""), ("valkey", f"{valkey.url}?limit_ms=50")):
            log = root / f"store-{name}.log"
            servers[name] = stack.enter_context(
                TritonServer(on_free_ports(copy.repository, profile, log, guard=True, store=url))
            )
        beside = {"lmdb": [], "valkey": [valkey.process.pid]}

        def turn(name: str, number: int, seconds: float) -> tuple[float, float]:
            server = servers[name]
            pids = [*server.processes(), *([server.door.pid] if server.door is not None else []), *beside[name]]
            began, address = processor_seconds(pids), grpc_address(server)
            took_ms = answered_ms(address, sent, callers, qps, seconds, number)
            return float(np.median(took_ms)), (processor_seconds(pids) - began) * 1000 / len(took_ms)

        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
        for name in servers:
            turn(name, 0, 2.0)  # warm
        for number, name in in_turns(turns, list(servers)):
            figures[name].append(turn(name, number + 1, seconds))
            console.print(number, name, [round(value, 2) for value in figures[name][-1]])
    pairs = list(zip(figures["lmdb"], figures["valkey"], strict=True))
    result = {
        "p50_ms": {name: spread([ms for ms, _ in of]) for name, of in figures.items()},
        "more_ms": spread([shared[0] - lmdb[0] for lmdb, shared in pairs]),
        "cpu_ratio": spread([shared[1] / lmdb[1] for lmdb, shared in pairs]),
    }
    own, more, ratio = (with_spread(x, 2) for x in (result["p50_ms"]["lmdb"], result["more_ms"], result["cpu_ratio"]))
    console.print(f"p50 {own} ms by LMDB, {more} more by Valkey; processor time {ratio} times")
    print(
        record_line(
            "shared store", data=root.name, profile=profile, callers=callers, qps=qps, turns=turns, seconds=seconds,
            **result,
        )
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
