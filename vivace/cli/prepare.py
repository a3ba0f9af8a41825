"""``vivace prepare``."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.table import Table

from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, Data, DataPath, NewName, Seed, console, say
from vivace.cli.runs import mark_prepared, new_run, say_next
from vivace.cli.values import choice, values_of
from vivace.contract import DataSchema
from vivace.run import Run

SHOP_ONLY = "Size of the made-up shop"
SPLITS = values_of("preprocessing.splits:SPLITS")
ALSO_FOR = ("hugectr",)


def prepare(
    data: Data = "shop",
    path: DataPath = None,
    name: NewName = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    seed: Seed = 7,
    split: Annotated[
        str,
        choice("--split", SPLITS, "what is held out; empty: sessions of a log of sessions, else leave-one-out"),
    ] = "",
    valid_share: Annotated[float, typer.Option(help="of the events, with --split time or sessions")] = 0.1,
    test_share: Annotated[float, typer.Option(help="the newest, with --split time or sessions")] = 0.1,
    freq_threshold: Annotated[
        int, typer.Option(help="items with fewer events are out of vocabulary (0: none)", min=0)
    ] = 0,
    max_items: Annotated[int, typer.Option(help="keep only the most frequent items (0: all)", min=0)] = 0,
    new_items: Annotated[
        bool, typer.Option(help="items of the catalogue without a training event are known too")
    ] = True,
    cross: Annotated[
        list[str] | None,
        typer.Option(help="columns of the context whose values together are one too: device,hour; may be repeated"),
    ] = None,
    partitions: Annotated[int, typer.Option(help="files by user; one must fit in memory", min=1)] = 4,
    workers: Annotated[
        int, typer.Option(help="Dask worker processes (0: this process; CUDA workers with cuDF)", min=0)
    ] = 0,
    also_for: Annotated[
        str, choice("--for", ALSO_FOR, "also write the events for another trainer, under <run>/hugectr")
    ] = "",
    users: Annotated[int | None, typer.Option(min=1, rich_help_panel=SHOP_ONLY, show_default="20000")] = None,
    items: Annotated[int | None, typer.Option(min=1, rich_help_panel=SHOP_ONLY, show_default="5000")] = None,
    events: Annotated[
        int | None, typer.Option(help="about", min=1, rich_help_panel=SHOP_ONLY, show_default="500000")
    ] = None,
    long_taste: Annotated[
        float | None,
        typer.Option(
            help="share of the views that a taste of 300 events ago and more decides; items then come again",
            min=0,
            max=0.99,
            rich_help_panel=SHOP_ONLY,
            show_default="0",
        ),
    ] = None,
) -> Run:
    """Read a log, fit NVTabular, write sequences, requests, transform.onnx and the feature store."""
    size = _size_of_shop(data, {"users": users, "items": items, "events": events, "long_taste": long_taste})
    _check_shares(valid_share, test_share)
    from preprocessing.readers import open_source

    source = open_source(data, path, size | {"seed": seed})
    source.schema = with_crosses(source.schema, cross or [])
    from preprocessing.prepare import PrepareConfig, prepare as prepare_run
    from preprocessing.splits import LEAVE_ONE_OUT, SESSIONS, SplitConfig
    from preprocessing.workflow import VocabularyConfig
    from vivace.contract import FIRST_ID

    vocabulary = VocabularyConfig(freq_threshold, max_items + FIRST_ID if max_items else 0, new_items)
    split = split or (SESSIONS if source.schema.sessions else LEAVE_ONE_OUT)
    shares = SplitConfig(kind=split, valid_share=valid_share, test_share=test_share)
    if split == LEAVE_ONE_OUT and shares != SplitConfig(kind=split):
        raise typer.BadParameter(
            f"{LEAVE_ONE_OUT} holds out events of each user; leave the shares out, or choose another split",
            param_hint="--split",
        )
    config = PrepareConfig(split=shares, vocabulary=vocabulary, partitions=partitions, workers=workers)
    with new_run(name or source.schema.name, artifacts) as run:
        results = prepare_run(source, config, run.root, seed, say)["results"]
        mark_prepared(run)
        if also_for:
            from preprocessing.features import Features
            from preprocessing.hugectr import write_hugectr

            write_hugectr(Features(run.features), run.hugectr, say)
    say_results(results, run)
    say_next("train", run, artifacts)
    return run


def _check_shares(valid_share: float, test_share: float) -> None:
    """Raises BadParameter."""
    if not (valid_share > 0 and test_share > 0 and valid_share + test_share < 1):
        raise typer.BadParameter(
            f"expected shares above 0 that sum below 1 with --valid-share, got {valid_share:g} and {test_share:g}",
            param_hint="--test-share",
        )


def _size_of_shop(data: str, given: dict[str, float | None]) -> dict[str, float]:
    """What was given of it. Raises BadParameter where the data is another."""
    size = {key: value for key, value in given.items() if value is not None}
    if size and data != "shop":
        option = next(iter(size)).replace("_", "-")
        raise typer.BadParameter(f"is a size of the made-up shop, not of {data}", param_hint=f"--{option}")
    return size


def say_results(results: dict[str, Any], run: Run) -> None:
    say(
        f"{results['events']:,} events, {results['users']:,} users, {results['items_in_vocabulary']:,} items; "
        f"requests {results['requests']}"
    )
    if results["licence"]:
        say(f"licence of the data: {results['licence']}")
    for note in results["notes"]:
        say(note)
    console.print(rows_table(results))
    if results["rejected"] or results["changed"]:
        say(f"these rows: {run.features / 'rejects.csv'} and changed.csv beside it")


def with_crosses(schema: DataSchema, given: list[str]) -> DataSchema:
    """``schema`` and the crosses of --cross, columns by commas each."""
    crosses = (*schema.crosses, *(tuple(name.strip() for name in names.split(",")) for names in given))
    try:
        return replace(schema, crosses=crosses)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--cross") from None


def rows_table(results: dict[str, Any]) -> Table:
    """What became of the rows of each table: read, kept, rejected and changed by reason."""
    table = Table(title="rows", title_justify="left")
    for column in ("table", "what", "rows"):
        table.add_column(column, justify="right" if column == "rows" else "left")
    for name, read in results["read"].items():
        lost = {k: n for k, n in results["rejected"].items() if k.startswith(f"{name}: ")}
        changed = {k: n for k, n in results["changed"].items() if k.startswith(f"{name}: ")}
        table.add_row(name, "read", f"{read:,}")
        table.add_row("", "kept", f"{read - sum(lost.values()):,}")
        for what, counts in (("rejected", lost), ("changed", changed)):
            for reason, count in counts.items():
                table.add_row("", f"{what}: {reason.removeprefix(f'{name}: ')}", f"{count:,}")
    return table
