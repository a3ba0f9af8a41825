"""``vivace pretrain``."""

from __future__ import annotations

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
)


def pretrain(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    preset: PresetName = "",
    seed: Seed = 7,
    objective: Annotated[
        str, typer.Option(help="by commas: masked, session, segment, contrastive; or text, for the text encoder")
    ] = "masked",
    epochs: Annotated[int, typer.Option(help="0: 2, and 10 for text")] = 0,
    wandb: Wandb = False,
) -> None:
    """Train the encoder without next-item labels; then: vivace train --from artifacts/<name>/pretrained."""
    track(wandb)
    from preprocessing.features import Features
    from training.learn.pretrain import Pretraining
    from training.learn.pretrain import pretrain as run
    from vivace.manifest import exclusive

    with reported():
        root = artifacts / name
        features = Features(root / "features")
        with exclusive(root):
            if objective == "text":
                from training.learn.text import pretrain_text
                from training.models.text_encoder import TextConfig

                text = TextConfig(epochs=epochs) if epochs else TextConfig()
                manifest = pretrain_text(features, text, root, seed, say)
            else:
                config = Pretraining(tuple(o for o in objective.split(",") if o), epochs or 2)
                manifest = run(features, chosen_preset(preset, root, recorded=False), config, root, seed, say)
        say(f"pretrained: {manifest['results']['parameters']:,} parameters, {manifest['seconds']:.0f} s")
