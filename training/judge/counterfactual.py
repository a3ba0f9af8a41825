"""What another version would have been clicked, from what was shown: IPS, SNIPS and the doubly robust estimate.

A click on an item at a place is taken not to depend on the items beside it (item-position model, Li et al. 2018,
"Offline evaluation of ranking policies with click models"); the log says with which chance the item was shown there.
Estimators: Swaminathan and Joachims 2015 (SNIPS), Dudík et al. 2011 (doubly robust).
Axis legend: R shown rows (a request, a place), Q rows of the other version.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pandas as pd

from vivace.columns import CLICKED, ITEM, POSITION
from vivace.impressions.files import REQUEST_ID
from vivace.impressions.joined import PROPENSITY

UNIT = "unit"  # whom randomness goes by: the user, or the request of someone anonymous
PROBABILITY = "probability"  # of a row of the other version: chance that it shows the item at the place
SMOOTHING = 20.0  # shown items that an item's rate is drawn to the mean by


@dataclass(frozen=True)
class Estimate:
    """Clicks a shown item, with the bounds of a 95 % interval, clustered by user."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Counterfactual:
    """``effective``: shown rows that the weights are worth, (Σw)² / Σw². ``support``: share of what the other version
    shows that the log could have shown (mean weight; 1 is all of it, but for chance): below it IPS is too low, SNIPS
    speaks of what is supported alone, and the doubly robust estimate believes its model of the rest."""

    ips: Estimate
    snips: Estimate
    doubly_robust: Estimate
    effective: float
    support: float
    logged: Estimate


def _estimate(values: np.ndarray, slots: np.ndarray) -> Estimate:
    """Of units' sums: Σ values / Σ slots."""
    total, units = float(slots.sum()), len(slots)
    if total <= 0 or units < 2:
        return Estimate(math.nan, -math.inf, math.inf)
    value = float(values.sum()) / total
    residual = values - value * slots
    error = math.sqrt(float(residual @ residual) * units / (units - 1)) / total
    z = NormalDist().inv_cdf(0.975)
    return Estimate(value, value - z * error, value + z * error)


class ClickModel:
    """A click's chance by item and place: the place's effect times the item's rate, smoothed. ``shown``: columns ITEM,
    POSITION, CLICKED."""

    def __init__(self, shown: pd.DataFrame) -> None:
        self.first = max(float(shown[CLICKED].mean()), 1e-9) if len(shown) else 1e-9
        by_place = shown.groupby(POSITION)[CLICKED].agg(["sum", "count"])
        self.effect = (by_place["sum"] + SMOOTHING * self.first) / (by_place["count"] + SMOOTHING) / self.first
        seen = shown[POSITION].map(self.effect)
        clicks, exposure = shown[CLICKED].groupby(shown[ITEM]).sum(), seen.groupby(shown[ITEM]).sum()
        self.rate = (clicks + SMOOTHING * self.first) / (exposure + SMOOTHING)

    def __call__(self, items: pd.Series, places: pd.Series) -> np.ndarray:
        """float64 [len(items)]."""
        effect, rate = places.map(self.effect).fillna(1.0), items.map(self.rate).fillna(self.first)
        chance: np.ndarray = np.clip(effect.to_numpy(float) * rate.to_numpy(float), 0.0, 1.0)
        return chance


def counterfactual(shown: pd.DataFrame, other: pd.DataFrame, folds: int = 2, seed: int = 0) -> Counterfactual:
    """``shown``: rows of the joined log with UNIT, REQUEST_ID, ITEM, POSITION, CLICKED, PROPENSITY. ``other``: what the
    other version shows in answer to the same requests: REQUEST_ID, ITEM, POSITION and PROBABILITY (1 if left out). The
    click model of a unit is fitted on other units. Raises ValueError where the two have no request in common, or a
    propensity is none."""
    if not ((shown[PROPENSITY] > 0) & (shown[PROPENSITY] <= 1)).all():
        raise ValueError(f"shown rows, {PROPENSITY}: expected chances above 0 and up to 1; log them again")
    key = [REQUEST_ID, ITEM, POSITION]
    if missing := [name for name in key if name not in other]:
        raise ValueError(f"the other version's rows: expected columns {', '.join(key)}, found no {', '.join(missing)}")
    chances = other.get(PROBABILITY, pd.Series([1.0]))
    if not ((chances >= 0) & (chances <= 1)).all():
        raise ValueError(f"the other version's rows, {PROBABILITY}: expected chances of 0 to 1")
    other = other[other[REQUEST_ID].isin(shown[REQUEST_ID])]
    if not len(other):
        raise ValueError(f"the other version's rows: expected {REQUEST_ID}s of the log, got none of them")
    other = other.assign(**{PROBABILITY: other.get(PROBABILITY, 1.0)})[[*key, PROBABILITY]]
    shown = shown[shown[REQUEST_ID].isin(other[REQUEST_ID])].drop_duplicates(key)
    unit_of = shown.drop_duplicates(REQUEST_ID).set_index(REQUEST_ID)[UNIT]
    codes, units = pd.factorize(unit_of)
    code_of = pd.Series(codes, unit_of.index)
    shown_unit, other_unit = shown[REQUEST_ID].map(code_of).to_numpy(), other[REQUEST_ID].map(code_of).to_numpy()
    there = shown.merge(other, how="left", on=key)[PROBABILITY].fillna(0.0).to_numpy(float)
    weight_R, click_R = there / shown[PROPENSITY].to_numpy(float), shown[CLICKED].to_numpy(float)
    fold = np.random.default_rng(seed).integers(0, folds, len(units))
    model_R, model_Q = np.zeros(len(shown)), np.zeros(len(other))
    for number in range(folds):
        model = ClickModel(shown[fold[shown_unit] != number])
        mine, theirs = fold[shown_unit] == number, fold[other_unit] == number
        model_R[mine] = model(shown[ITEM][mine], shown[POSITION][mine])
        model_Q[theirs] = model(other[ITEM][theirs], other[POSITION][theirs])

    def of_units(codes: np.ndarray, values: np.ndarray) -> np.ndarray:
        sums: np.ndarray = np.bincount(codes, values, len(units))
        return sums

    chance_Q = other[PROBABILITY].to_numpy(float)
    slots, weights = of_units(other_unit, chance_Q), of_units(shown_unit, weight_R)
    weighted = of_units(shown_unit, weight_R * click_R)
    corrected = of_units(other_unit, chance_Q * model_Q) + of_units(shown_unit, weight_R * (click_R - model_R))
    squares = float(weight_R @ weight_R)
    return Counterfactual(
        _estimate(weighted, slots), _estimate(weighted, weights), _estimate(corrected, slots),
        float(weight_R.sum()) ** 2 / squares if squares else 0.0, float(weight_R.sum() / chance_Q.sum()),
        _estimate(of_units(shown_unit, click_R), of_units(shown_unit, np.ones(len(shown)))),
    )  # fmt: skip
