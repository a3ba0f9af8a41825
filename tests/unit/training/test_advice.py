"""The preset that a data set gets where none is named."""

from __future__ import annotations

import pytest

from training.advice import LogSizes, suited
from training.presets import PRESETS

LOGS = {  # users, items, training events, of the median user, real times
    "ML-1M": (LogSizes(6_040, 3_416, 987_531, 94, False), "cpu"),
    "Beauty": (LogSizes(22_363, 12_101, 153_776, 4, False), "beauty"),
    "Globo": (LogSizes(322_897, 46_033, 2_300_000, 4, True), "news-time"),
    "news without times": (LogSizes(322_897, 46_033, 2_300_000, 4, False), "news"),
    "demo shop": (LogSizes(10_000, 5_000, 250_000, 23, True), "shop"),
    "Retailrocket": (LogSizes(2_174, 29_905, 93_000, 21, True), "beauty"),
    "Tmall": (LogSizes(61_232, 40_727, 375_000, 4, False, True), "session"),
    "nothing": (LogSizes(0, 0, 0, 0, False), "beauty"),
}


@pytest.mark.parametrize("log", LOGS)
def test_each_kind_of_log_gets_its_preset(log):
    sizes, expected = LOGS[log]
    name, why = suited(sizes)
    assert name == expected and name in PRESETS
    assert f"{sizes.items:,} items" in why and "\n" not in why
