"""Whether states of a history are worth a trip to a Valkey: what it takes to fetch and to store them there against
encoding the history anew.

    python -m benchmarks.state_trip --out docs/benchmarks/state_trip.json

A valkey-server of its own on this machine, so the way is as short as it can be. Processor time is that of this process
and of Valkey's; "anew" is the graph ``encoder.onnx`` of ``state_reuse``, one thread. The forms take turns. The last
line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer

from benchmarks.local_valkey import ValkeyServer
from benchmarks.state_reuse import ANEW, ITEMS, SEED, compiled, config_of, inputs_of
from benchmarks.turns import in_turns, spread, with_spread
from loadtest.reports.record import record_line
from serving.runtime.encoded import Encoder
from training.models.retrieval import states_of_event
from vivace import contract

GET, SET = "get", "set"
LENGTHS = (200, 1_000, 4_096)
LEAST_S = 0.4  # of processor time of a form in a turn: the kernel counts hundredths


def taken(call: Callable[[], object], server: psutil.Process) -> dict[str, float]:
    """Milliseconds of a call: processor time of this process and the server's, and wall time."""

    def used() -> float:
        times = server.cpu_times()
        return time.process_time() + times.user + times.system

    count, began, before = 0, time.perf_counter(), used()
    while used() - before < LEAST_S:
        call()
        count += 1
    processor, wall = used() - before, time.perf_counter() - began
    return {"processor_ms": processor * 1000 / count, "wall_ms": wall * 1000 / count}


def measured(length: int, turns: int, server: ValkeyServer) -> dict[str, Any]:
    config, rng = config_of("sasrec", length), np.random.default_rng(SEED)
    bytes_of_event = 8 + 4 * (states_of_event(config) + config.width)
    value = rng.bytes(length * bytes_of_event)
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    with tempfile.TemporaryDirectory() as name, server.client() as client:
        encoder = Encoder(Path(name), compiled(config, Path(name)))
        asked = inputs_of([rng.integers(contract.FIRST_ID, ITEMS, length)], config)
        calls: dict[str, Callable[[], object]] = {
            ANEW: lambda: encoder(asked), SET: lambda: client.set("states", value, px=60_000),
            GET: lambda: client.get("states"),
        }  # fmt: skip
        client.set("states", value)
        figures: dict[str, list[dict[str, float]]] = {form: [] for form in calls}
        for _, form in in_turns(turns, tuple(calls)):
            calls[form]()
            figures[form].append(taken(calls[form], process))
    kinds = ("processor_ms", "wall_ms")
    return {"history": length, "kib": len(value) / 1024} | {
        form: {kind: spread([turn[kind] for turn in of]) for kind in kinds} for form, of in figures.items()
    }


def main(
    lengths: Annotated[str, typer.Option(help="events of a history")] = ",".join(map(str, LENGTHS)),
    turns: Annotated[int, typer.Option(help="of each form", min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="JSON of all figures")] = None,
) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, ValkeyServer(Path(name) / "valkey") as server:
        figures = [measured(int(length), turns, server) for length in lengths.split(",")]
    for record in figures:
        of = {
            form: f"{with_spread(record[form]['processor_ms'], 2)} ({record[form]['wall_ms']['median']:.2f} wall)"
            for form in (ANEW, GET, SET)
        }
        typer.echo(
            f"{record['history']}: {record['kib']:.0f} KiB, processor ms " + ", ".join(map(" ".join, of.items()))
        )
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n")
    typer.echo(record_line("state_trip", figures=figures))


if __name__ == "__main__":
    typer.run(main)
