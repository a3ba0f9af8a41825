"""The search ranker: what it learns from planted gains and weighted clicks."""

from __future__ import annotations

import numpy as np
import pytest

from training.search.ranker import SearchRankerConfig, train_search_ranker

FEATURES = 12


def test_it_learns_the_feature_that_decides_whatever_the_order_of_candidates():
    rng = np.random.default_rng(3)
    lists = [rng.normal(size=(6, FEATURES)).astype(np.float32) for _ in range(60)]
    gains = [(rows[:, 0] == rows[:, 0].max()).astype(float) for rows in lists]
    model = train_search_ranker(lists, gains, SearchRankerConfig(epochs=30, members=2), 3)
    scores, mixed = model.score(lists[0]), rng.permutation(6)
    assert model.score(lists[0][mixed]) == pytest.approx(scores[mixed], abs=1e-5)
    assert np.mean([model.score(rows).argmax() == g.argmax() for rows, g in zip(lists, gains, strict=True)]) > 0.8


def test_without_a_gain_there_is_nothing_to_learn():
    with pytest.raises(ValueError, match="at least one query"):
        train_search_ranker([np.ones((6, FEATURES), np.float32)], [np.zeros(6)], SearchRankerConfig(), 3)


def test_clicks_teach_by_their_weights():
    """One query in ten was clicked far down: by inverse propensity its item wins, by counted clicks the other does."""
    x = np.eye(2, dtype=np.float32)
    gains = [np.array([1.0, 0.0])] * 9 + [np.array([0.0, 20.0])]
    config = SearchRankerConfig(epochs=40, members=1, dropout=0.0)
    for weights, best in ((None, 0), ([g.sum() for g in gains], 1)):
        assert train_search_ranker([x] * 10, gains, config, 1, weights).score(x).argmax() == best
