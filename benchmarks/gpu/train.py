"""Step of the GPU kit: the trainings, side by side on one card.

    python -m benchmarks.gpu.train --out FOLDER --seconds 150

A training of this size waits for the processor most of the time, so several share the card; their wall times are those
of a shared card and say so. Figures of speed come from ``train_speed``, which runs alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import steps
from benchmarks.gpu.record import Figures
from benchmarks.gpu.steps import Asked

POLL_S = 0.5


@dataclass(frozen=True)
class Training:
    """One run: a data set, a preset with changes, a seed."""

    label: str
    data: str
    preset: str
    seed: int = 7
    changes: dict[str, Any] = field(default_factory=dict)


ML = "ml-1m-benchmark"
ON_GPU = (  # sizes between those that ran, and `large` with more steps and less dropout; `base-7` for its weights
    Training("base-7", ML, "base"),
    Training("wide-7", ML, "base", 7, {"encoder.width": 256, "encoder.layers": 4, "retrieval.learning_rate": 1e-3}),
    Training("narrow-7", ML, "base", 7, {"encoder.width": 64, "encoder.heads": 2, "retrieval.learning_rate": 4e-3}),
    Training(
        "large-steps-7", ML, "large", 7,
        {"retrieval.epochs": 12, "retrieval.batch_size": 32, "encoder.dropout": 0.2, "retrieval.warmup_steps": 200},
    ),
)  # fmt: skip
KEPT = "base-7"  # whose weights come back
REHEARSAL = (Training("tiny-7", "", "tiny"),)  # of the first data set at hand


def command(training: Training, artifacts: Path, out: Path, seconds: float, cpu: bool) -> list[str]:
    data = training.data or min(p.parent.name for p in artifacts.glob("*/features"))
    return [
        sys.executable, "-m", "benchmarks.gpu.train_one", "--features", str(artifacts / data / "features"),
        "--root", str(out / "runs" / training.label), "--out", str(out / "trainings"), "--label", training.label,
        "--preset", training.preset, "--values", json.dumps(training.changes), "--seed", str(training.seed),
        "--seconds", str(seconds), *["--cpu"] * cpu,
    ]  # fmt: skip


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """One line of a training's own file."""
    test = {f"{method} {m}": row[m] for method, row in record.get("test", {}).items() for m in ("NDCG@10", "HR@10")}
    kept = ("preset", "changes", "seed", "parameters", "retrieval_s", "ranking_s", "seconds", "gpu_memory_mib")
    return {
        "label": record["step"], "epochs": len(record["rows"]), **{k: record[k] for k in kept if k in record},
        "validation_ndcg10": record.get("validation_ndcg10", {}), **test,
    }  # fmt: skip


def measure(figures: Figures, where: torch.device, given: Asked) -> None:
    out, artifacts, cpu = given.out, given.artifacts, given.cpu
    trainings = [t for t in (REHEARSAL if cpu else ON_GPU) if not t.data or (artifacts / t.data / "features").is_dir()]
    for missing in sorted({t.data for t in ON_GPU if not cpu} - {t.data for t in trainings}):
        figures.skip(missing, f"no prepared features under {artifacts}")
    threads = 1 if cpu else max(1, len(os.sched_getaffinity(0)) // max(len(trainings), 1))
    (out / "trainings").mkdir(parents=True, exist_ok=True)
    running = {}
    for t in trainings:
        log = (out / "trainings" / f"{t.label}.log").open("w")
        process = subprocess.Popen(
            command(t, artifacts, out, figures.left() - 3, cpu), stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        running[t.label] = process
    while running and figures.left() > 2:
        for label in [k for k, p in running.items() if p.poll() is not None]:
            collect(figures, out, label, f"ended with {running.pop(label).returncode}")
        time.sleep(POLL_S)
    for label, process in running.items():
        process.kill()
        collect(figures, out, label, "stopped when the step's time was over")
    keep(out / "runs" / ("tiny-7" if cpu else KEPT), out)


def keep(root: Path, out: Path) -> None:
    """Packs what a run needs to be compiled and served elsewhere, with the features it was made from, into one small
    file. Nothing where the training did not end."""
    parts = [p for p in (root / "preset.json", *root.glob("*/weights.pt"), *root.glob("*/manifest.json")) if p.exists()]
    if (root / "ranking" / "weights.pt") in parts:
        with tarfile.open(out / f"{root.name}.tar.xz", "w:xz", preset=1) as archive:
            for part in parts:
                archive.add(part, part.relative_to(root.parent))


def collect(figures: Figures, out: Path, label: str, ending: str) -> None:
    """Adds a training that ended, or was stopped, to the step's figures."""
    path = out / "trainings" / f"{label}.json"
    record = json.loads(path.read_text()) if path.exists() else {"step": label, "rows": []}
    figures.row(ending=ending, **summary(record))
    if "test" not in record:
        log = (out / "trainings" / f"{label}.log").read_text(errors="replace").strip().splitlines()
        figures.skip(label, f"{ending}; last words: {log[-1] if log else 'none'}")


if __name__ == "__main__":
    steps.run("train", measure, "trainings side by side on one card")
