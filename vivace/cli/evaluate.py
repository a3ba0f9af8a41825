"""``vivace evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vivace.cli.options import (
    DEFAULT_ARTIFACTS,
    ENCODER_HELP,
    TASKS,
    Artifacts,
    DataPath,
    Name,
    PresetName,
    Seed,
    chosen_preset,
    console,
    progress,
    say,
)
from vivace.cli.runs import find_run, new_run, run_name, say_next, step
from vivace.cli.values import choice
from vivace.run import EVALUATION, FINAL, Run

JUDGED = ("esci",)


def evaluate(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    preset: PresetName = "",
    seed: Seed = 7,
    compare: Annotated[str, typer.Option(help="names of evaluated runs, by commas: print them side by side")] = "",
    plot: Annotated[Path, typer.Option(help="picture of --compare", dir_okay=False)] = Path("compare.png"),
    task: Annotated[str, choice("--task", TASKS, "what is judged; search needs --path")] = "recommend",
    data: Annotated[str, choice("--data", JUDGED, "judged queries, for --task search")] = "esci",
    path: DataPath = None,
    encoder: Annotated[str, typer.Option(help=ENCODER_HELP)] = "ours",
    replay: Annotated[bool, typer.Option("--replay", help="answer each request with what was known then")] = False,
    refresh_hours: Annotated[
        float,
        typer.Option(help="with --replay, how often models are refreshed (-1: six times, at most hourly; 0: never)"),
    ] = -1.0,
) -> None:
    """Rank every item for every test request: baselines, retriever, ranker, control. --compare: several runs. --task
    search: BM25, dense, hybrid and ranker on judged queries. --replay: in order of time, with live counters."""
    if task == "search":
        evaluate_search(name or data, artifacts, data, path, seed, encoder)
        return
    if compare:
        compare_runs([find_run(artifacts, part) for part in compare.split(",") if part], artifacts, plot)
        return
    if replay:
        evaluate_replay(name, artifacts, preset, refresh_hours)
        return
    with step(name, artifacts) as run, console.status("ranking test requests") as status:
        from preprocessing.features import Features
        from training.judge.evaluate import evaluate as judge
        from training.judge.tables import render

        sizes = chosen_preset(preset, run.root)
        manifest = judge(Features(run.features), sizes, run.root, seed, progress(status))
    for table in render(manifest, run.root.name):
        console.print(table)
    say_next("compile" if run.has(FINAL) else "train --final", run, artifacts)


def evaluate_replay(name: str, artifacts: Path, preset: str, refresh_hours: float) -> None:
    with step(name, artifacts) as run, console.status("replaying the log") as status:
        from preprocessing.features import Features
        from training.judge.evaluate import RANKED
        from training.judge.replay import FILE, PLOT, replay as walk
        from training.judge.replay_figures import render, render_days
        from training.refresh.replay import renewals

        features, sizes, tell = Features(run.features), chosen_preset(preset, run.root), progress(status)
        renewing = renewals(features, sizes, run.root, refresh_hours, tell) if refresh_hours else None
        results = walk(features, sizes, run.root, tell, renewing)
    console.print(render(results, run.root.name))
    if len(results["by_day"]["day"]) > 1:
        console.print(render_days(results, RANKED))
    say(f"figures {run.evaluation / FILE}, plot {run.evaluation / PLOT}")


def evaluate_search(name: str, artifacts: Path, data: str, path: Path | None, seed: int, encoder: str) -> None:
    if path is None:
        raise typer.BadParameter(f"--task search needs the folder of {data}", param_hint="--path")
    from search.data import read_esci
    from training.search.evaluate import FILE, esci_config, evaluate_step, render

    with new_run(name, artifacts) as run:
        results = evaluate_step(*read_esci(path), esci_config(encoder), run.root, seed, say)
    console.print(render(results, f"{data}: search, {results['queries']} judged queries, all items ranked"))
    say(f"figures {run.root / FILE}")


def compare_runs(runs: list[Run], artifacts: Path, plot_file: Path) -> None:
    for run in runs:
        if not run.has(EVALUATION):
            name = run_name(run, artifacts)
            raise FileNotFoundError(
                f"--compare: {name} is not evaluated yet; run 'vivace evaluate --name {name}' first"
            )
    from training.judge import compare

    rows = compare.compare([run.root for run in runs])
    console.print(compare.render(rows))
    compare.plot(rows, plot_file)
    compare.write_rows(rows, plot_file.with_suffix(".json"))
    say(f"plot {plot_file}, figures {plot_file.with_suffix('.json')}")
