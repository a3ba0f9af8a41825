"""``vivace experiment impressions`` and ``vivace experiment report``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, Name, console, say
from vivace.cli.runs import find_run

experiment = typer.Typer(no_args_is_help=True)

EventTypes = Annotated[
    list[str] | None,
    typer.Option("--event", metavar="TYPE", help="type of event that counts as a click; may be given again (default all)"),
]


@experiment.command(
    help="Join what was shown (vivace serve --impressions) with the events that name its requests: a Parquet with one "
    "row a shown item."
)
def impressions(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    event: EventTypes = None,
    out: Annotated[
        Path | None, typer.Option(help="file to write; artifacts/RUN/impressions.parquet if empty", dir_okay=False)
    ] = None,
) -> None:
    from vivace.impressions.joined import join
    from vivace.impressions.queue import folder_of
    from vivace.store.opening import store_of_worker

    run = find_run(artifacts, name)
    file = out or run.root / "impressions.parquet"
    with console.status("joining"), contextlib.closing(store_of_worker(run.feature_store, readonly=True)) as store:
        counts = join(folder_of(run.feature_store), store, file, event or ())
    say(
        f"{counts.requests:,} requests ({counts.empty:,} shown nothing), {counts.shown:,} items shown, "
        f"{counts.clicked:,} of them with an event; {counts.strays:,} events are of no request in the log"
    )
    say(f"wrote {file}")
