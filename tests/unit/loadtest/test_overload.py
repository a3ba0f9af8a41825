"""What an overload run says, from records worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.overload import AFTER_S, CALM_S, by_second, recovery, timetable
from loadtest.generate.generator import CODE_DEGRADED


def test_the_timetable_is_calm_then_not_then_calm():
    due = timetable(300, 3, 20, 1)
    counts = np.bincount(due.astype(int))
    before, during, after = np.split(counts, [int(CALM_S), int(CALM_S) + 20])
    assert (np.diff(due) >= 0).all() and len(after) == AFTER_S
    assert [part.mean() for part in (before, during, after)] == pytest.approx([100, 900, 100], rel=0.12)


def test_seconds_and_recovery_by_hand():
    second = lambda at, ms, code="": [(at + i / 10, at + i / 10, at + i / 10 + ms / 1000, code) for i in range(10)]  # noqa: E731
    records = [*second(0, 5), *second(1, 30), *second(2, 6, CODE_DEGRADED), *second(3, 2, "UNAVAILABLE"), *second(4, 6)]
    found = by_second(records, 20)
    assert [(s["due"], s["in_time"], s["degraded"], s["refused"]) for s in found] == [
        (10, 10, 0, 0), (10, 0, 0, 0), (10, 10, 10, 0), (10, 0, 0, 10), (10, 10, 0, 0),
    ]  # fmt: skip
    assert found[1]["p50"] == pytest.approx(30) and np.isnan(found[3]["p50"])
    assert recovery(found, 5, 20) == 4 and recovery(found[:1], 5, 20) == 0 and recovery(found[:2], 5, 20) is None
