"""``vivace optimize``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

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
from vivace.manifest import write_text


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

        sizes = chosen_preset(preset, run.root, recorded=False)
        features, trial_sizes = Features(run.features), with_overrides(sizes, epochs)
        study = search_parameters(features, trial_sizes, run.root, seed, trials, say, ranges)
        best = write_best(run.optimized / "preset.json", sizes, study.best_params)
    say(f"{len(study.trials)} trials; best {study.best_value:.4f} with {study.best_params}")
    say(f"study {run.optimized / 'study.log'}, plot {run.optimized / 'study.png'}")
    say_next(f"train --preset {best}", run, artifacts)


def write_best(path: Path, sizes: Any, values: dict[str, Any]) -> Path:
    """Writes ``sizes`` with the best values as a JSON file that --preset takes: all but those that nothing reads."""
    from training.preset_rules import unread
    from training.presets import flat

    whole = flat(sizes) | values
    record = {name: value for name, value in whole.items() if unread(name, whole) is None}
    write_text(path, json.dumps(record, indent=2))
    return path
