"""``vivace pretrain``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vivace.cli.options import (
    DEFAULT_ARTIFACTS,
    Artifacts,
    Name,
    PresetName,
    Seed,
    Wandb,
    chosen_preset,
    say,
    track,
)
from vivace.cli.runs import say_next, step
from vivace.cli.values import one_of, values_of

TEXT = "text"
OBJECTIVES = values_of("training.learn.pretrain:OBJECTIVES")


def pretrain(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    preset: PresetName = "",
    seed: Seed = 7,
    objective: Annotated[
        str,
        typer.Option(
            help=f"by commas: {', '.join(OBJECTIVES)}; or {TEXT}, for the text encoder",
            parser=one_of((*OBJECTIVES, TEXT), commas=True),
            metavar="NAMES",
        ),
    ] = "masked",
    epochs: Annotated[int, typer.Option(help="0: 2, and 10 for text", min=0)] = 0,
    wandb: Wandb = False,
) -> None:
    """Train the encoder without next-item labels; 'vivace train --from' then starts from it."""
    track(wandb)
    objectives = tuple(part for part in objective.split(",") if part)
    if TEXT in objectives and len(objectives) > 1:
        raise typer.BadParameter(f"{TEXT} goes alone, got {objective!r}", param_hint="--objective")
    with step(name, artifacts) as run:
        from preprocessing.features import Features
        from training.learn.pretrain import Pretraining, pretrain as pretrain_encoder

        features = Features(run.features)
        if TEXT in objectives:
            from training.learn.text import pretrain_text
            from training.models.text_encoder import TextConfig

            config = TextConfig(epochs=epochs) if epochs else TextConfig()
            manifest = pretrain_text(features, config, run.root, seed, say)
        else:
            sizes = chosen_preset(preset, run.root, recorded=False)
            names: Any = objectives  # checked when the config is made
            pretraining = Pretraining(objectives=names, epochs=epochs or 2)
            manifest = pretrain_encoder(features, sizes, pretraining, run.root, seed, say)
    say(f"pretrained: {manifest['results']['parameters']:,} parameters, {manifest['seconds']:.0f} s")
    say_next("train" if TEXT in objectives else f"train --from {run.pretrained}", run, artifacts)
