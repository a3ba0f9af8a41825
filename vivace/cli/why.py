"""``vivace why``."""

from __future__ import annotations

import contextlib
import json
from typing import Annotated, Any

import typer
from rich.table import Table

from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, Name, console, say
from vivace.cli.query import titles
from vivace.cli.runs import find_run
from vivace.cli.values import choice, json_object

LANGUAGES = ("en", "zh")


def why(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    user: Annotated[str, typer.Option(help="whose stored history; or give --history")] = "",
    history: Annotated[list[str] | None, typer.Option(help="item ids, oldest first; may be repeated")] = None,
    top_k: Annotated[int, typer.Option(help="items that are explained", min=1, max=100)] = 5,
    context: Annotated[
        Any, typer.Option(help="of the moment, as for 'vivace query'", parser=json_object, metavar="JSON")
    ] = "",
    language: Annotated[str, choice("--language", LANGUAGES, "of the sentences")] = "en",
) -> None:
    """Why each item is recommended: which items of the history it hangs on, by asking the newest version's graphs again
    without them; and the fewest without which it would not be shown."""
    run = find_run(artifacts, name)
    if not user and not history:
        raise typer.BadParameter("expected --user or --history, whose answer is explained", param_hint="--user")
    import numpy as np

    from serving.runtime.pipeline import Pipeline
    from serving.runtime.stages import parse_row
    from serving.runtime.why import because, sentence
    from vivace.store.opening import store_of_worker

    with contextlib.closing(store_of_worker(run.feature_store, readonly=True)) as store:
        pipeline = Pipeline.published(run.root, store)
        events = np.array([item.encode() for item in history or []], object)
        columns = pipeline.transform.moment.columns
        row = parse_row(user.encode(), b"", events, top_k, json.dumps(context).encode() if context else b"", columns)
        found = because(pipeline, row)
        named = {item for of in found for item in (of.item, *(r.item for r in of.reasons))}
        titled = dict(zip(sorted(named), titles(run, sorted(named)), strict=True))
    table = Table(title="score and what it loses without an item of the history", title_justify="left")
    for column in ("", "item", "score", "why"):
        table.add_column(column, justify="right" if column in ("", "score") else "left")
    for of in found:
        title = titled.get(of.item) or ""
        table.add_row(str(of.place), f"{of.item} {title}".strip(), f"{of.score:.2f}", sentence(of, titled, language))
    console.print(table)
    say("each is what the same graphs answer to the shorter history; nothing is estimated")
