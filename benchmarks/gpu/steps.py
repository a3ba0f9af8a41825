"""The command line of a step of the GPU kit."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.record import Figures, device


@dataclass(frozen=True)
class Asked:
    """What a step is given beside where it runs: the folder of its results, that of prepared runs, the rehearsal."""

    out: Path
    artifacts: Path
    cpu: bool


def run(step: str, measure: Callable[[Figures, torch.device, Asked], None], describe: str) -> None:
    """``python -m benchmarks.gpu.<step> --out FOLDER --seconds N [--artifacts FOLDER] [--cpu]``."""
    parser = argparse.ArgumentParser(prog=f"benchmarks.gpu.{step}", description=describe)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=90.0, help="that the step may take")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="folder of prepared runs")
    parser.add_argument("--cpu", action="store_true", help="rehearse with a tiny model on the CPU")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.manual_seed(7)
    where = device(chosen.cpu)
    figures = Figures(chosen.out, step, chosen.seconds)
    figures.set(device=torch.cuda.get_device_name() if where.type == "cuda" else "cpu", torch=torch.__version__)
    measure(figures, where, Asked(chosen.out, chosen.artifacts, chosen.cpu))
    figures.set(seconds=round(chosen.seconds - figures.left(), 1), done=True)
