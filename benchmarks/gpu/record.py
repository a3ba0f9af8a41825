"""What a step of the GPU kit writes: one JSON file that is whole after every figure, so that a step that is stopped
keeps what it has.

A step is a module of this folder, run as ``python -m benchmarks.gpu.<step> --out FOLDER --seconds N [--cpu]``. It may
take ``--seconds``, is stopped a little later, and writes ``FOLDER/<step>.json``.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from loadtest.reports.record import finite
from vivace.manifest import plain


class Figures:
    """Rows and single figures of one step. ``left()`` is the time in seconds that the step still has."""

    def __init__(self, out: Path, step: str, seconds: float) -> None:
        self.path = out / f"{step}.json"
        self.deadline = time.monotonic() + seconds
        self.values: dict[str, Any] = {"step": step, "rows": [], "not_run": {}}
        out.mkdir(parents=True, exist_ok=True)
        self.write()

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def row(self, **values: Any) -> None:
        """One more line of the step's table."""
        self.values["rows"].append(values)
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()), flush=True)
        self.write()

    def set(self, **values: Any) -> None:
        """Figures of the step as a whole."""
        self.values |= values
        self.write()

    def skip(self, what: str, why: object) -> None:
        """What could not be run, and the reason in one line."""
        lines = str(why).strip().splitlines() or [type(why).__name__]
        self.values["not_run"][what] = lines[0][:300]
        print(f"not run: {what}: {lines[0][:300]}", flush=True)
        self.write()

    def write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(finite(plain(self.values)), indent=1, allow_nan=False))
        os.replace(partial, self.path)


def device(cpu: bool) -> torch.device:
    """Where a step runs. Raises SystemExit where a GPU is expected and none is there."""
    if cpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("gpu: expected a CUDA device, found none; --cpu rehearses the steps with tiny models")
    return torch.device("cuda")
