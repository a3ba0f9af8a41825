"""What counts of one user's events, by hand and at random: no order and no claimed time lets an account count more."""

from __future__ import annotations

import numpy as np
import pytest

from vivace import limits
from vivace.limits import FREE, WINDOW_MS, CountLimits, Limiter

MINUTE = 60_000


def test_an_item_counts_again_after_its_time():
    limiter = Limiter(CountLimits(same_item_ms=30 * MINUTE))
    times = [0, MINUTE, 29 * MINUTE, 30 * MINUTE, 31 * MINUTE]
    assert [limiter.counts("a", 7, t) for t in times] == [True, False, False, True, False]
    assert limiter.counts("a", 8, MINUTE) and limiter.counts("b", 7, MINUTE)


def test_a_user_counts_so_often_in_a_window():
    limiter = Limiter(CountLimits(user_events=3))
    mask = limiter.mask("aaaab", [1, 2, 3, 4, 4], [0, 1, 2, 3, 4])
    assert mask.tolist() == [True, True, True, False, True]
    assert limiter.counts("a", 5, WINDOW_MS)


def test_without_limits_all_count():
    assert Limiter(CountLimits()).mask("aaa", [1, 1, 1], [5, 5, 5]).all() and CountLimits().none


@pytest.mark.parametrize("seed", range(5))
def test_times_out_of_order_buy_nothing(seed):
    rng = np.random.default_rng(seed)
    times, items = rng.integers(0, 4 * WINDOW_MS, 400), rng.integers(0, 6, 400)
    bounds = CountLimits(same_item_ms=2 * WINDOW_MS, user_events=4)
    mask = Limiter(bounds).mask(["a"] * 400, items, times)
    for item in range(6):
        of_item = np.sort(times[mask & (items == item)])
        assert (np.diff(of_item) >= bounds.same_item_ms).all()
    counted = np.sort(times[mask])
    for start in counted:
        assert ((counted >= start) & (counted < start + WINDOW_MS // 2)).sum() <= bounds.user_events


def test_users_whose_events_bound_nothing_are_forgotten(monkeypatch):
    monkeypatch.setattr(limits, "PRUNE", 50)
    limiter = Limiter(CountLimits(same_item_ms=MINUTE))
    for n in range(5_000):
        assert limiter.counts(n, 1, n * MINUTE)
    assert len(limiter._counted) <= 51


def test_newcomers_count_for_an_item_as_far_as_others_come_too():
    limiter = Limiter(CountLimits(newcomers=2.0))
    now = 100 * limits.NEWCOMER_MS
    assert limiter.mask(range(100), [1] * 100, [now] * 100).sum() == FREE  # made for it, with nobody else
    old = [f"old {n}" for n in range(3)]
    assert limiter.unmet([*old, 5]) == old
    limiter.meet(dict.fromkeys(old, 0), now)
    assert limiter.mask(old, [1] * 3, [now] * 3).all()
    assert limiter.mask(range(100, 200), [1] * 100, [now] * 100).sum() == 2 * 3
    assert limiter.counts(300, 2, now)  # another item
    assert limiter.mask(range(100), [3] * 100, [now + limits.NEWCOMER_MS] * 100).all()  # who came then is none now


def test_wrong_limits_are_refused():
    with pytest.raises(ValueError, match="same_item_ms"):
        CountLimits(same_item_ms=-1)
