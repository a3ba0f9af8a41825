"""Step of the GPU kit: the tests that only a GPU can pass, where no NVTabular is.

python -m benchmarks.gpu.gpu_tests --out FOLDER --seconds 30
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import steps
from benchmarks.gpu.record import Figures
from benchmarks.gpu.steps import Asked

SLOW = "test_training_in_bfloat16_learns[True]"  # compiles for 19 s
FILES = ("tests/unit/training/test_gpu.py",)


class Outcomes:
    """Pytest plugin that writes each test's outcome as it comes."""

    def __init__(self, figures: Figures) -> None:
        self.figures = figures

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            why = {"why": str(report.longrepr).strip().splitlines()[-1][:200]} if report.outcome == "failed" else {}
            self.figures.row(test=report.nodeid, outcome=report.outcome, seconds=report.duration, **why)


def measure(figures: Figures, where: torch.device, given: Asked) -> None:
    code = pytest.main(
        ["-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", f"not {SLOW}", *FILES], plugins=[Outcomes(figures)]
    )
    failed = [row["test"] for row in figures.values["rows"] if row["outcome"] == "failed"]
    figures.set(failed=failed, exit_code=int(code))
    if failed:
        raise SystemExit(f"gpu_tests: failed: {failed}")


if __name__ == "__main__":
    steps.run("gpu_tests", measure, "the tests that only a GPU can pass")
