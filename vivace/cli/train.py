"""``vivace train``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from vivace.cli.options import (
    DEFAULT_ARTIFACTS,
    Artifacts,
    Name,
    PresetName,
    Seed,
    Wandb,
    chosen_preset,
    reported,
    say,
    track,
    with_overrides,
)


def train(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    preset: PresetName = "",
    seed: Seed = 7,
    control: Annotated[bool, typer.Option(help="also train the ranker without its extra label")] = False,
    epochs: Annotated[int, typer.Option(help="epochs of the retriever (0: the preset's)")] = 0,
    loss: Annotated[str, typer.Option(help='"full", "sampled" or "gbce" ("": the preset\'s)')] = "",
    start_from: Annotated[
        Path | None, typer.Option("--from", help="folder of a pretrained or trained retriever to start from")
    ] = None,
    adapt: Annotated[str, typer.Option(help="with --from: full, lora or adapter")] = "full",
    rank: Annotated[int, typer.Option(help="with --adapt lora: rank of the updates")] = 8,
    wandb: Wandb = False,
    task: Annotated[str, typer.Option(help="recommend, or search: what makes a trained run's catalogue searchable")] = (
        "recommend"
    ),
) -> None:
    """Train the retriever, then the ranker; resumes from the last checkpoint. --task search: then the text encoder, the
    word index and the search ranker."""
    if task == "search":
        learn_search(artifacts / name, preset, seed)
        return
    track(wandb)
    from preprocessing.features import Features
    from training import distributed
    from training.learn.ranker import train_ranker
    from training.learn.retriever import train_retrieval
    from training.models.adapters import Adaptation
    from vivace.manifest import exclusive

    with reported():
        root = artifacts / name
        chosen = with_overrides(chosen_preset(preset, root, recorded=False), epochs, loss)
        features = Features(root / "features")
        with distributed.group() as world, exclusive(root) if world.first else contextlib.nullcontext():
            first = train_retrieval(
                features, chosen, root, seed, say if world.first else lambda _: None,
                start_from=start_from, adaptation=Adaptation(adapt, rank), world=world,
            )  # fmt: skip
            if not world.first:  # the ranker is small: the first process trains it alone
                return
            sizes = first["results"]
            say(
                f"retriever: {sizes['parameters']:,} parameters, {sizes['trained_parameters']:,} trained, "
                f"{first['seconds']:.0f} s"
            )
            second = train_ranker(features, chosen, root, seed, say)
            say(f"ranker: {second['results']['parameters']:,} parameters, {second['seconds']:.0f} s")
            if control:
                train_ranker(features, chosen, root, seed, say, control=True)


def learn_search(root: Path, preset: str, seed: int) -> None:
    from preprocessing.features import Features
    from training.search.train import SearchTraining, train_search
    from vivace.manifest import exclusive

    with reported():
        features = Features(root / "features")
        with exclusive(root):
            found = train_search(features, chosen_preset(preset, root), root, SearchTraining(), seed, say)["results"]
        for kind, r in found["queries"].items():
            low, high = r["gain_interval"]
            say(
                f"queries made of {kind}, {r['requests']:,} test requests, NDCG@10: fused {r['fused']:.4f}, ranked "
                f"{r['ranked']:.4f}, with the user's history {r['with_history']:.4f} ({r['gain']:+.4f}, {low:+.4f} to "
                f"{high:+.4f}); {r['found']:.1%} found"
            )
        if log := found.get("log"):
            low, high = log["over_shown_interval"]
            say(
                f"{log['searches']:,} held-out searches of the log, NDCG@10 of clicks by inverse propensity: as shown "
                f"{log['shown']:.4f}, fused {log['fused']:.4f}, ranked {log['ranked']:.4f}, with the user's history "
                f"{log['with_history']:.4f} ({log['over_shown']:+.4f} over shown, {low:+.4f} to {high:+.4f})"
            )
        costs = (f"{d}: {r['NDCG@10']:.4f}, alike {r['alike']:.2f}" for d, r in found["diversity"].items())
        say(f"by diversity: {'; '.join(costs)}")
        say(f"vivace compile --name {root.name}, and QUERY is served")
