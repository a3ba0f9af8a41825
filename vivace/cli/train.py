"""``vivace train``."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vivace.cli.options import (
    DEFAULT_ARTIFACTS,
    ENCODER_HELP,
    TASKS,
    Artifacts,
    Name,
    PresetName,
    Seed,
    Wandb,
    chosen_preset,
    say,
    track,
    with_overrides,
)
from vivace.cli.runs import find_run, joined_log, say_next, step
from vivace.cli.values import choice, values_of
from vivace.manifest import exclusive
from vivace.run import Run

LOSSES = values_of("training.presets:RetrievalTraining.loss")
METHODS = values_of("training.models.adapters:Adaptation.method")
SHOWN_HELP = "teach the ranker what was shown and not clicked, too"
JOINED_HELP = "with --impressions: file of 'vivace experiment impressions'; artifacts/RUN/impressions.parquet if empty"
SHARDINGS = values_of("training.sharded.config:TableSharding.kind")


def train(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    preset: PresetName = "",
    seed: Seed = 7,
    control: Annotated[bool, typer.Option(help="also train the ranker without its extra label")] = False,
    epochs: Annotated[int, typer.Option(help="epochs of the retriever (0: the preset's)", min=0)] = 0,
    loss: Annotated[str, choice("--loss", LOSSES, "the preset's if empty")] = "",
    start_from: Annotated[
        Path | None,
        typer.Option(
            "--from", help="folder of a pretrained or trained retriever to start from", exists=True, file_okay=False
        ),
    ] = None,
    adapt: Annotated[str, choice("--adapt", METHODS, "with --from, what is trained")] = "full",
    rank: Annotated[int, typer.Option(help="with --adapt lora: rank of the updates", min=1)] = 8,
    final: Annotated[
        bool, typer.Option("--final", help="fit the judged models again on all events: what is then compiled")
    ] = False,
    table_processes: Annotated[
        int,
        typer.Option(help="cut the item table over so many processes, which no one holds whole (0: do not)", min=0),
    ] = 0,
    table_sharding: Annotated[
        str, choice("--table-sharding", SHARDINGS, "with --table-processes, by rows or table by table")
    ] = "row",
    wandb: Wandb = False,
    task: Annotated[
        str, choice("--task", TASKS, "what is trained; search makes a trained run's catalogue searchable")
    ] = "recommend",
    encoder: Annotated[str, typer.Option(help=ENCODER_HELP)] = "ours",
    impressions: Annotated[bool, typer.Option("--impressions", help=SHOWN_HELP)] = False,
    joined: Annotated[Path | None, typer.Option(help=JOINED_HELP, dir_okay=False)] = None,
) -> None:
    """Train the retriever, then the ranker; resumes from the last checkpoint. --task search: then the text encoder, the
    word index and the search ranker. --final: after 'vivace evaluate', on the held-out events too."""
    if final:
        train_final(name, artifacts, preset)
        return
    if task == "search":
        train_search(name, artifacts, preset, seed, encoder)
        return
    track(wandb)
    run = find_run(artifacts, name)
    from preprocessing.features import Features
    from training import distributed
    from training.data.live import check_live
    from training.learn.ranker import train_ranker
    from training.learn.retriever import train_retrieval
    from training.models.adapters import Adaptation
    from training.models.task_heads import check_weighting

    log = shown_log(run, joined, impressions)
    adaptation = Adaptation(method=adapt, rank=rank)  # type: ignore[arg-type]  # refused where it is none
    table = check_table(table_processes, table_sharding, start_from is not None)
    with distributed.group() as world:
        sizes = with_overrides(chosen_preset(preset, run.root, recorded=False), epochs, loss)
        features = Features(run.features)
        check_weighting(sizes.ranking.weighting, len(features.schema.heads))
        check_live(features, sizes.ranker.rising, control, sizes.ranker.shown_rates)  # before the retriever's minutes
        with exclusive(run.root) if world.first else contextlib.nullcontext():
            if table:
                retriever, sizes = train_table(features, sizes, run.root, seed, table, world)
            else:
                retriever = train_retrieval(
                    features, sizes, run.root, seed, say if world.first else lambda _: None,
                    start_from=start_from, adaptation=adaptation, world=world,
                )  # fmt: skip
            if not world.first:  # the ranker is small: the first process trains it alone
                return
            counts = retriever["results"]
            say(
                f"retriever: {counts['parameters']:,} parameters, {counts['trained_parameters']:,} trained, "
                f"{retriever['seconds']:.0f} s"
            )
            ranker = train_ranker(features, sizes, run.root, seed, say, log=log)
            say(f"ranker: {ranker['results']['parameters']:,} parameters, {ranker['seconds']:.0f} s")
            if control:
                train_ranker(features, sizes, run.root, seed, say, control=True)
    say_next("evaluate", run, artifacts)


def shown_log(run: Run, joined: Path | None, wanted: bool) -> Any:
    """``training.data.shown.ShownLog`` of a joined log with what it says of places; None where none is wanted."""
    if not wanted:
        if joined is not None:
            raise typer.BadParameter("goes with --impressions", param_hint="--joined")
        return None
    import numpy as np

    from training.data.shown import ShownLog
    from training.judge.clicks.experiment import shadows
    from training.judge.clicks.places import examined_in
    from vivace.contract import MAX_TOP_K

    file = joined_log(run, joined)
    unseen = shadows(file)
    examined = examined_in(file, MAX_TOP_K, unseen)
    known = np.flatnonzero(np.isfinite(examined))
    looked = ", ".join(f"{place + 1}: {examined[place]:.0%}" for place in known[:10])
    say(f"a place is looked at, beside the first, {looked}; others as the one before")
    return ShownLog(file, examined, frozenset(unseen))


def check_table(processes: int, kind: str, from_another: bool) -> dict[str, Any]:
    """Fields of ``TableSharding``; {} without --table-processes. Raises BadParameter for what does not go with it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if not processes and kind != "row":
        raise typer.BadParameter("goes with --table-processes N; name how many", param_hint="--table-sharding")
    if not processes:
        return {}
    if from_another:
        raise typer.BadParameter("--from takes up a whole table; leave one of both out", param_hint="--table-processes")
    if size > 1 and processes != size:
        raise typer.BadParameter(
            f"torchrun started {size} processes, got {processes}; give the same number", param_hint="--table-processes"
        )
    return {"kind": kind, "processes": processes}


def train_table(
    features: Any, sizes: Any, root: Path, seed: int, table: dict[str, Any], world: Any
) -> tuple[dict[str, Any], Any]:
    """(the retriever's manifest, the preset it was trained by) with its item table over processes: those that torchrun
    started, or this machine's."""
    from training.sharded.launch import check_installed, launch

    check_installed()
    from training.sharded.config import TableSharding
    from training.sharded.retriever import for_sharding, train_sharded

    if sizes.retrieval.ema and world.first:
        say("without an average of the weights (ema): it would be a second item table")
    sizes = for_sharding(sizes)
    if world.size == 1:
        return launch(root, sizes, seed, table), sizes
    say_first = say if world.first else lambda _: None
    return train_sharded(features, sizes, root, seed, TableSharding(**table), world, say_first), sizes


def train_final(name: str, artifacts: Path, preset: str) -> None:
    with step(name, artifacts) as run:
        from preprocessing.features import Features
        from training.learn.final import train_final as fit

        manifest = fit(Features(run.features), chosen_preset(preset, run.root), run.root, say)
    say(f"{manifest['results']['card']}, {manifest['seconds']:.0f} s")
    say_next("compile", run, artifacts)


def train_search(name: str, artifacts: Path, preset: str, seed: int, encoder: str) -> None:
    with step(name, artifacts) as run:
        from preprocessing.features import Features
        from training.search.train import SearchTraining, train_search as train_search_run

        sizes = chosen_preset(preset, run.root)
        config = SearchTraining(tower=encoder)
        manifest = train_search_run(Features(run.features), sizes, run.root, config, seed, say)
    for line in search_figures(manifest["results"]):
        say(line)
    say_next("compile", run, artifacts)


def search_figures(results: dict[str, Any]) -> list[str]:
    """What the search models reached, a line a kind of query."""
    lines = []
    for kind, figures in results["queries"].items():
        low, high = figures["gain_interval"]
        lines.append(
            f"queries made of {kind}, {figures['requests']:,} test requests, NDCG@10: fused {figures['fused']:.4f}, "
            f"ranked {figures['ranked']:.4f}, with the user's history {figures['with_history']:.4f} "
            f"({figures['gain']:+.4f}, {low:+.4f} to {high:+.4f}); {figures['found']:.1%} found"
        )
    if log := results.get("log"):
        low, high = log["over_shown_interval"]
        lines.append(
            f"{log['searches']:,} held-out searches of the log, NDCG@10 of clicks by inverse propensity: as shown "
            f"{log['shown']:.4f}, fused {log['fused']:.4f}, ranked {log['ranked']:.4f}, with the user's history "
            f"{log['with_history']:.4f} ({log['over_shown']:+.4f} over shown, {low:+.4f} to {high:+.4f}); "
            f"{log['in_hindsight']:,} more are training events, and judge nothing"
        )
    costs = (f"{d}: {r['NDCG@10']:.4f}, alike {r['alike']:.2f}" for d, r in results["diversity"].items())
    return [*lines, f"by diversity: {'; '.join(costs)}"]
