"""``vivace parity``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, Name, PresetName, chosen_preset, console, say
from vivace.cli.runs import find_run, run_name


def parity(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    preset: PresetName = "",
    every: Annotated[float, typer.Option(help="seconds between two looks (0: look once and end)", min=0)] = 0.0,
) -> None:
    """Compute requests that were served ('vivace serve --impressions --parity 1%') again by NVTabular and PyTorch, as
    training and evaluation do, and say where ids, items or scores differ. At the lowest priority. The exit code of one
    look is 1 where something differs."""
    from vivace.impressions.queue import folder_of as impressions_of
    from vivace.impressions.samples import files, folder_of

    run = find_run(artifacts, name)
    folder = folder_of(impressions_of(run.feature_store))
    start = f"'vivace serve --name {run_name(run, artifacts)} --impressions --parity 1%'"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no sample yet, and no server samples; {start} does, and writes the first within a minute"
        )
    if not every and not files(folder):
        say(f"no sample waits; {coming(folder, start)}")
        return
    from preprocessing.features import Features
    from training.judge.parity import Offline, Tally, at_low_priority, check_comparable, look

    at_low_priority()
    offline, version = None, 0
    while True:
        if every and not files(folder):
            say(f"no sample waits; {coming(folder, start)}")
            time.sleep(every)
            continue
        if doubt := run.doubt():
            raise ValueError(f"parity: {doubt}")
        if offline is None or run.version() != version:
            check_comparable(run)
            with console.status("loading the models"):
                offline, version = (
                    Offline(Features(run.features), chosen_preset(preset, run.root), run.root),
                    run.version(),
                )
        before = Tally.load(folder)
        now = look(run, offline, Tally.load(folder))
        replayed, skewed = now.replayed - before.replayed, now.skewed - before.skewed
        say(
            f"version {version}: {replayed:,} requests computed again, {skewed:,} differ ({now.ids - before.ids:,} in "
            f"ids, {now.answer - before.answer:,} in the answer), {now.skipped - before.skipped:,} not comparable"
        )
        for example in now.examples[-skewed:] if skewed else []:
            say(example)
        if not every:
            raise typer.Exit(int(skewed > 0))
        time.sleep(every)


def coming(folder: Path, start: str) -> str:
    """When the next sample comes. ``start``: the command that begins to sample."""
    from vivace.impressions.samples import next_turn_s

    seconds = next_turn_s(folder)
    if seconds is None:
        return f"no server samples requests at the moment: {start} does"
    return f"requests that are sampled from now on are written within {seconds:.0f} s"
