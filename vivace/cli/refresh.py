"""``vivace refresh``."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, Name, chosen_preset, console, say
from vivace.cli.publish import serve_version
from vivace.cli.runs import find_run, run_name, say_next
from vivace.cli.values import duration
from vivace.manifest import BusyError, exclusive
from vivace.run import Run

if TYPE_CHECKING:
    from training.refresh.refresh import Outcome, RefreshConfig

NICENESS = 10
REFUSED_CODE = 3  # exit code where the gate kept the models that are there


def refresh(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    min_events: Annotated[int, typer.Option(help="with fewer appended events nothing is done", min=1)] = 100,
    every: Annotated[
        str, typer.Option(help="again and again, such as 30m or 1h; Ctrl-C stops it", parser=duration, metavar="T")
    ] = "",
    threads: Annotated[
        int, typer.Option(help="processor threads (0: one beside a server of the run, else all)", min=0)
    ] = 0,
    share: Annotated[
        float,
        typer.Option(
            help="of the new events, the newest that judge, and as many that teach the ranker", min=0.01, max=0.49
        ),
    ] = 0.2,
    bound: Annotated[float, typer.Option(help="of NDCG@10, what may be lost at most, at 95 %", min=0, max=1)] = 0.05,
    items: Annotated[
        Path | None,
        typer.Option(help="CSV or Parquet of new items by the schema's column names", exists=True, dir_okay=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="publish what the gate refuses; it is recorded")] = False,
) -> None:
    """Take what was appended to the store, train on, and publish if the newest events say so: running servers take the
    new version without a refused request. Else nothing changes and the exit code is 3. A call that was stopped goes on
    with the next one."""
    run = find_run(artifacts, name)
    give_way(run, threads)
    from serving.wheel import ServerError
    from training.refresh.fit import MoreTraining
    from training.refresh.refresh import REFUSED, RefreshConfig

    config = RefreshConfig(share=share, bound=bound, force=force, min_events=min_events, more=MoreTraining())
    if not every:
        with exclusive(run.root):
            outcome = once(run, config, items, artifacts)
        if outcome.status == REFUSED:
            raise typer.Exit(REFUSED_CODE)
        return
    while True:
        started = time.monotonic()
        try:
            with exclusive(run.root):
                once(run, config, items, artifacts)
        except (BusyError, ServerError) as error:  # such as a training, or a server that keeps what it has
            say(str(error))
        time.sleep(max(0.0, float(every) - (time.monotonic() - started)))


def give_way(run: Run, threads: int) -> None:
    """Low priority, and by default one thread beside a server of the run; before torch is loaded."""
    from serving.releases import in_use

    os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
    threads = threads or (1 if in_use(run.repository) else 0)
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        from training.checkpoints import limit_threads

        limit_threads(threads)


def once(run: Run, config: RefreshConfig, items: Path | None, artifacts: Path) -> Outcome:
    """One refresh of a run that is held, said in a table."""
    from serving.acceptance import LEAST
    from training.refresh.judge import render
    from training.refresh.refresh import PUBLISHED, refresh as take

    before = run.repository.resolve()
    outcome = take(run, chosen_preset("", run.root), config, say, items)
    if outcome.decision is not None:
        console.print(render(run_name(run, artifacts), outcome.taken, outcome.decision))
    if outcome.status == PUBLISHED and not outcome.version:
        say_next("compile", run, artifacts)
    elif outcome.status == PUBLISHED:
        say(f"published version {outcome.version} in {run.repository}")
        serve_version(run, run.repository.resolve(), artifacts, before, LEAST)
    return outcome
