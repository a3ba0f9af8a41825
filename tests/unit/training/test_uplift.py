"""Uplift of showing an item: planted effects come back, popularity does not pass for one, refutations hold."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from benchmarks.uplift import simulated
from training.judge.uplift import CTR, HIGH, LOW, UPLIFT, Uplift, uplift
from vivace.columns import CLICKED, ITEM
from vivace.impressions.joined import PROPENSITY


@pytest.fixture(scope="module")
def log():
    return simulated(requests=20_000, items=20, units=2_000, seed=3)


def tau(first: pd.Series, second: np.ndarray) -> float:
    from scipy.stats import kendalltau

    return float(kendalltau(first, second).statistic)


def test_planted_effects_are_told_from_popularity(log):
    frame, planted = log
    found = uplift(frame)
    truth = planted[found.items[ITEM].str.removeprefix("item-").astype(int)]
    assert tau(found.items[UPLIFT], truth) > 0.8 > 0.5 > tau(found.items[CTR], truth)
    assert ((found.items[LOW] <= truth) & (truth <= found.items[HIGH])).mean() >= 0.8
    assert found.refuted == [] and found.moved < 1


def test_what_refutes_an_estimate_is_said():
    items = pd.DataFrame({ITEM: [f"item-{i}" for i in range(100)]})
    assert Uplift(items, 1_000, placebo=0.09, moved=0.5).refuted == []
    twice = Uplift(items, 1_000, placebo=0.12, moved=1.5).refuted
    assert twice == [
        "12% of placebos have an effect, where up to 11% are chance",  # 99 % of binomial(100, .05) are at most 11
        "a random cause moves an uplift by 1.50 standard errors, expected below 1",
    ]
    few = Uplift(items.head(4), 1_000, placebo=0.25, moved=0.0)
    assert few.refuted == [], "one of four is chance"


def test_propensities_are_what_tells_them(log):
    """Without them, what is shown to whoever clicks much passes for a cause, where the outcome model knows no users."""
    frame, planted = log
    strangers = frame.assign(unit=frame["request_id"])
    blind = strangers.assign(**{PROPENSITY: 0.5})
    error = {}
    for name, rows in (("known", strangers), ("blind", blind)):
        items = uplift(rows).items
        truth = planted[items[ITEM].str.removeprefix("item-").astype(int)]
        error[name] = float(np.abs(items[UPLIFT] - truth).mean())
    assert error["known"] < 0.7 * error["blind"], error


def test_a_log_that_cannot_tell_is_refused(log):
    frame, _ = log
    with pytest.raises(ValueError, match="serve with --explore"):
        uplift(frame.assign(**{PROPENSITY: 1.0}))
    with pytest.raises(ValueError, match="chances above 0"):
        uplift(frame.assign(**{PROPENSITY: 0.0}))
    with pytest.raises(ValueError, match="shown 50 times"):
        uplift(frame.head(100), least=50)
    assert frame[CLICKED].sum() > 0
