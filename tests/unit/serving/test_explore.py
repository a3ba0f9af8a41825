"""What is explored: at the set share of places, by chances that are exact, so that what it teaches is unbiased."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from serving.repository import CHECKOUT_REPOSITORY
from serving.runtime.explore import FEW, Explorer, chances
from serving.server_options import ServerOptions
from serving.service import check_options
from serving.wheel import ServerError
from training.judge.counterfactual import PROBABILITY, UNIT, counterfactual
from vivace.columns import CLICKED, ITEM, POSITION
from vivace.impressions.files import REQUEST_ID
from vivace.impressions.joined import PROPENSITY

ITEMS, SHOWN, SHARE = 30, 5, 0.1
NEW = np.array([3, 21, 24, 28])  # one of them is ranked among the first


def explorer(share: float = SHARE, seed: int = 0) -> Explorer:
    counts = np.full(ITEMS, FEW)
    counts[NEW] = FEW - 1
    return Explorer(share, counts >= FEW, np.random.default_rng(seed))


def answers(rows: int, k: int = SHOWN) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[bool]]:
    """Items 1, 2, … in their order, a probability that falls."""
    ids = np.tile(np.arange(1, ITEMS), (rows, 1))
    values = np.stack([30.0 - ids, 0.3 / ids], 1).astype(np.float32)
    return ids, values, np.full(rows, k), [True] * rows


def test_the_chance_of_each_is_that_of_the_largest_draw():
    p = np.array([0.3, 0.1, 0.02, 0.001, 0.5])
    draws = np.random.default_rng(0).exponential(p / (1 - p), (200_000, len(p)))
    seen = np.bincount(draws.argmax(1), minlength=len(p)) / len(draws)
    assert chances(p) == pytest.approx(seen, abs=0.004)
    assert chances(np.array([0.2])) == pytest.approx([1.0])
    # of two means a and b the first is larger with chance a / (a + b)
    assert chances(np.array([0.5, 0.2]))[0] == pytest.approx(1 / 1.25, abs=1e-6)


def test_each_place_is_explored_as_often_as_its_propensity_says():
    rows = 12_000
    ids, values, k, may = answers(rows)
    before = ids.copy(), values.copy()
    shown, shown_values, propensity = explorer()(ids, values, k, may)
    assert (ids == before[0]).all() and (values == before[1]).all()  # what it was given stays
    assert (np.sort(shown, 1) == np.sort(ids, 1)).all()
    assert np.allclose(shown_values[:, 1], 0.3 / shown)  # values go with items
    for place in range(SHOWN):
        assert (shown[:, place] != ids[:, place]).mean() == pytest.approx(SHARE, abs=0.012)
        for item in np.unique(shown[:, place]):
            there = shown[:, place] == item
            (chance,) = np.unique(propensity[there, place])
            assert there.mean() == pytest.approx(chance, abs=0.012)
    explored = shown[:, :SHOWN][shown[:, :SHOWN] != ids[:, :SHOWN]]
    assert set(explored) == {21, 24, 28}  # what is shown anyway is not explored
    assert (propensity[:, SHOWN:] == 1).all()


def test_what_may_not_explore_or_has_nothing_new_stays_as_it_is():
    ids, values, k, _ = answers(500)
    shown, _, propensity = explorer(0.2)(ids, values, k, [False] * 500)
    assert (shown == ids).all() and (propensity == 1).all()
    shown, _, propensity = Explorer(0.2, np.ones(ITEMS, bool))(ids, values, k, [True] * 500)
    assert (shown == ids).all() and (propensity == 1).all()
    ids[:, 20:] = 0  # nothing else is left to answer
    shown, _, propensity = explorer(0.2)(ids, values, np.full(500, 100), [True] * 500)
    assert (shown == ids).all() and (propensity == 1).all()
    fresh, values, k, may = answers(500)
    fresh[:, 25] = ITEMS + 7  # a slot of the live catalogue
    shown, _, _ = Explorer(0.2, np.ones(ITEMS, bool))(fresh, values, k, may)
    assert (shown[:, :SHOWN] == ITEMS + 7).sum() > 100


def test_what_is_avoided_is_never_explored():
    ids, values, k, may = answers(2_000)
    shown, _, propensity = explorer(0.2)(ids, values, k, may, lambda of: np.isin(of, [21, 28]))
    assert set(shown[:, :SHOWN][shown[:, :SHOWN] != ids[:, :SHOWN]]) == {24}
    assert np.unique(propensity[:, :SHOWN]) == pytest.approx([0.2, 0.8])  # the chance of the only one that is left


def test_an_estimate_by_the_logged_chances_is_unbiased_and_one_without_them_is_not():
    rows, rng = 6_000, np.random.default_rng(1)
    ids, values, k, may = answers(rows)
    shown, _, propensity = explorer(0.2, seed=2)(ids, values, k, may)
    rate = rng.uniform(0.02, 0.5, ITEMS)
    rate[NEW] = 0.7  # nobody knew
    place_effect = np.array([1.0, 0.8, 0.6, 0.5, 0.4])
    clicked = rng.random((rows, SHOWN)) < rate[shown[:, :SHOWN]] * place_effect
    of_row = np.repeat(np.arange(rows), SHOWN)
    log = pd.DataFrame({
        UNIT: of_row, REQUEST_ID: of_row.astype(str), ITEM: shown[:, :SHOWN].ravel().astype(str),
        POSITION: np.tile(np.arange(1, SHOWN + 1), rows), CLICKED: clicked.ravel(),
        PROPENSITY: propensity[:, :SHOWN].ravel(),
    })  # fmt: skip
    policies = {"ranked": [1, 2, 3, 4, 5], "new first": [21, 2, 3, 4, 5]}
    for name, items in policies.items():
        truth = float((rate[items] * place_effect).mean())
        other = pd.DataFrame({
            REQUEST_ID: of_row.astype(str), ITEM: np.tile(items, rows).astype(str),
            POSITION: np.tile(np.arange(1, SHOWN + 1), rows), PROBABILITY: 1.0,
        })  # fmt: skip
        by_chance = counterfactual(log, other).ips
        width = by_chance.high - by_chance.low
        assert abs(by_chance.value - truth) < width, name  # four standard errors
        without = counterfactual(log.assign(**{PROPENSITY: 1.0}), other).ips
        assert truth - without.value > without.high - without.low, name


def test_exploring_what_nobody_could_learn_from_is_refused():
    ports = dict(http_port=0, grpc_port=0, metrics_port=0)
    with pytest.raises(ServerError, match="--explore: expected --impressions with it"):
        check_options(ServerOptions(CHECKOUT_REPOSITORY, explore=0.02, **ports), 0)
    with pytest.raises(ValueError, match=r"--explore: expected 0 % to 20% of the places, got 0.5 of 1"):
        check_options(ServerOptions(CHECKOUT_REPOSITORY, explore=0.5, impressions=True, **ports), 0)
