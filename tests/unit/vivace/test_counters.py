"""Live counts: by hand, in any order, over a year, and never of the future."""

from __future__ import annotations

import numpy as np
import pytest

from vivace.contract import FIRST_ID, OOV_ID
from vivace.counters import BLOCK, LiveCounts, WindowCounts

MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
A, B, C = FIRST_ID, FIRST_ID + 1, FIRST_ID + 2
START = 1_506_826_800_000
PRECISE = 2e-5  # of the fixed-point weights


def _live(*half_lives: int, items: int = 10) -> LiveCounts:
    return LiveCounts(items, half_lives)


def _log(events: int, span_ms: int, items: int, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(FIRST_ID, items, events), START + np.sort(rng.integers(0, span_ms, events))


def test_golden_values():
    counts = _live(10 * MINUTE, HOUR)
    counts.add(np.array([A, A, B]), START + np.array([0, 10 * MINUTE, 20 * MINUTE]))
    now = START + 30 * MINUTE
    expected = [[1 / 8 + 1 / 4, 2**-0.5 + 2 ** (-1 / 3)], [1 / 2, 2 ** (-1 / 6)], [0, 0]]
    np.testing.assert_allclose(counts.at(np.array([A, B, C]), now), expected, rtol=PRECISE)
    assert counts.top(5, now, 10 * MINUTE).tolist() == [B, A]
    assert counts.top(1, now, HOUR).tolist() == [A]
    later = counts.at(np.array([A, B]), now + 10 * MINUTE)[:, 0]
    np.testing.assert_allclose(later, [3 / 16, 1 / 4], rtol=PRECISE)


def test_golden_values_of_a_window():
    counts = WindowCounts(10, HOUR)
    counts.add(np.array([A, A, B]), START + np.array([0, 10, 20]))
    assert counts.every(START)[[A, B]].tolist() == [0, 0]
    assert counts.every(START + 20)[[A, B]].tolist() == [2, 0]
    assert counts.every(START + HOUR)[[A, B]].tolist() == [2, 1]
    assert counts.top(5, START + HOUR + 1).tolist() == [A, B]
    assert counts.every(START + HOUR + 11)[[A, B]].tolist() == [0, 1]
    counts.add(np.array([C, C]), START + np.array([5, HOUR]))  # one of them late, and out of the window by now
    assert counts.every(START + HOUR + 12)[[A, B, C]].tolist() == [0, 1, 1]


def test_equal_counts_go_by_id_and_special_ids_are_not_counted():
    counts = _live(HOUR)
    counts.add(np.array([C, A, B, OOV_ID, OOV_ID]), np.full(5, START))
    assert counts.top(2, START + 1, HOUR).tolist() == [A, B]
    assert counts.at(np.array([OOV_ID]), START + 1).tolist() == [[0.0]]


def test_order_and_batches_change_no_bit():
    ids, times = _log(4000, 3 * DAY, 50)
    now, everything = START + 4 * DAY, np.arange(50)
    half_lives = (10 * MINUTE, 2 * HOUR, DAY)
    expected = LiveCounts(50, half_lives)
    expected.add(ids, times)
    answer = expected.at(everything, now)
    shuffled = np.random.default_rng(1).permutation(len(ids))
    for order, batch, ask in ((np.arange(4000), 1, False), (shuffled, 333, False), (shuffled, 333, True)):
        counts = LiveCounts(50, half_lives)
        for start in range(0, 4000, batch):
            part = order[start : start + batch]
            counts.add(ids[part], times[part])
            if ask:  # as a server does: late events and waiting ones among the others
                counts.at(everything, START + start * DAY // 2000)
        np.testing.assert_array_equal(counts.at(everything, now), answer)


def test_close_to_exact_sums():
    ids, times = _log(3000, 2 * DAY, 20)
    half_lives = (10 * MINUTE, 30 * MINUTE, DAY)
    counts = LiveCounts(20, half_lives)
    counts.add(ids, times)
    now = START + 2 * DAY
    weight = np.exp2(-(now - times)[:, None] / np.array(half_lives))
    exact = np.stack([weight[ids == i].sum(0) for i in range(20)])
    np.testing.assert_allclose(counts.at(np.arange(20), now), exact, rtol=PRECISE, atol=1e-5)


def test_a_year_neither_overflows_nor_forgets_the_newest():
    counts = _live(10 * MINUTE, DAY)
    times = START + np.arange(0, 365 * DAY, HOUR)
    for part in np.array_split(times, 100):
        counts.add(np.full(len(part), A), part)
    now = int(times[-1]) + 1
    expected = [1 / (1 - 2.0**-6), 1 / (1 - 2.0 ** (-1 / 24))]  # geometric series
    np.testing.assert_allclose(counts.at(np.array([A]), now)[0], expected, rtol=1e-4)
    assert np.isfinite(counts.at(np.array([A]), now + 3650 * DAY)).all()


def test_what_is_older_than_two_blocks_is_gone():
    counts = _live(MINUTE)
    counts.add(np.array([A, B]), np.array([0, 2 * BLOCK * MINUTE]))
    assert counts.at(np.array([A]), 2 * BLOCK * MINUTE + 1)[0, 0] == 0.0
    counts.add(np.array([A]), np.array([1]))  # late by as much
    assert counts.at(np.array([A]), 2 * BLOCK * MINUTE + 2)[0, 0] == 0.0


@pytest.mark.parametrize("ahead", [0, 1, HOUR, 50 * 365 * DAY])
def test_a_future_event_never_counts(ahead):
    now = START + HOUR
    live, window = _live(HOUR), WindowCounts(10, HOUR)
    for counts in (live, window):
        counts.add(np.array([A, B]), np.array([START, now + ahead]))
    np.testing.assert_allclose(live.at(np.array([A, B]), now)[:, 0], [1 / 2, 0], rtol=PRECISE)
    assert window.every(now)[[A, B]].tolist() == [1, 0]
    assert live.top(5, now, HOUR).tolist() == [A]
    np.testing.assert_allclose(live.at(np.array([B]), now + ahead + HOUR)[0, 0], 1 / 2, rtol=PRECISE)


def test_wrong_use_is_refused():
    counts = _live(HOUR)
    with pytest.raises(ValueError, match="a time for every item"):
        counts.add(np.array([A]), np.array([START, START]))
    with pytest.raises(ValueError, match=r"item ids of 0\.\.9"):
        counts.add(np.array([10]), np.array([START]))
    counts.at(np.array([A]), START)
    with pytest.raises(ValueError, match="must not go back"):
        counts.at(np.array([A]), START - 1)
    for wrong in ((), (0,)):
        with pytest.raises(ValueError, match="half_lives_ms"):
            LiveCounts(10, wrong)
    with pytest.raises(ValueError, match="window_ms"):
        WindowCounts(10, 0)
    with pytest.raises(ValueError, match="special ids"):
        LiveCounts(FIRST_ID, (HOUR,))


def test_the_total_is_that_of_all_items_whatever_is_forgotten_and_however_long_ago():
    """A server takes shares of it five times a second, so it is counted beside the items, not summed over them."""
    rng, half_lives_ms = np.random.default_rng(5), (1_000, 60_000)
    counts, now_ms = LiveCounts(50, half_lives_ms), 0
    for turn in range(40):
        times = now_ms + rng.integers(-30_000, 5_000, 200)
        counts.add(rng.integers(0, 50, 200), times)
        if turn % 7 == 3:
            counts.forget(np.array([turn, turn, 9]))
        now_ms += int(rng.integers(1, 60_000))
        of_items = [counts.every(now_ms, half_life).sum() for half_life in half_lives_ms]
        assert counts.totals(now_ms) == pytest.approx(of_items, rel=1e-12)
    assert counts.totals(now_ms + 10_000_000)[0] < 1e-9
