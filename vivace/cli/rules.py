"""``vivace rules``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, Name, console, say
from vivace.cli.runs import find_run
from vivace.run import Run


def rules(
    file: Annotated[
        Path | None, typer.Argument(help="TOML; without it that of the run", exists=True, dir_okay=False)
    ] = None,
    put: Annotated[
        bool, typer.Option("--put", help="put FILE in the place of the run's: it counts within a second")
    ] = False,
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
) -> None:
    """Check business rules (docs/rules.md) against the newest version: what each does, and for how many items."""
    run = find_run(artifacts, name)
    from serving.runtime.rules import FILE, RulesError

    if put and file is None:
        raise typer.BadParameter("expected FILE with it, the rules to put in place", param_hint="--put")
    there = run.feature_store / FILE
    if file is None and not there.exists():
        say(f"{there}: no rules; docs/rules.md says what they may be")
        return
    try:
        table = _table(run, file or there)
    except RulesError as error:
        raise ValueError(f"{file or there}: {error}") from None
    console.print(table)
    if put and file is not None:
        beside = there.with_name(f".{there.name}.{os.getpid()}")
        shutil.copyfile(file, beside)
        os.replace(beside, there)
        say(f"{there}: in place; servers follow it within a second")


def _table(run: Run, file: Path) -> Table:
    from serving.releases import releases
    from serving.runtime.response import ResponseStage
    from serving.runtime.ruled import ItemAttributes
    from serving.runtime.rules import NEW, parse_rules, read_rules
    from vivace import contract

    made = releases(run.repository)
    if not made:
        raise FileNotFoundError(f"{run.root.name}: no version yet; run 'vivace compile --name {run.root.name}' first")
    folder = next(path.parent for path in made[-1].glob(f"{contract.RESPONSE}/*/items.json"))
    items, names = ItemAttributes(folder), ResponseStage.from_file(folder / "items.json").names
    table = Table(title=f"{file}, {len(names) - contract.FIRST_ID:,} items of {made[-1].name}", title_justify="left")
    for column in ("rule", "does", "for", "items"):
        table.add_column(column, justify="right" if column == "items" else "left")
    for rule in parse_rules(read_rules(file), items.schema):
        pinned = {item.encode() for item in rule.pinned}
        if missing := sorted(item.decode() for item in pinned - set(names.tolist())):
            say(f"rule {rule.name!r}: not in {made[-1].name}: {', '.join(missing[:5])}")
        holds = items.matching(rule.where, names) & (items.new_V if rule.do == NEW else True)
        count = len(pinned) - len(missing) if pinned else int(holds.sum())
        if not count:
            say(f"rule {rule.name!r}: holds for no item of {made[-1].name}; look at its spelling")
        table.add_row(rule.name, rule.words, rule.of, f"{count:,}")
    return table
