"""What more servers behind the one door cost a request on the same cores, and how evenly they are asked.

    python -m benchmarks.replicas artifacts/shop --turns 5

Fleets of ``--replicas`` servers take turns, each with the others idle. One gRPC channel keeps ``--streams`` calls
under way, or requests come at ``--qps`` at random. Of each turn: processor milliseconds a request of all the fleet's
processes, Envoy included, and how many requests the busiest server had beside the mean. Ratios are to the first fleet
of the same turn. Beside each larger fleet the first one is asked with as few calls under way as each of its servers has
(``--streams`` by their number): what that costs more is the smaller batches' part. The last line of stdout is one JSON
object.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.fault_kinds import wait_well
from benchmarks.streams import answered_ms
from benchmarks.turns import in_turns, spread, with_spread
from loadtest.generate.generator import messages
from loadtest.generate.local_server import on_free_ports
from loadtest.reports.record import record_line
from serving.fleet import Fleet
from serving.merged_metrics import scraped
from vivace import contract
from vivace.machine import processor_seconds
from vivace.run import Run

COUNTED = "nv_inference_request_success_total"
console = Console(width=120)


def requests_of(fleet: Fleet) -> list[int]:
    """Of ``recommend``, by replica, since each began."""
    counts = []
    for replica in fleet.replicas:
        assert replica.server.sockets is not None
        samples = (s for family in scraped(replica.server.sockets.metrics) for s in family.samples)
        of_model = [s.value for s in samples if s.name in (COUNTED, COUNTED.removesuffix("_total"))
                    and s.labels["model"] == contract.ENSEMBLE]  # fmt: skip
        counts.append(int(sum(of_model)))
    return counts


def _address(fleet: Fleet) -> str:
    server = fleet.replicas[0].server
    return f"{server.address}:{server.grpc_port}"


def measured(fleet: Fleet, sent: list[bytes], streams: int, qps: float, seconds: float, seed: int) -> dict[str, float]:
    """One turn: ``cpu_ms`` a request and ``busiest``, the most requests of a server over the mean."""
    before, began = requests_of(fleet), processor_seconds(fleet.processes())
    answered = len(answered_ms(_address(fleet), sent, streams, qps, seconds, seed))
    busy_ms = (processor_seconds(fleet.processes()) - began) * 1000
    each = [now - then for now, then in zip(requests_of(fleet), before, strict=True)]
    return {
        "cpu_ms": busy_ms / answered,
        "busiest": max(each) / (sum(each) / len(each)),
        "answered_a_second": answered / seconds,
    }


def main(
    root: Annotated[Path, typer.Argument(help="a compiled run, such as artifacts/shop")],
    replicas: Annotated[str, typer.Option(help="sizes of the fleets, by commas")] = "1,2,4",
    streams: Annotated[int, typer.Option(help="calls under way on the one channel", min=1)] = 64,
    qps: Annotated[float, typer.Option(help="offered at random instead; 0: streams", min=0)] = 0.0,
    turns: Annotated[int, typer.Option(min=1)] = 5,
    seconds: Annotated[float, typer.Option(help="of one turn", min=1)] = 5.0,
    profile: str = "fused",
) -> None:
    sizes = [int(n) for n in replicas.split(",")]
    run, sent = Run(root), list(dict.fromkeys(messages(root)))[:500]
    figures: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    alone: dict[int, list[float]] = {size: [] for size in sizes}  # processor ms a request of the first fleet
    with contextlib.ExitStack() as stack:
        fleets = []
        for size in sizes:
            options = on_free_ports(run.repository, profile, root / f"replicas-{size}.log", guard=True)
            fleets.append(stack.enter_context(Fleet(options, lambda text: None, size)))
            wait_well(fleets[-1])
            measured(fleets[-1], sent, streams, qps, 1.0, 0)  # warm
        for turn, fleet in in_turns(turns, fleets):
            row = measured(fleet, sent, streams, qps, seconds, turn)
            figures[size := len(fleet.replicas)].append(row)
            few = streams * sizes[0] // size
            part = measured(fleets[0], sent, few, qps, seconds, turn) if size != sizes[0] and few and not qps else row
            alone[size].append(part["cpu_ms"])
            console.print(turn, len(fleet.replicas), {name: round(value, 3) for name, value in row.items()})
    first = [row["cpu_ms"] for row in figures[sizes[0]]]
    result: dict[str, Any] = {}
    table = Table("servers", "processor ms a request", f"times that of {sizes[0]}", f"of {sizes[0]} with as few calls",
                  "busiest over the mean", "a second")  # fmt: skip
    for size in sizes:
        rows = figures[size]
        result[str(size)] = row_of = {
            "cpu_ms": spread([row["cpu_ms"] for row in rows]),
            "ratio": spread([row["cpu_ms"] / base for row, base in zip(rows, first, strict=True)]),
            "of_batches": spread([ms / base for ms, base in zip(alone[size], first, strict=True)]),
            "busiest": spread([row["busiest"] for row in rows]),
            "answered_a_second": spread([row["answered_a_second"] for row in rows]),
        }
        table.add_row(
            str(size), with_spread(row_of["cpu_ms"], 2), with_spread(row_of["ratio"], 2),
            with_spread(row_of["of_batches"], 2), with_spread(row_of["busiest"], 3),
            with_spread(row_of["answered_a_second"]),
        )  # fmt: skip
    console.print(table)
    print(
        record_line(
            "replicas", data=root.name, profile=profile, streams=streams, qps=qps, turns=turns, seconds=seconds,
            replicas=result,
        )
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
