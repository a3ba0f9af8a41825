"""How fast the retrieval and ranking graphs of several runs are, in one run, taking turns.

    python -m benchmarks.graphs artifacts/ml-1m artifacts/ml-1m/compressed/pruned --batch 1 --batch 16

Each folder is a compiled run (``vivace compile`` or ``vivace compress``). Every round measures each of them once, in an
order that changes; the figure is the median over the rounds, the ratio is to the first folder. ``--eager`` adds PyTorch
on the first run's models. The requests are those that the first run recorded. The last line of stdout is one JSON
object.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from loadtest.reports.graph_speed import measure
from loadtest.reports.record import record_line


def main(
    runs: Annotated[list[Path], typer.Argument(help="compiled runs; the first is the reference")],
    batch: Annotated[list[int], typer.Option(help="sizes of a batch")] = [1, 16],  # noqa: B006 - typer reads the default
    rounds: int = 7,
    seconds: Annotated[float, typer.Option(help="of one measurement")] = 1.0,
    threads: Annotated[int, typer.Option(help="of ONNX Runtime, PyTorch and OpenVINO")] = 1,
    eager: Annotated[bool, typer.Option(help="PyTorch on the first run's models too")] = False,
    openvino: Annotated[bool, typer.Option(help="OpenVINO on the same graphs too")] = False,
) -> None:
    speeds = measure(runs, batch, rounds, seconds, threads, eager, openvino)
    for x in speeds:
        print(
            f"{x.run:60} batch {x.batch:3}  {x.ms:8.2f} ms  {x.ratio:5.2f} times the first  {x.bytes / 2**20:7.1f} MiB"
        )
    print(record_line("graphs", threads=threads, rows=[asdict(x) for x in speeds]))


if __name__ == "__main__":
    typer.run(main)
