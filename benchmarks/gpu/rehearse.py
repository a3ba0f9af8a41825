"""Rehearses ``make gpu`` without a GPU, in an environment made from the pieces alone.

    python -m benchmarks.gpu.rehearse --work artifacts/gpu-rehearsal [--minutes 3] [--only train]

It packs a small made-up shop, makes a virtual environment of what a bare machine has (``rehearsal.txt`` and torch: no
Merlin, no NVTabular, numpy 2), unpacks the pieces there and runs ``make gpu ARGS=--cpu`` with an empty environment.
With torch for ``python3.12`` at hand it is that Python's, else this one's. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.gpu import pack
from loadtest.reports.record import record_line

TORCH = ("torch", "torch-*.dist-info", "torchgen", "functorch", "triton", "triton-*.dist-info", "nvidia")
ASK = "import os, sys, torch; print(f'{sys.version_info[0]}.{sys.version_info[1]}', os.path.dirname(torch.__path__[0]))"
NEEDS = Path(__file__).with_name("rehearsal.txt")
PLAIN = "/usr/local/bin:/usr/bin:/bin"  # PATH of the rehearsal behind its own Python


def python_with_torch() -> tuple[str, str, Path]:
    """(interpreter, its version, folder of its torch): python3.12 if that has torch, else this one."""
    for python in ("python3.12", sys.executable):
        try:
            done = subprocess.run([python, "-c", ASK], capture_output=True, text=True)
        except FileNotFoundError:
            continue
        if done.returncode == 0:
            version, folder = done.stdout.split()
            return python, version, Path(folder)
    raise RuntimeError(f"gpu-rehearse: {sys.executable} has no torch; make setup installs it")


def make_environment(folder: Path) -> tuple[Path, str]:
    """A virtual environment with torch and ``rehearsal.txt`` alone; (its python, the version)."""
    python, version, torch = python_with_torch()
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    inside = folder / "bin" / "python"
    site = folder / "lib" / f"python{version}" / "site-packages"
    for pattern in TORCH:  # first: pip would fetch it for peft
        for part in torch.glob(pattern):
            if not (site / part.name).exists():
                (site / part.name).symlink_to(part)
    pip = [str(inside), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
    done = subprocess.run([*pip, "-r", str(NEEDS)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"gpu-rehearse: pip: {done.stderr.strip()[-800:]}")
    return inside, version


def rehearse(work: Path, minutes: float, arguments: str = "") -> dict[str, Any]:
    """The record of ``make gpu`` with ``ARGS="--cpu <arguments>"``, and ``rehearsal_s``: seconds of what came before.
    Raises RuntimeError with the end of its output if it wrote none."""
    work.mkdir(parents=True, exist_ok=True)
    work, spent, began = work.absolute(), {}, time.monotonic()
    python, version = make_environment(work / "venv")
    spent["environment"] = time.monotonic() - began
    pieces, home = work / "pieces", work / "home"
    pack.main(out=pieces, cache=work / "cache", data="shop", bundles="", python=version, level=1)
    spent["pack"] = time.monotonic() - began - spent["environment"]
    bare = {
        "PATH": f"{python.parent}:{PLAIN}",
        "HOME": str(work),
        "LANG": "C.UTF-8",
        "TMPDIR": os.environ.get("TMPDIR", "/tmp"),
    }
    subprocess.run([str(python), str(pieces / "unpack.py"), str(pieces), "--to", str(home)], env=bare, check=True)
    results = home / "code" / "artifacts" / "gpu"
    command = [
        "make",
        "gpu",
        f"PYTHON_GPU={python}",
        f"GPU_HOME={home}",
        f"MINUTES={minutes}",
        f"ARGS=--cpu {arguments}",
    ]
    log = work / "make.log"
    with log.open("wb") as file:
        subprocess.run(command, cwd=home / "code", env=bare, stdout=file, stderr=subprocess.STDOUT)
    written = sorted(results.glob("gpu-*.json"))
    if not written:
        raise RuntimeError(f"gpu-rehearse: make gpu wrote no results: {log.read_text()[-2000:]}")
    record: dict[str, Any] = json.loads(written[-1].read_text())
    return record | {"rehearsal_s": spent}


def main(
    work: Annotated[Path, typer.Option(help="folder of the rehearsal")] = Path("artifacts/gpu-rehearsal"),
    minutes: float = 4.0,
    only: Annotated[list[str], typer.Option(help="only this step; may be given again")] = [],  # noqa: B006
) -> None:
    record = rehearse(work, minutes, " ".join(f"--only {name}" for name in only))
    for name, step in record["steps"].items():
        print(f"{name:16} {step['outcome']:8} {step.get('seconds', '')} {step.get('not_run', '')}")
        if "last_words" in step:
            print(step["last_words"])
    outcomes = {name: step["outcome"] for name, step in record["steps"].items()}
    inside = {"seconds": record["seconds"], "before": record["rehearsal_s"], "rehearsed_with": record["versions"]}
    print(record_line("gpu rehearsal", outcomes=outcomes, **inside))
    raise typer.Exit(code=int(any(outcome != "ok" for outcome in outcomes.values())))


if __name__ == "__main__":
    typer.run(main)
