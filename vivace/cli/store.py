"""``vivace store copy`` and ``vivace store fill``."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Annotated

import typer

from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, Name, say
from vivace.cli.runs import find_run

store = typer.Typer(no_args_is_help=True)


def _place(text: str, own: Path) -> str | Path:
    """What --from and --to name: a URL, a folder, or the run's own store."""
    return text if "://" in text else Path(text) if text else own


@store.command(
    help="Copy a run's store to a Valkey that servers share, or back: histories, attributes, titles, live events and "
    "changes of the catalogue. Both ends are compared at the end. Stop whatever appends to either first."
)
def copy(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    to: Annotated[
        str,
        typer.Option("--to", help="URL such as valkey://127.0.0.1:6379/0, or a folder; default the run's own store"),
    ] = "",
    source: Annotated[str, typer.Option("--from", help="the same; default the run's own store")] = "",
    replace: Annotated[bool, typer.Option("--replace", help="in the place of a store that is there")] = False,
) -> None:
    from vivace.store.remote.copying import copy as copied, end_of

    own = find_run(artifacts, name).feature_store
    places = _place(source, own), _place(to, own)
    if places[0] == places[1]:
        raise typer.BadParameter("expected two different stores; name one with --to or --from", param_hint="--to")
    began = time.monotonic()
    with end_of(places[0]) as first, end_of(places[1]) as second:
        if first.is_empty():
            raise typer.BadParameter(f"nothing to copy in {first.name}", param_hint="--from")
        contents = copied(first, second, replace, say)
        say(f"{second.name}: {contents.words()}; both ends are the same ({time.monotonic() - began:.1f} s)")


@store.command(
    help="Put a run's data set, after 'vivace prepare', in the place of the one in a Valkey, under running servers; "
    "live events there join it."
)
def fill(
    to: Annotated[str, typer.Option("--to", help="URL such as valkey://127.0.0.1:6379/0")],
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
) -> None:
    from vivace.store.remote.address import Address
    from vivace.store.remote.copying import fill as filled
    from vivace.store.remote.lmdb_end import LmdbEnd
    from vivace.store.remote.valkey_end import ValkeyEnd

    own, began = find_run(artifacts, name).feature_store, time.monotonic()
    with contextlib.closing(LmdbEnd(own)) as source, contextlib.closing(ValkeyEnd(Address.parse(to))) as target:
        counts = filled(source, target)
        say(f"{target.name}: {counts['users']:,} users, {counts['titles']:,} titles ({time.monotonic() - began:.1f} s)")
