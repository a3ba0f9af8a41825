"""``vivace optimize``."""

from __future__ import annotations

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
    say,
    with_overrides,
)
from vivace.cli.runs import say_next, step
from vivace.cli.values import json_file


def optimize(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    preset: PresetName = "",
    seed: Seed = 7,
    trials: Annotated[int, typer.Option(help="trials to add to the study", min=1)] = 10,
    epochs: Annotated[int, typer.Option(help="epochs of a trial (0: the preset's)", min=0)] = 0,
    space: Annotated[
        Path | None,
        typer.Option(
            help='JSON, such as {"encoder.dropout": [0.0, 0.5]}; the default if none', exists=True, dir_okay=False
        ),
    ] = None,
) -> None:
    """Search the retriever's hyper-parameters on the validation requests; goes on with an earlier study."""
    ranges = json_file(space, "--space") if space else None
    with step(name, artifacts) as run:
        from preprocessing.features import Features
        from training.learn.hpo import optimize as search_parameters

        sizes = with_overrides(chosen_preset(preset, run.root, recorded=False), epochs)
        study = search_parameters(Features(run.features), sizes, run.root, seed, trials, say, ranges)
    say(f"{len(study.trials)} trials; best {study.best_value:.4f} with {study.best_params}")
    say(f"study {run.optimized / 'study.log'}, plot {run.optimized / 'study.png'}")
    say('to train with these values, write them into a JSON file beside "preset" and give it as --preset')
    say_next("train --preset FILE.json", run, artifacts)
