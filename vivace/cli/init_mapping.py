"""``vivace init-mapping``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vivace.cli.options import say


def init_mapping(
    file: Annotated[Path, typer.Argument(help="events: CSV, CSV.gz or Parquet")],
    items: Annotated[Path | None, typer.Option("--items", help="catalogue: CSV, CSV.gz or Parquet")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="the mapping; mapping.toml beside the events")] = None,
) -> None:
    """Write a first mapping.toml for --data tables from a table's columns."""
    from preprocessing.readers.init_mapping import LEFT_OUT, draft, missing
    from vivace.manifest import write_text

    target = out or file.parent / "mapping.toml"
    if target.exists():
        raise ValueError(f"init-mapping: {target} is there; name another file with --out")
    text = draft(file, items, target.parent)
    write_text(target, text)
    for line in text.splitlines():
        if line.startswith(LEFT_OUT):
            say(line.removeprefix("# "))
    lacks = "".join(f"name the column of {key}, which none looks like; " for key in missing(text))
    say(f"wrote {target}: {lacks}check each line, then: vivace prepare --data tables --path {target}")
