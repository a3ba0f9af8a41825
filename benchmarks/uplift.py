"""Whether the uplift of showing an item is told from its popularity: effects planted in a simulated log.

    python -m benchmarks.uplift --requests 60000

Users differ in how much they click whatever is shown. Each item has an effect on the clicks of a request, which is
planted, and, independent of it, a popularity: how often its own place is clicked, most of which takes the click of
another item. Popular items are shown more often, to those who click much all the more, by chances that the log keeps.
Rankings of the items by uplift and by CTR beside the planted effects: Kendall's tau, over ``--runs`` simulations. Then
the intervals' coverage and both refutations. The last line of stdout is one JSON object.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from scipy.stats import kendalltau

from benchmarks.turns import spread, with_spread
from loadtest.reports.record import record_line
from training.judge.counterfactual import UNIT
from training.judge.uplift import CTR, HIGH, LOW, UPLIFT, uplift
from vivace.columns import CLICKED, ITEM
from vivace.impressions.files import REQUEST_ID
from vivace.impressions.joined import PROPENSITY

PLACES = 5
TAU = "Kendall's tau"


def simulated(requests: int, items: int, units: int, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """(joined log, planted effect of each item in clicks a request, float64 [items]). A request shows PLACES items,
    each drawn by itself from a part of the catalogue of its own: its chance is exact."""
    rng = np.random.default_rng(seed)
    effect, popular = rng.normal(0, 0.15, items), rng.lognormal(-2.0, 0.7, items).clip(0, 0.6)
    active = rng.lognormal(-0.5, 0.8, units)
    unit = rng.integers(0, units, requests)
    part = np.arange(items) % PLACES
    shown, chance = np.empty((requests, PLACES), np.int64), np.empty((requests, PLACES))
    for place in range(PLACES):
        members = np.flatnonzero(part == place)
        pull = popular[members] / popular[members].mean()
        odds = np.exp(0.8 * np.log(pull)[None] * np.minimum(active[unit], 3)[:, None])
        chances = 0.7 * odds / odds.sum(1, keepdims=True) + 0.3 / len(members)
        drawn = (chances.cumsum(1) > rng.random((requests, 1))).argmax(1)
        shown[:, place], chance[:, place] = members[drawn], chances[np.arange(requests), drawn]
    wanted = active[unit] + 1.5 + effect[shown].sum(1)  # clicks of a request: 1.5 that all have keeps it above 0
    clicks = rng.poisson(np.maximum(wanted, 0.0))
    share = popular[shown] / popular[shown].sum(1, keepdims=True)  # popularity says whose place is clicked
    whose = (share.cumsum(1)[:, None] > rng.random((requests, 24, 1))).argmax(2)
    counted = np.zeros((requests, PLACES))
    for number in range(24):
        some = clicks > number
        np.add.at(counted, (np.flatnonzero(some), whose[some, number]), 1)
    names = np.array([f"item-{i:04}" for i in range(items)], object)
    frame = pd.DataFrame(
        {
            REQUEST_ID: np.repeat(np.arange(requests), PLACES), UNIT: np.repeat(unit, PLACES),
            ITEM: names[shown.ravel()], CLICKED: counted.ravel(), PROPENSITY: chance.ravel(),
        }
    )  # fmt: skip
    others = effect[shown].mean(0)  # of what the log shows in each place
    return frame, effect - others[part]


def main(
    requests: int = 60_000, items: int = 100, units: int = 6_000,
    runs: Annotated[int, typer.Option(help="simulations, each with effects of its own")] = 5,
) -> None:  # fmt: skip
    taken: dict[str, list[float]] = {}
    for seed in range(runs):
        log, planted = simulated(requests, items, units, seed)
        found = uplift(log, seed=seed)
        truth = planted[found.items[ITEM].str.removeprefix("item-").astype(int)]
        inside = (found.items[LOW] <= truth) & (truth <= found.items[HIGH])
        mean_outcome = log.groupby(ITEM)[CLICKED].mean()
        figures = {
            f"{TAU} of uplift": kendalltau(found.items[UPLIFT], truth).statistic,
            f"{TAU} of CTR": kendalltau(mean_outcome[found.items[ITEM]].to_numpy(), truth).statistic,
            "tau of CTR with uplift": kendalltau(found.items[CTR], found.items[UPLIFT]).statistic,
            "coverage": float(inside.mean()), "placebo": found.placebo, "random cause": found.moved,
        }  # fmt: skip
        for name, value in figures.items():
            taken.setdefault(name, []).append(float(value))
        print(f"simulation {seed}: { ({k: round(float(v), 3) for k, v in figures.items()}) }", flush=True)
    result: dict[str, Any] = {name: spread(values) for name, values in taken.items()}
    for name, of in result.items():
        print(f"{name}: {with_spread(of, 2)}")
    print(record_line("uplift", requests=requests, items=items, units=units, runs=runs, results=result))


if __name__ == "__main__":
    typer.run(main)
