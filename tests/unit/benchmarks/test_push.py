"""What an attack's budget is after limits, and how its row is read."""

from __future__ import annotations

import numpy as np

from benchmarks.push import LIMITS, Budget, row_of
from vivace.contract import FIRST_ID
from vivace.live import Stream

NOW = 1_700_000_000_000
RECENT = Stream.of(np.arange(3), np.full(3, FIRST_ID), NOW - np.arange(3, 0, -1), np.array([[1], [2], [3]]))


def test_clicks_that_count_of_ten_accounts_with_a_hundred_each():
    counted = {
        name: Budget(10, 100).stream(FIRST_ID + 1, NOW, RECENT, limits, np.random.default_rng(1))
        for name, limits in LIMITS.items()
    }
    # newcomers alone came: the sixth has to wait until the weight of those before, 1/e after ten minutes, is below five
    assert [len(stream) for stream in counted.values()] == [1000, 10, 100, 9]
    every = counted["none"]
    assert every.times_ms.min() == NOW - 600_000 and every.times_ms.max() < NOW
    assert every.entry.sum() == 10 and set(every.context[:, 0].tolist()) <= {1, 2, 3}


def test_a_row_is_the_mean_over_targets():
    measured = [(5, np.array([0, 9, 10, 150]), 7), (5, np.array([3, 150, 150, 150]), 7), (6, np.full(4, 150), 7)]
    row = row_of(Budget(7, 1), "none", measured)
    assert row["top 10"] == (0.375 + 0.0) / 2 and row["counted"] == 7 and row["median rank"] == 151
