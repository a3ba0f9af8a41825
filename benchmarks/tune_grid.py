"""The tuner against a full grid: how much of the best rate it finds, in how many of the grid's runs.

    python -m benchmarks.tune_grid artifacts/ml-1m --space grid.json

Every configuration of the space is run until its knee is known; then the tuner has its turn on the same space, with a
log of its own. The grid's best is the luckiest of many runs as well as a good configuration, so it and the tuner's
choice are then measured again, ``--turns`` times in turn with arrivals that neither has seen: what counts is the ratio
of those medians. All go on where they were interrupted. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.turns import in_turns, spread, with_spread
from loadtest.reports.record import record_line
from loadtest.tune.journal import live_runs
from loadtest.tune.space import Objective, Trial, trials
from loadtest.tune.tuner import Tuner
from vivace.run import Run

console = Console(width=120)
GRID, CHOICE, AGAIN = "grid", "grid-search", "grid-again"  # names of the logs
ANY_BUDGET_S = 1e6


def say(text: str) -> None:
    console.print(text, highlight=False, markup=False)


def tuner(root: Path, objective: Objective, name: str, space: dict[str, list[Any]], seconds: float) -> Tuner:
    return Tuner(root, objective, name, space, ANY_BUDGET_S, seconds, say, lambda _: None)


def run_grid(grid: Tuner, everything: list[Trial]) -> dict[Trial, float]:
    """Knee of every configuration that keeps the quality."""
    fit = [t for t in everything if grid.quality.kept(t.answer) >= grid.objective.quality]
    met = {}
    for i, trial in enumerate(fit):
        met[trial] = grid.measure(trial, grid.predict(trial)).met
        say(f"{i + 1} of {len(fit)}: {met[trial]:.0f} requests a second: {trial}")
    if not met:
        raise ValueError(f"grid: expected a configuration that keeps {grid.objective.quality:.1%}, got none")
    return met


def again_in_turns(
    again: Tuner, chosen: Trial, best: Trial, guess: Mapping[Trial, float], turns: int
) -> dict[str, Any]:
    """Knees of the tuner's choice and of the grid's best, in turns."""
    rates: dict[Trial, list[float]] = {chosen: [], best: []}
    for turn, trial in in_turns(turns, list(rates)):
        rates[trial].append(again.measure(trial, guess.get(trial, guess[best]), turn=turn + 1).met)
        say(f"turn {turn + 1}: {rates[trial][-1]:.0f} requests a second: {trial}")
    return {"chosen": spread(rates[chosen]), "best": spread(rates[best])}


def main(
    root: Annotated[Path, typer.Argument(help="the run, artifacts/<name>")],
    space: Annotated[Path, typer.Option(help="JSON of values by knob")],
    slo: str = "p99=20ms",
    quality: float = 0.99,
    seconds: Annotated[float, typer.Option(help="of one run under load")] = 4.0,
    turns: Annotated[int, typer.Option(help="of the two best at the end")] = 5,
    restart: Annotated[bool, typer.Option(help="forget what was measured")] = False,
) -> None:
    objective, values = Objective.parse(slo, quality), json.loads(space.read_text())
    for name in (GRID, CHOICE, AGAIN) if restart else ():
        (Run(root).tuning / f"{name}.jsonl").unlink(missing_ok=True)
    everything = trials(values, root)
    with closing(tuner(root, objective, GRID, values, seconds)) as grid:  # one at a time: each opens the feature store
        met = run_grid(grid, everything)
    best = max(met, key=lambda t: met[t])
    with closing(tuner(root, objective, CHOICE, values, seconds)) as search:
        choice = search.choose(everything)
    if choice is None:
        raise ValueError(f"{objective}: the tuner found no configuration that meets it")
    chosen = choice.trial
    say(f"the grid's best, {met[best]:.0f}: {best}\nthe tuner's choice: {chosen}")
    with closing(tuner(root, objective, AGAIN, values, seconds)) as again:
        rates = again_in_turns(again, chosen, best, met, turns)
    runs = live_runs(search.journal), live_runs(grid.journal)
    share = rates["chosen"]["median"] / max(rates["best"]["median"], 1e-9)
    say(f"the tuner's choice has {with_spread(rates['chosen'])} against the best's {with_spread(rates['best'])}: "
        f"{share:.1%} of the medians, in {runs[0]} runs against {runs[1]}")  # fmt: skip
    print(record_line(
        "tuner against a full grid", data=root.name, objective=str(objective), space=values,
        configurations=len(everything), fit=len(met), grid_best_qps=met[best],
        chosen_qps_in_grid=met.get(chosen),  # none: the untuned one, outside the space
        in_turns=rates, share=round(share, 4), search_runs=runs[0], grid_runs=runs[1],
        runs_share=round(runs[0] / runs[1], 4), chosen=str(chosen), best=str(best),
    ))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
