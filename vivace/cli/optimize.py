"""``vivace optimize``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vivace.cli.options import (
    DEFAULT_ARTIFACTS,
    Artifacts,
    Name,
    PresetName,
    Seed,
    chosen_preset,
    reported,
    say,
    with_overrides,
)


def optimize(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    preset: PresetName = "",
    seed: Seed = 7,
    trials: Annotated[int, typer.Option(help="trials to add to the study")] = 10,
    epochs: Annotated[int, typer.Option(help="epochs of a trial (0: the preset's)")] = 0,
    space: Annotated[
        Path | None, typer.Option(help='JSON, such as {"encoder.dropout": [0.0, 0.5]}; the default if none')
    ] = None,
) -> None:
    """Search the retriever's hyper-parameters on the validation requests; goes on with an earlier study."""

    from preprocessing.features import Features
    from training.learn.hpo import optimize as run
    from vivace.manifest import exclusive

    with reported():
        root = artifacts / name
        wanted = json.loads(space.read_text()) if space else None
        chosen = with_overrides(chosen_preset(preset, root, recorded=False), epochs)
        with exclusive(root):
            study = run(Features(root / "features"), chosen, root, seed, trials, say, wanted)
        say(f"{len(study.trials)} trials; best {study.best_value:.4f} with {study.best_params}")
        say(f"study {root / 'optimized' / 'study.log'}, plot {root / 'optimized' / 'study.png'}")
