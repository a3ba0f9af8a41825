"""``make gpu``: every figure of a GPU in one command, the most valuable first.

    python -m benchmarks.gpu.run --out artifacts/gpu --minutes 9 [--artifacts FOLDER] [--only train --only engines]

Each step is a process with a time limit of its own; the results are written after every step, so a run that is cut off
keeps what it has, and a step that hangs or fails costs its own time alone. A later run into the same folder on the same
day replaces the steps that it runs and keeps the others. ``--cpu`` rehearses the steps without a GPU.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from loadtest.reports.record import finite
from vivace import machine
from vivace.manifest import environment, plain

GRACE_S = 6.0  # what a step gets to write its last words
WORTH_S = 5.0  # with less time than this left no step is begun


@dataclass(frozen=True)
class Step:
    """A module of this folder, its time limit in seconds on a GPU and in a rehearsal, and the step that runs beside it
    on a GPU, with low priority, and is not run again."""

    name: str
    seconds: float
    rehearsal_s: float
    beside: str = ""


STEPS = (  # what no card has shown yet first
    Step("machine", 15, 40),
    Step("served", 210, 120),
    Step("state_reuse", 35, 30),
    Step("train_speed", 70, 100),
    Step("long_history", 40, 60),
    Step("train", 150, 90, beside="packages"),
    Step("packages", 150, 15),
    Step("gpu_tests", 30, 60),
    Step("engines", 90, 60),
    Step("format_quality", 30, 60),
    Step("grid", 40, 40),
    Step("kernels", 30, 40),
)
BESIDE = "beside "  # how a step ended that ran beside another, before the name of that


@dataclass(frozen=True)
class Ended:
    """How a step ended: "ok", "failed" or "stopped", in ``seconds``, with the last lines of its log."""

    outcome: str
    seconds: float
    last_words: str


@contextmanager
def beside(command: Sequence[str], log: Path) -> Iterator[None]:
    """Another command meanwhile, with low priority, which ends with the block."""
    with log.open("wb") as file:
        process = subprocess.Popen(["nice", *command], stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            yield
        finally:
            _kill(process.pid)
            process.wait()


def run_step(command: Sequence[str], log: Path, seconds: float) -> Ended:
    """Runs a command in a process group of its own, which is killed after ``seconds``."""
    began = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            outcome = "failed" if process.wait(seconds) else "ok"
        except subprocess.TimeoutExpired:
            outcome = "stopped"
        except BaseException:
            _kill(process.pid)
            raise
    _kill(process.pid)  # and whatever the step left running
    process.wait()
    lines = log.read_text(errors="replace").strip().splitlines()
    return Ended(outcome, round(time.monotonic() - began, 1), "\n".join(lines[-5:]))


def _kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


def run_steps(
    steps: Sequence[tuple[str, float, Sequence[str]]],
    out: Path,
    seconds: float,
    on_step: Callable[[dict[str, Any]], None],
    meanwhile: Mapping[str, tuple[str, Sequence[str]]] | None = None,
) -> dict[str, Any]:
    """Runs (name, limit, command) one after the other within ``seconds``; returns what each wrote and how it ended, by
    name. ``on_step`` gets all that is known after each; ``meanwhile``: (name, command) of the step that runs beside
    another, by that one's name."""
    end = time.monotonic() + seconds
    results: dict[str, Any] = {}
    for name, limit, command in steps:
        left = end - time.monotonic()
        figures = out / f"{name}.json"
        figures.unlink(missing_ok=True)  # of an earlier run
        if left < WORTH_S:
            results[name] = {"outcome": "not begun: the time was over"}
        else:
            print(f"== {name}: up to {min(limit, left):.0f} of the {left:.0f} s left", flush=True)
            granted = max(1.0, min(limit, left - GRACE_S))
            log = out / f"{name}.log"
            aside, command_aside = (meanwhile or {}).get(name, ("", ()))
            (out / f"{aside}.json").unlink(missing_ok=True)
            other = [part.format(seconds=granted) for part in command_aside]
            with beside(other, out / f"{aside}.log") if other else nullcontext():
                ended = run_step([part.format(seconds=granted) for part in command], log, granted + GRACE_S)
            written = json.loads(figures.read_text()) if figures.exists() else {}
            results[name] = {"outcome": ended.outcome, "seconds": ended.seconds, **written}
            if ended.outcome != "ok":
                results[name]["last_words"] = ended.last_words
            if (of_aside := out / f"{aside}.json").exists():
                results[aside] = {"outcome": f"{BESIDE}{name}", **json.loads(of_aside.read_text())}
            print(f"== {name}: {ended.outcome} after {ended.seconds} s\n{ended.last_words}", flush=True)
        on_step(results)
    return results


def card() -> str:
    """Short name of the first GPU, such as "h100-80gb-hbm3"; "cpu" without one."""
    name = machine.gpu().split(",")[0].lower().replace("nvidia", "")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "cpu"


def command_of(step: Step, out: Path, artifacts: Path, cpu: bool) -> list[str]:
    """The command of a step; "{seconds}" stands for what it may take."""
    module = [sys.executable, "-m", f"benchmarks.gpu.{step.name}", "--out", str(out), "--seconds", "{seconds}"]
    return [*module, "--artifacts", str(artifacts), *["--cpu"] * cpu]


def main(
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("artifacts/gpu"),
    minutes: Annotated[float, typer.Option(help="all steps together")] = 9.0,
    artifacts: Annotated[Path, typer.Option(help="folder of prepared runs")] = Path("artifacts"),
    only: Annotated[list[str], typer.Option(help="only this step; may be given again")] = [],  # noqa: B006
    cpu: Annotated[bool, typer.Option("--cpu", help="rehearse without a GPU, with tiny models")] = False,
) -> None:
    names = [s.name for s in STEPS]
    if unknown := sorted(set(only) - set(names)):
        raise typer.BadParameter(f"--only: expected one of {names}, got {unknown}")
    out.mkdir(parents=True, exist_ok=True)
    began, known = time.monotonic(), environment()
    path = out / f"gpu-{card()}-{known['date'][:10]}.json"

    chosen = [s for s in STEPS if not only or s.name in only]
    before = json.loads(path.read_text())["steps"] if path.exists() else {}
    kept = {name: result for name, result in before.items() if name not in {s.name for s in chosen}}

    def write(results: dict[str, Any]) -> None:
        every = {name: {**kept, **results}[name] for name in names if name in {**kept, **results}}
        record = {"rehearsal": cpu, "minutes": minutes, "seconds": time.monotonic() - began, "steps": every, **known}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(finite(plain(record)), indent=1, allow_nan=False))
        os.replace(partial, path)

    by_name, names_chosen = {s.name: s for s in STEPS}, {s.name for s in chosen}
    pairs = [s for s in chosen if not cpu and s.beside in names_chosen]
    meanwhile = {s.name: (s.beside, command_of(by_name[s.beside], out, artifacts, cpu)) for s in pairs}
    alone = [s for s in chosen if s.name not in {p.beside for p in pairs}]
    if cpu:  # a processor trains too slowly to do it again for what is served
        alone.sort(key=lambda s: s.name not in ("machine", "train"))
    steps = [(s.name, s.rehearsal_s if cpu else s.seconds, command_of(s, out, artifacts, cpu)) for s in alone]
    results = run_steps(steps, out, minutes * 60, write, meanwhile)
    print(f"results: {path}")
    for name, result in results.items():
        print(f"{name:12} {result['outcome']}")
    raise typer.Exit(code=int(any(r["outcome"] == "failed" for r in results.values())))


if __name__ == "__main__":
    typer.run(main)
