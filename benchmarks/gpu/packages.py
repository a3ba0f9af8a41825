"""Step of the GPU kit: how long AOTInductor compiles, graph by graph, and where it is when its time is over.

    python -m benchmarks.gpu.packages --out FOLDER --seconds 150

The smallest graph first: two layers, then the stages of ``tiny`` and of ``base``, untrained. Each is exported here and
compiled by a process of its own with a time limit, as ``vivace compile --target aoti`` does it; its log has the
compiler's stack every few seconds, and the end of the log is kept. A package is loaded and its answers are compared
with PyTorch's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.gpu import clock, steps, subjects
from benchmarks.gpu.record import Figures
from benchmarks.gpu.steps import Asked
from serving.runtime.aoti_package import Package
from training.compile import aoti
from training.models.ranking import RankingGraph
from vivace.manifest import CHECKOUT

ITEMS, ROWS = 3_419, 8
LIMIT_S, LEAST_S = 100.0, 5.0  # of one graph; with less than that left none is begun
LAST_LINES = 25


def graphs(cpu: bool) -> Iterator[tuple[str, nn.Module, list[Tensor]]]:
    """(name, graph, inputs of ROWS rows), the smallest first."""
    yield "two layers", nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), [torch.randn(ROWS, 8)]
    for name in () if cpu else ("tiny", "base"):
        shape = subjects.shape_of(name, ITEMS)
        ranker = RankingGraph(subjects.ranking_model(name, shape), folded=True)
        yield f"{name} ranking", ranker, subjects.ranking_inputs(ROWS, shape)
        yield f"{name} retrieval", subjects.retrieval_graph(name, shape), subjects.retrieval_inputs(ROWS, shape)


def compile_one(program: Path, package: Path, log: Path, seconds: float) -> str:
    """How the compiler's process ended: "ok", "failed" or "stopped"."""
    command = [sys.executable, "-m", "training.compile.aoti", str(program), str(package)]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=CHECKOUT, env={**os.environ, aoti.LOGS: str(log.parent)}
        )
        try:
            return "failed" if process.wait(seconds) else "ok"
        except subprocess.TimeoutExpired:
            return "stopped"
        finally:
            process.kill()
            process.wait()


def measure(figures: Figures, where: torch.device, given: Asked) -> None:
    folder = (given.out / "packages").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name, graph, inputs in graphs(given.cpu):
        what = f"aoti {name}"
        if figures.left() < LEAST_S:
            figures.skip(what, "no time left")
            continue
        program, package, log = (folder / f"{name.replace(' ', '-')}.{end}" for end in ("export", "pt2", "log"))
        try:
            began = time.perf_counter()
            torch.export.save(aoti.exported(graph.eval(), inputs, where), program)
            exported = time.perf_counter()
            outcome = compile_one(program, package, log, min(LIMIT_S, figures.left() - 1))
            took = time.perf_counter() - exported
            row = {"graph": name, "export_s": exported - began, "compile_s": took, "outcome": outcome}
            if outcome != "ok":
                figures.row(**row)
                lines = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
                figures.set(last_words={**figures.values.get("last_words", {}), name: lines})
                figures.skip(what, f"{outcome} after {took:.0f} s")
                continue
            began_load = time.perf_counter()
            got = Package(package, largest=ROWS).run([x.numpy() for x in inputs])
            loaded = time.perf_counter() - began_load
            with torch.no_grad():
                expected = graph.to(where)(*(x.to(where) for x in inputs))
            last = expected if isinstance(expected, Tensor) else expected[1]
            figures.row(
                **row, load_s=loaded, mib=package.stat().st_size / 2**20,
                apart=float((last.float().cpu() - torch.from_numpy(got[0 if last is expected else 1])).abs().max()),
            )  # fmt: skip
        except Exception as error:  # the other graphs' figures stay
            figures.skip(what, f"{type(error).__name__}: {error}")
        clock.release(where)


if __name__ == "__main__":
    steps.run("packages", measure, "how long AOTInductor compiles, the smallest graph first")
