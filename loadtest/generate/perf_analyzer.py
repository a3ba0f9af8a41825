"""perf_analyzer, Triton's own load generator, from the wheel ``tritonclient==2.51.0`` (not installable beside our
protobuf, so only its binary is taken out, into ``.tools/``)."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from serving.wheel import wheel_folder
from vivace import contract
from vivace.manifest import CHECKOUT

WHEEL = "tritonclient==2.51.0"
TOOLS = CHECKOUT / ".tools" / "perf_analyzer-2.51.0"
LIBRARIES = {"libb64": "libb64.so.0d", "libcudart": "libcudart.so.12"}  # what the binary asks for by these names


class MissingError(RuntimeError):
    """perf_analyzer is not here and could not be fetched."""


def binary() -> Path:
    """Path of perf_analyzer; fetched with pip on first use. Raises MissingError."""
    target = TOOLS / "perf_analyzer"
    if target.exists():
        return target
    TOOLS.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(TOOLS), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(TOOLS.glob("tritonclient-*.whl"))
    if done.returncode or not wheels:
        raise MissingError(f"perf_analyzer: pip could not fetch {WHEEL}: {done.stderr.strip()[-300:]}")
    with zipfile.ZipFile(wheels[0]) as archive:
        name = next(n for n in archive.namelist() if n.endswith("/bin/perf_analyzer"))
        partial = target.with_suffix(".partial")
        partial.write_bytes(archive.read(name))
    wheels[0].unlink()
    for library in (wheel_folder().parent / "nvidia_pytriton.libs").iterdir():
        for prefix, name_in_binary in LIBRARIES.items():
            link = TOOLS / name_in_binary
            if library.name.startswith(f"{prefix}-"):
                link.unlink(missing_ok=True)
                link.symlink_to(library)
    partial.chmod(0o755)
    partial.rename(target)
    return target


UNSTEADY = 100  # per cent: whatever came


def write_input(requests: Iterable[tuple[str, list[str]]], top_k: int, path: Path) -> None:
    """Requests in perf_analyzer's JSON form."""
    data = [
        {
            contract.USER_ID.name: {"content": [user], "shape": [1]},
            contract.QUERY.name: {"content": [""], "shape": [1]},
            contract.HISTORY.name: {"content": history, "shape": [len(history)]},
            contract.TOP_K.name: {"content": [top_k], "shape": [1]},
        }
        for user, history in requests
    ]
    path.write_text(json.dumps({"data": data}))


def measure(url: str, data: Path, concurrency: int, window_s: float, folder: Path, agree: int = 15) -> dict[str, float]:
    """Closed loop over gRPC, windows of ``window_s`` until three agree within ``agree`` % (on a machine too unsteady
    for that, three times as much): QPS and latency in ms.

    Raises RuntimeError with perf_analyzer's words. (Its ``--request-count`` counts in whole seconds: 10 % off here.)
    """
    tool = binary()
    report = folder / f"perf_{concurrency}.csv"
    command = [
        str(tool), "-m", contract.ENSEMBLE, "-u", url, "-i", "grpc", "--input-data", str(data),
        "--concurrency-range", str(concurrency), "--measurement-interval", str(int(window_s * 1000)),
        "--stability-percentage", str(agree), "--max-trials", "10",
        "-f", str(report), "--percentile", "99", "--max-threads", str(min(concurrency, 2)),
    ]  # fmt: skip
    libraries = [str(TOOLS), str(wheel_folder().parent / "nvidia_pytriton.libs"), os.environ.get("LD_LIBRARY_PATH", "")]
    env = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries))}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if "Failed to obtain stable measurement" in done.stderr + done.stdout and agree < UNSTEADY:
        return measure(url, data, concurrency, window_s, folder, min(3 * agree, UNSTEADY))
    if done.returncode or not report.exists():
        raise RuntimeError(f"perf_analyzer: exit code {done.returncode}: {(done.stderr or done.stdout)[-500:]}")
    with report.open() as stream:
        row = next(csv.DictReader(stream))
    return {
        "qps": float(row["Inferences/Second"]),
        **{f"p{q}_ms": float(row[f"p{q} latency"]) / 1000 for q in (50, 95, 99)},
    }
