"""What showing an item is worth: how many more clicks a request has than if the log's usual choice stood in its place.

An item that many click is not one that brings clicks: some are shown to whoever clicks anyway, and some take a click
that another item would have had. So the outcome is all clicks of a request, not those of the item. Each shown row (a
request, a place) is a draw with a known chance, its propensity. With Y the clicks of the request, g what the outcome
model expects of it, and weights w = 1 / propensity, an item's uplift is

    Σ w (Y - g) / Σ w  -  Σ (Y - g) / rows,    the first over its rows, the second over all

which is right where the propensities are, or where g is (doubly robust: Robins, Rotnitzky and Zhao 1994; weights that
are normalised: Hájek 1971). g of a request is the unit's mean of its other requests, drawn to the mean of all.
Refutations as in DoWhy (Sharma and Kiciman 2020): a placebo in the item's place has no effect, a random cause that is
added changes none.
Axis legend: R shown rows, I items, U units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import binom

from training.judge.counterfactual import UNIT
from vivace.columns import CLICKED, ITEM
from vivace.impressions.files import REQUEST_ID
from vivace.impressions.joined import PROPENSITY

SMOOTHING = 4.0  # requests of a unit that its mean is drawn to the mean of all by
LEAST = 30  # shown rows of an item that is judged
Z = 1.959964  # of a 95 % interval
ONCE = 0.01  # how often chance alone may pass for a refutation
MOST_MOVED = 1.0  # standard errors
CTR, SHOWN, UPLIFT, LOW, HIGH, EFFECTIVE = "ctr", "shown", "uplift", "low", "high", "effective"


@dataclass(frozen=True)
class Uplift:
    """``items``: by ITEM, largest first: UPLIFT in clicks a request with LOW and HIGH of a 95 % interval clustered by
    unit, CTR of the item, rows SHOWN, those that their weights are worth (EFFECTIVE). ``placebo``: share of items whose
    interval is clear of zero when each row's item is exchanged for one at random (0.05 is chance). ``moved``: by how
    many standard errors a random cause moves an item's uplift, the median."""

    items: pd.DataFrame
    requests: int
    placebo: float
    moved: float

    @property
    def by_chance(self) -> float:
        """Share of placebos that may have an effect: beyond it chance alone comes once in a hundred logs."""
        return float(binom.ppf(1 - ONCE, len(self.items), 0.05)) / len(self.items)

    @property
    def refuted(self) -> list[str]:
        """What speaks against believing the estimates, in words; [] where nothing does."""
        found = []
        if self.placebo > self.by_chance:
            found.append(f"{self.placebo:.0%} of placebos have an effect, where up to {self.by_chance:.0%} are chance")
        if self.moved >= MOST_MOVED:
            found.append(f"a random cause moves an uplift by {self.moved:.2f} standard errors, expected below "
                         f"{MOST_MOVED:g}")  # fmt: skip
        return found


def expected(outcome_Q: np.ndarray, unit_Q: np.ndarray) -> np.ndarray:
    """What each request's unit has in its other requests, drawn to the mean of all, float64 [Q]."""
    mean = float(outcome_Q.mean())
    total_U, count_U = np.bincount(unit_Q, outcome_Q), np.bincount(unit_Q)
    rest: np.ndarray = (total_U[unit_Q] - outcome_Q + SMOOTHING * mean) / (count_U[unit_Q] - 1 + SMOOTHING)
    return rest


def _effects(
    item_R: np.ndarray, weight_R: np.ndarray, residual_R: np.ndarray, unit_R: np.ndarray, items: int
) -> tuple[np.ndarray, np.ndarray]:
    """(uplift, standard error) of each item, float64 [I]."""
    weights_I = np.bincount(item_R, weight_R, items)
    usual = residual_R.mean()
    effect_I = np.bincount(item_R, weight_R * residual_R, items) / weights_I
    pulls = weight_R * (residual_R - effect_I[item_R])
    pairs, place = np.unique(item_R * (unit_R.max() + 1) + unit_R, return_inverse=True)
    squares_I = np.bincount(pairs // (unit_R.max() + 1), np.bincount(place, pulls) ** 2, items)
    return effect_I - usual, np.sqrt(squares_I) / weights_I


def uplift(shown: pd.DataFrame, least: int = LEAST, seed: int = 0) -> Uplift:
    """``shown``: rows of the joined log with UNIT, REQUEST_ID, ITEM, CLICKED, PROPENSITY. Raises ValueError where a
    propensity is none, where none is below 1 (nothing was left to chance), or no item was shown often enough."""
    chance_R = shown[PROPENSITY].to_numpy(float)
    if not ((chance_R > 0) & (chance_R <= 1)).all():
        raise ValueError(f"shown rows, {PROPENSITY}: expected chances above 0 and up to 1; log them again")
    if (chance_R == 1).all():
        raise ValueError(
            f"shown rows, {PROPENSITY}: all are 1, so nothing was left to chance and no effect can be told from "
            "habit; serve with --explore"
        )
    codes_R, names = pd.factorize(shown[ITEM])
    often_I = np.bincount(codes_R) >= least
    if not often_I.any():
        raise ValueError(f"shown rows: expected items that were shown {least} times and more, got none; log more")
    request_R, requests = pd.factorize(shown[REQUEST_ID])
    outcome_Q = np.bincount(request_R, shown[CLICKED].to_numpy(float), len(requests))
    unit_R, _ = pd.factorize(shown[UNIT])
    unit_Q = np.zeros(len(requests), np.int64)
    unit_Q[request_R] = unit_R
    weight_R, rng = 1 / chance_R, np.random.default_rng(seed)

    def effects(items_R: np.ndarray, weights_R: np.ndarray, groups_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        residual_R = (outcome_Q - expected(outcome_Q, groups_Q))[request_R]
        effect_I, error_I = _effects(items_R, weights_R, residual_R, unit_R, len(names))
        return effect_I[often_I], np.maximum(error_I[often_I], 1e-12)

    effect_I, error_I = effects(codes_R, weight_R, unit_Q)
    order = rng.permutation(len(codes_R))
    placebo_I, of_placebo_I = effects(codes_R[order], weight_R[order], unit_Q)
    cause_Q = 2 * unit_Q + rng.integers(0, 2, len(unit_Q))  # a random half of each unit's requests
    caused_I, _ = effects(codes_R, weight_R, cause_Q)
    shown_I, squares_I = np.bincount(codes_R), np.bincount(codes_R, weight_R**2)
    ctr_I = np.bincount(codes_R, shown[CLICKED].to_numpy(float)) / shown_I
    bound_I = Z * error_I
    items = pd.DataFrame(
        {
            ITEM: np.asarray(names)[often_I], UPLIFT: effect_I, LOW: effect_I - bound_I, HIGH: effect_I + bound_I,
            CTR: ctr_I[often_I], SHOWN: shown_I[often_I],
            EFFECTIVE: (np.bincount(codes_R, weight_R) ** 2 / squares_I)[often_I],
        }
    )  # fmt: skip
    return Uplift(
        items.sort_values(UPLIFT, ascending=False, ignore_index=True),
        len(requests),
        float((np.abs(placebo_I) > Z * of_placebo_I).mean()),
        float(np.median(np.abs(caused_I - effect_I) / error_I)),
    )
