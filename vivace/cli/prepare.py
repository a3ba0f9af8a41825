"""``vivace prepare``."""

from __future__ import annotations

from typing import Annotated

import typer

from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, Data, DataPath, Name, Seed, reported, run_folder, say


def prepare(
    data: Data = "shop",
    path: DataPath = None,
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    seed: Seed = 7,
    split: Annotated[str, typer.Option(help="leave-one-out or time")] = "leave-one-out",
    freq_threshold: Annotated[int, typer.Option(help="items with fewer events are out of vocabulary (0: none)")] = 0,
    max_items: Annotated[int, typer.Option(help="keep only the most frequent items (0: all)")] = 0,
    new_items: Annotated[
        bool, typer.Option(help="items of the catalogue without a training event are known too")
    ] = True,
    partitions: Annotated[int, typer.Option(help="files by user; one must fit in memory")] = 4,
    workers: Annotated[int, typer.Option(help="Dask worker processes (0: this process; CUDA workers with cuDF)")] = 0,
    users: Annotated[int, typer.Option(help="shop only: number of users")] = 20_000,
    items: Annotated[int, typer.Option(help="shop only: number of items")] = 5_000,
    events: Annotated[int, typer.Option(help="shop only: number of events, about")] = 500_000,
) -> None:
    """Read a log, fit NVTabular, write sequences, requests, transform.onnx and the feature store."""
    from preprocessing.prepare import PrepareConfig
    from preprocessing.prepare import prepare as run
    from preprocessing.readers import open_source
    from preprocessing.splits import SplitConfig
    from preprocessing.workflow import VocabularyConfig
    from vivace.contract import FIRST_ID
    from vivace.manifest import exclusive

    with reported():
        root = run_folder(artifacts, name, data)
        vocabulary = VocabularyConfig(freq_threshold, max_items + FIRST_ID if max_items else 0, new_items)
        config = PrepareConfig(SplitConfig(split), vocabulary, partitions, workers)
        size = {"users": users, "items": items, "events": events, "seed": seed}
        with exclusive(root):
            results = run(open_source(data, path, size), config, root, seed, say)["results"]
        say(
            f"{results['events']:,} events, {results['users']:,} users, {results['items_in_vocabulary']:,} items; "
            f"requests {results['requests']}"
        )
        for reason, count in results["rejected"].items():
            say(f"[yellow]rejected[/yellow] {reason}: {count:,} (see {root / 'features' / 'rejects.csv'})")
        if results["licence"]:
            say(f"licence of the data: {results['licence']}")
