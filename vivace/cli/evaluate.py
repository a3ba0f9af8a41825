"""``vivace evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vivace.cli.options import (
    DEFAULT_ARTIFACTS,
    Artifacts,
    DataPath,
    Name,
    PresetName,
    Seed,
    chosen_preset,
    console,
    reported,
    say,
)


def evaluate(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    preset: PresetName = "",
    seed: Seed = 7,
    compare: Annotated[str, typer.Option(help="names of evaluated runs, by commas: print them side by side")] = "",
    plot: Annotated[Path, typer.Option(help="picture of --compare")] = Path("compare.png"),
    task: Annotated[str, typer.Option(help="recommend, or search with --data esci and its --path")] = "recommend",
    data: Annotated[str, typer.Option("--data", help="of --task search: esci")] = "esci",
    path: DataPath = None,
) -> None:
    """Rank every item for every test request: baselines, retriever, ranker, control. --compare: several runs. --task
    search: BM25, dense, hybrid and ranker on judged queries."""
    if task == "search":
        evaluate_search(artifacts / (name if name != "shop" else data), data, path, seed)
        return
    if compare:
        compare_runs([artifacts / n for n in compare.split(",") if n], plot)
        return
    from preprocessing.features import Features
    from training.judge.evaluate import evaluate as run
    from training.judge.evaluate import render
    from vivace.manifest import exclusive

    with reported():
        root = artifacts / name
        with exclusive(root), console.status("ranking test requests") as status:
            features = Features(root / "features")
            manifest = run(features, chosen_preset(preset, root), root, seed, lambda text: status.update(text))
        for table in render(manifest, name):
            console.print(table)


def evaluate_search(root: Path, data: str, path: Path | None, seed: int) -> None:
    from search.data import read_esci
    from training.search.evaluate import FILE, esci_config, evaluate_step, render
    from vivace.manifest import exclusive

    with reported():
        if data != "esci" or path is None:
            raise ValueError("--task search: expected --data esci and --path, the folder of the data set")
        with exclusive(root):
            results = evaluate_step(*read_esci(path), esci_config(), root, seed, say)
        console.print(render(results, f"{data}: search, {results['queries']} judged queries, all items ranked"))
        say(f"figures {root / FILE}")


def compare_runs(runs: list[Path], plot_file: Path) -> None:
    from training.judge import compare

    with reported():
        rows = compare.compare(runs)
        console.print(compare.render(rows))
        compare.plot(rows, plot_file)
        compare.write_json(rows, plot_file.with_suffix(".json"))
        say(f"plot {plot_file}, figures {plot_file.with_suffix('.json')}")
