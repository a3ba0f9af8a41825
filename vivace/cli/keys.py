"""``vivace keys add``, ``list`` and ``remove``."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from vivace.cli.options import console, say

keys = typer.Typer(no_args_is_help=True)

KeyName = Annotated[str, typer.Argument(help="who calls with it, such as web")]
KeysFile = Annotated[Path, typer.Option("--file", help="TOML, one key a line", dir_okay=False)]
DEFAULT_FILE = Path("keys.toml")


@keys.command(help="Make a key, print it once and keep its SHA-256; a running server takes it within seconds.")
def add(
    name: KeyName,
    file: KeysFile = DEFAULT_FILE,
    days: Annotated[int, typer.Option(help="until it expires", min=1, max=3650)] = 90,
    rate: Annotated[int, typer.Option(help="calls a second", min=1)] = 100,
    read_only: Annotated[bool, typer.Option("--read-only", help="refuse append_event and update_store")] = False,
) -> None:
    from serving.door.keys import add_key

    kept, key = add_key(file, name, days, rate, write=not read_only)
    say(f"{name}: {_may(kept.write)}, {rate} calls a second, until {kept.expires:%Y-%m-%d}; its digest is in {file}")
    say("the key, shown this once:")
    print(key)


@keys.command("list", help="What a file holds of each key.")
def list_(file: KeysFile = DEFAULT_FILE) -> None:
    from serving.door.keys import read_keys

    table, now = Table("name", "may", "calls a second", "until", "SHA-256"), datetime.now(UTC)
    for key in read_keys(file):
        until = f"{key.expires:%Y-%m-%d %H:%M}" if key.expires else "removed"
        expired = " (expired)" if key.expires and key.expires <= now else ""
        table.add_row(key.name, _may(key.write), str(key.rate), until + expired, f"{key.sha256[:12]}…")
    console.print(table)


@keys.command(help="Take a key out of a file; a running server refuses it within seconds.")
def remove(name: KeyName, file: KeysFile = DEFAULT_FILE) -> None:
    from serving.door.keys import remove_key

    remove_key(file, name)
    say(f"{name}: removed from {file}")


def _may(write: bool) -> str:
    return "reads and writes" if write else "reads"
