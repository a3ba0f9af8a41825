"""Which run a step works on, and how it holds it."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from serving.exchange import finish_exchange_of, is_exchanging
from vivace.cli.options import DEFAULT_ARTIFACTS, say
from vivace.manifest import MANIFEST, exclusive
from vivace.run import COMPRESSED, FEATURES, MADE_BY, Run


def _prepared_at(run: Run) -> float:
    """When ``vivace prepare`` was last run for it, Unix seconds; 0 for a run that came without features."""
    path = run.features / MANIFEST
    return path.stat().st_mtime if path.exists() else 0.0


def is_run(run: Run) -> bool:
    return run.root.is_dir() and (run.has(FEATURES) or run.repository.is_dir() or is_exchanging(run.root))


def runs(artifacts: Path) -> list[Run]:
    """The runs that are there, the one prepared last first."""
    folders = [Run(path) for path in sorted(artifacts.glob("*")) if path.is_dir()]
    return sorted((run for run in folders if is_run(run)), key=_prepared_at, reverse=True)


def mark_prepared(run: Run) -> None:
    """Makes ``run`` the one prepared last, also where there was nothing to do."""
    os.utime(run.features / MANIFEST)


def find_run(artifacts: Path, name: str = "") -> Run:
    """The run called ``name``; without a name the one there is, or the one prepared last, and says which.

    Finishes what a refresh that was stopped has left of exchanging it. Raises FileNotFoundError that lists the runs
    there are, or names the command that makes one."""
    run = _named_or_newest(artifacts, name)
    finish_exchange_of(run.root)
    return run


def _named_or_newest(artifacts: Path, name: str) -> Run:
    present = runs(artifacts)
    if name:
        run = Run(artifacts / name)
        if is_run(run):
            return run
        variants = [v for r in present for v in sorted(r.variants.glob("*/")) if COMPRESSED in Path(name).parts]
        names = ", ".join([run_name(r, artifacts) for r in [*present, *map(Run, variants)]])
        there = f"the runs there are: {names}" if present else f"there is no run yet; run '{MADE_BY[FEATURES]}' first"
        raise FileNotFoundError(f"--name {name}: no such run in {artifacts}; {there}")
    if not present:
        raise FileNotFoundError(f"no run in {artifacts} yet; run '{MADE_BY[FEATURES]}' first")
    run = present[0]
    others = ", ".join(r.root.name for r in present[1:])
    say(f"run {run.root.name}: " + (f"prepared last; --name takes another of {others}" if others else "the only one"))
    return run


def run_name(run: Run, artifacts: Path) -> str:
    """What --name takes for it."""
    return run.root.relative_to(artifacts).as_posix()


def joined_log(run: Run, given: Path | None) -> Path:
    """The joined log of impressions: ``given``, or what 'vivace experiment impressions' wrote last. Raises
    FileNotFoundError for none, ValueError for another file."""
    import pyarrow.lib
    import pyarrow.parquet as pq

    from vivace.impressions.files import REQUEST_ID, joined_of
    from vivace.impressions.queue import folder_of

    file = given or joined_of(folder_of(run.feature_store))
    command = f"vivace experiment impressions --name {run.root.name}"
    if not file.exists():
        raise FileNotFoundError(f"{file}: not there yet; run '{command}'")
    try:
        there = REQUEST_ID in pq.read_schema(file).names
    except pyarrow.lib.ArrowInvalid:  # no Parquet
        there = False
    if not there:
        raise ValueError(f"{file}: expected a joined log of impressions, as '{command}' writes it")
    return file


@contextlib.contextmanager
def step(name: str, artifacts: Path) -> Iterator[Run]:
    """The run that a step works on, held against other writers. See ``find_run``."""
    run = find_run(artifacts, name)
    with exclusive(run.root):
        yield run


@contextlib.contextmanager
def new_run(name: str, artifacts: Path) -> Iterator[Run]:
    """The run that a step makes, or makes anew, held against other writers."""
    run = Run(artifacts / name)
    with exclusive(run.root):
        yield run


_next_is_said = ContextVar("next_is_said", default=True)


@contextlib.contextmanager
def steps_follow() -> Iterator[None]:
    """Within it ``say_next`` says nothing: who runs several steps runs the next one too."""
    token = _next_is_said.set(False)
    try:
        yield
    finally:
        _next_is_said.reset(token)


def say_next(command: str, run: Run, artifacts: Path) -> None:
    """Names the command that follows, as it can be typed."""
    if not _next_is_said.get():
        return
    where = "" if artifacts == DEFAULT_ARTIFACTS else f" --artifacts {shlex.quote(str(artifacts))}"
    verb, _, options = command.partition(" ")
    rest = f" {options}" if options else ""
    say(f"next: vivace {verb} --name {shlex.quote(run_name(run, artifacts))}{where}{rest}")
