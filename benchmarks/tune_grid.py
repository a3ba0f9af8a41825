"""The tuner against a full grid: how much of the best rate it finds, in how many of the grid's runs.

    python -m benchmarks.tune_grid artifacts/ml-1m --space grid.json

Every configuration of the space is run until its knee is known; then the search has its turn on the same space, with a
log of its own. The grid's best is the luckiest of many runs as well as a good configuration, so it and the search's
choice are then measured again, ``TURNS`` times in turn with arrivals that neither has seen: what counts is the ratio of
those medians. All go on where they were interrupted. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from loadtest.tune.space import Objective, Trial, trials
from loadtest.tune.tune import FOLDER, Tuner, live_runs
from vivace.machine import cpu
from vivace.manifest import commit

console = Console(width=120)
GRID, SEARCH, AGAIN = "grid", "grid-search", "grid-again"
TURNS = 5
ANY_BUDGET_S = 1e6


def tuner(root: Path, objective: Objective, name: str, space: dict[str, list[Any]], seconds: float) -> Tuner:
    say = lambda text: console.print(text, highlight=False)  # noqa: E731
    return Tuner(root, objective, name, space, ANY_BUDGET_S, seconds, say, lambda _: None)


def main(
    root: Annotated[Path, typer.Argument(help="the run, artifacts/<name>")],
    space: Annotated[Path, typer.Option(help="JSON of values by knob")],
    slo: str = "p99=20ms",
    quality: float = 0.99,
    seconds: Annotated[float, typer.Option(help="of one run under load")] = 4.0,
    restart: Annotated[bool, typer.Option(help="forget what was measured")] = False,
) -> None:
    objective, wanted = Objective.parse(slo, quality), json.loads(space.read_text())
    for name in (GRID, SEARCH, AGAIN):
        if restart:
            (root / FOLDER / f"{name}.jsonl").unlink(missing_ok=True)
    everything = trials(wanted, root)
    grid = tuner(root, objective, GRID, wanted, seconds)
    fit = [t for t in everything if grid.kept(t.answer) >= quality]
    met = {}
    for i, trial in enumerate(fit):
        met[trial] = grid.measure(trial, grid.predict(trial)).met
        console.print(f"{i + 1} of {len(fit)}: {met[trial]:.0f} requests a second: {trial}", highlight=False)
    grid.close()
    search = tuner(root, objective, SEARCH, wanted, seconds)
    found = search.search()
    search.close()
    chosen = Trial(**found["chosen"]["trial"])
    best = max(met, key=lambda t: met[t])
    runs = live_runs(search.journal), live_runs(grid.journal)
    console.print(f"the grid's best, {met[best]:.0f}: {best}", highlight=False)
    console.print(f"the search's choice: {chosen}", highlight=False)
    again = tuner(root, objective, AGAIN, wanted, seconds)
    rates: dict[Trial, list[float]] = {chosen: [], best: []}
    for turn, trial in itertools.product(range(1, TURNS + 1), rates):
        rates[trial].append(again.measure(trial, met.get(trial, met[best]), turn=turn).met)
        console.print(f"turn {turn}: {rates[trial][-1]:.0f} requests a second: {trial}", highlight=False)
    again.close()
    share = float(np.median(rates[chosen]) / np.median(rates[best]))
    console.print(f"the search's choice has {share:.1%} of the best, in {runs[0]} runs against {runs[1]}")
    print(json.dumps({
        "benchmark": "tuner against a full grid", "data": root.name, "objective": str(objective), "space": wanted,
        "configurations": len(everything), "fit": len(fit),
        "grid_best_qps": met[best], "chosen_qps_in_grid": met.get(chosen),  # none: the untuned one, outside the space
        "best_in_turns": rates[best],
        "chosen_in_turns": rates[chosen],
        "share": round(share, 4), "search_runs": runs[0], "grid_runs": runs[1],
        "runs_share": round(runs[0] / runs[1], 4), "chosen": str(chosen), "best": str(best), "cpu": cpu()[0],
        "commit": commit(),
    }))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
