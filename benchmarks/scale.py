"""Does a log larger than memory go through? Peak memory and speed of ``vivace prepare`` on a generated Parquet log.

    python -m benchmarks.scale --rows 10000000 --partitions 32 [--workers 2]

Writes the log in chunks to a temporary folder, runs ``prepare`` on it as a subprocess, samples the memory of all its
processes (PSS, shared pages once). The last line of stdout is one JSON object.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.progress import track

from loadtest.reports.record import record_line
from vivace.machine import memory_mib

CHUNK = 500_000
MAPPING = """
name = "scale"
[interactions]
files = "log.parquet"
user = "user"
item = "item"
time = "time"
event_type = "event"
"""


def write_log(file: Path, rows: int, users: int, items: int) -> int:
    """Zipf-skewed items, users of unequal activity; returns the bytes the log takes as one pandas frame."""
    rng, writer, frame_bytes = np.random.default_rng(0), None, 0
    for start in track(range(0, rows, CHUNK), description="writing the log"):
        n = min(CHUNK, rows - start)
        frame = pd.DataFrame(
            {
                "user": np.char.add("user-", (users * rng.random(n) ** 1.5).astype(int).astype(str)).astype(object),
                "item": np.char.add("item-", (rng.zipf(1.2, n) % items).astype(str)).astype(object),
                "time": 1_700_000_000 + (start + np.arange(n)) // 4,
                "event": rng.choice(np.array(["view", "buy"], object), n, p=(0.9, 0.1)),
            }
        )
        frame_bytes += int(frame.memory_usage(deep=True).sum())
        table = pa.Table.from_pandas(frame, preserve_index=False)
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    return frame_bytes


def peak_memory_mib(process: subprocess.Popen[bytes]) -> float:
    """Largest proportional set size of the process and its children together until it ends."""
    peak = 0.0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):  # a process may end, or change its owner, while it is read
            peak = max(peak, memory_mib(process.pid))
        time.sleep(0.3)
    return peak


def main(
    rows: int = 10_000_000, users: int = 500_000, items: int = 100_000, partitions: int = 32, workers: int = 0
) -> None:
    with tempfile.TemporaryDirectory(prefix="vivace-scale-") as name:
        folder = Path(name)
        frame_bytes = write_log(folder / "log.parquet", rows, users, items)
        (folder / "mapping.toml").write_text(MAPPING)
        command = [
            sys.executable, "-m", "vivace.cli", "prepare", "--data", "tables",
            "--path", str(folder / "mapping.toml"), "--artifacts", str(folder / "artifacts"),
            "--partitions", str(partitions), "--workers", str(workers),
        ]  # fmt: skip
        started = time.monotonic()
        process = subprocess.Popen(command)
        peak = peak_memory_mib(process)
        seconds = time.monotonic() - started
        if process.returncode:
            raise SystemExit(process.returncode)
    summary = {
        "rows": rows,
        "partitions": partitions,
        "workers": workers,
        "seconds": round(seconds),
        "rows_per_s": round(rows / seconds),
        "log_as_pandas_mib": round(frame_bytes / 2**20),
        "peak_pss_mib": round(peak),
    }
    print(record_line("prepare out of core", **summary))


if __name__ == "__main__":
    typer.run(main)
