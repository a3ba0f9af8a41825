"""The command line of a step of the GPU kit."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu.record import Figures, device


def run(step: str, measure: Callable[[Figures, torch.device], None], describe: str) -> None:
    """``python -m benchmarks.gpu.<step> --out FOLDER --seconds N [--cpu]``."""
    parser = argparse.ArgumentParser(prog=f"benchmarks.gpu.{step}", description=describe)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=90.0, help="that the step may take")
    parser.add_argument("--cpu", action="store_true", help="rehearse with a tiny model on the CPU")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.manual_seed(7)
    where = device(chosen.cpu)
    if chosen.cpu:
        torch.set_num_threads(1)  # tiny models; others may be at work
    figures = Figures(chosen.out, step, chosen.seconds)
    figures.set(device=torch.cuda.get_device_name() if where.type == "cuda" else "cpu", torch=torch.__version__)
    with torch.no_grad():
        measure(figures, where)
    figures.set(seconds=round(chosen.seconds - figures.left(), 1), done=True)
