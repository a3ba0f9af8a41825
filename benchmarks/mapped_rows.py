"""Embeddings of histories from a graph that holds its int8 table, or maps it into memory: start, memory and time.

    python -m benchmarks.mapped_rows --items 20000000 --width 64

Each form is opened in a process of its own and asked for the rows of made-up histories, items by a power law: first on
a file that has left the page cache, then again. Memory is what a process adds, proportional set size. The last line of
stdout is one JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer

from loadtest.reports.record import record_line
from training.compile.onnx_export import export, put_outside
from training.models.int8_table import Int8Rows
from vivace.contract import FIRST_ID
from vivace.manifest import CHECKOUT, environment, write_json
from vivace.onnx_session import open_session

GRAPH, ROWS = "encoder.onnx", "encoder.rows"


def histories(items: int, requests: int, history: int) -> np.ndarray:
    """Ids int64 [requests, history]: frequent items have small ids."""
    share = np.random.default_rng(7).random((requests, history))
    return FIRST_ID + ((items - FIRST_ID) * share**4).astype(np.int64)


def drop_from_cache(folder: Path) -> None:
    """Asks the kernel to forget the pages of the files."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(folder: Path, items: int, requests: int, history: int) -> dict[str, Any]:
    """Figures of one form, in this process."""
    me = psutil.Process()
    drop_from_cache(folder)
    before, began = me.memory_full_info().pss, time.perf_counter()
    session = open_session(folder / GRAPH)
    record: dict[str, Any] = {"seconds to open": round(time.perf_counter() - began, 2)}
    added = lambda: round((me.memory_full_info().pss - before) / 2**20)  # noqa: E731
    record["mib when open"] = added()
    for name in ("first", "again"):
        spent = []
        for ids in histories(items, requests, history):
            began = time.perf_counter()
            session.run(None, {"IDS": ids[None]})
            spent.append((time.perf_counter() - began) * 1e6)
        record[f"us {name}"] = {"p50": round(float(np.median(spent))), "p99": round(float(np.quantile(spent, 0.99)))}
        record[f"mib {name}"] = added()
    return record


def main(
    items: int = 20_000_000,
    width: int = 64,
    requests: int = 5_000,
    history: int = 50,
    save: Annotated[Path | None, typer.Option(help="JSON file for the figures")] = None,
    form: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    if form:
        print(json.dumps(measured(Path(form), items, requests, history)))
        return
    record: dict[str, Any] = {"items": items, "width": width, "requests": requests, "history": history}
    with tempfile.TemporaryDirectory(prefix="vivace-rows-") as scratch:
        rows = Int8Rows(torch.zeros(2, width))
        rows.rows_VD = torch.randint(-127, 128, (items, width), dtype=torch.int8)
        rows.scale_V1 = torch.rand(items, 1)
        for name in ("in the graph", "mapped"):
            folder = Path(scratch) / name.replace(" ", "-")
            example = (torch.zeros(1, history, dtype=torch.long),)
            export(rows, example, ["IDS"], ["EMBEDDINGS"], folder / GRAPH)
            if name == "mapped":
                put_outside(folder / GRAPH, ROWS)
            record[name] = {"mib on disk": round(sum(f.stat().st_size for f in folder.iterdir()) / 2**20)}
        del rows
        for name in ("in the graph", "mapped"):
            folder = Path(scratch) / name.replace(" ", "-")
            command = [sys.executable, "-m", "benchmarks.mapped_rows", "--form", str(folder)]
            command += ["--items", str(items), "--requests", str(requests), "--history", str(history)]
            answer = subprocess.run(command, check=True, cwd=CHECKOUT, capture_output=True, text=True).stdout
            record[name] |= json.loads(answer.splitlines()[-1])
            print(f"{name}: {record[name]}", flush=True)
    if save is not None:
        command_line = " ".join(["python -m benchmarks.mapped_rows", *sys.argv[1:]])
        write_json(save, {"command": command_line, **environment(), **record})
    print(record_line("mapped int8 rows", **record))


if __name__ == "__main__":
    typer.run(main)
