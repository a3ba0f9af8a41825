"""What was shown beside what was clicked: a share that clicks alone do not tell, and no item rises by it."""

from __future__ import annotations

import numpy as np
import pytest

from vivace.contract import FIRST_ID, LIVE_HALF_LIVES_MS, PADDING_ID, live_features
from vivace.limits import CountLimits
from vivace.live import LiveTable
from vivace.live_shown import ShownStream

START, MINUTE = 1_700_000_000_000, 60_000
LEVELS = len(LIVE_HALF_LIVES_MS)
OFTEN, SELDOM, NEVER = FIRST_ID, FIRST_ID + 1, FIRST_ID + 2


def _clicks(table: LiveTable, ids: np.ndarray, times: np.ndarray) -> None:
    table.add(ids, times, np.zeros(len(ids), bool))


def _rows(table: LiveTable, now: int, without: ShownStream | None = None) -> dict[int, np.ndarray]:
    ids, features = table.rows(now).of(np.empty((1, 0), np.int64), np.zeros(1, np.int64), without)
    return dict(zip(ids[0].tolist(), features[0], strict=True))


def test_of_two_items_with_the_same_clicks_the_one_that_was_shown_less_is_told_apart():
    table, now = LiveTable(10, 4, shown=True), START + 30 * MINUTE
    times = START + np.arange(20) * MINUTE
    for item in (OFTEN, SELDOM):
        _clicks(table, np.full(20, item), times)
    for item, shown in ((OFTEN, 400), (SELDOM, 40), (NEVER, 500)):
        table.add_shown(np.full(shown, item), START + np.linspace(0, 29 * MINUTE, shown).astype(np.int64))
    rows = _rows(table, now)
    assert set(rows) == {OFTEN, SELDOM, PADDING_ID}  # what is only shown does not rise
    often, seldom = rows[OFTEN], rows[SELDOM]
    assert len(often) == live_features(0, shown=True)
    clicked = len(often) - 2 * LEVELS
    np.testing.assert_array_equal(often[:clicked], seldom[:clicked])
    shown, rate = slice(clicked, clicked + LEVELS), slice(clicked + LEVELS, None)
    np.testing.assert_allclose(np.expm1(often[shown]) / np.expm1(seldom[shown]), 10, rtol=0.15)
    assert np.expm1(often[shown])[-1] == pytest.approx(400, rel=0.02)  # of 12 hours
    assert (seldom[rate] > 0).all() and (seldom[rate] - often[rate] > 0.5).all()
    assert not rows[PADDING_ID].any()


def test_any_cut_gives_the_same_bits_and_what_is_taken_out_was_never_there():
    rng, now = np.random.default_rng(3), START + 60 * MINUTE
    ids, times = rng.integers(0, FIRST_ID + 5, 800), START + rng.integers(0, 70 * MINUTE, 800)
    whole, cut, less = (LiveTable(10, 6, shown=True) for _ in range(3))
    clicked, at = rng.integers(FIRST_ID, FIRST_ID + 5, 90), START + rng.integers(0, 60 * MINUTE, 90)
    for table in (whole, cut, less):
        _clicks(table, clicked, at)
    whole.add_shown(ids, times)
    for part in np.array_split(rng.permutation(800), 7):
        cut.add_shown(ids[part], times[part])
    first, second = _rows(whole, now), _rows(cut, now)
    assert first.keys() == second.keys()
    for item, row in first.items():
        np.testing.assert_array_equal(row, second[item])
    own = rng.random(800) < 0.1
    less.add_shown(ids[~own], times[~own])
    own &= times < now
    taken = _rows(whole, now, ShownStream(np.zeros(own.sum(), np.int64), ids[own], times[own]))
    for item, row in _rows(less, now).items():
        np.testing.assert_allclose(taken[item][-2 * LEVELS : -LEVELS], row[-2 * LEVELS : -LEVELS], atol=1e-3)
        # the share of all items still has them: a tenth more is shown of each
        np.testing.assert_allclose(taken[item][-LEVELS:], row[-LEVELS:], atol=0.2)


def test_one_account_cannot_sink_an_item():
    shown = ShownStream(np.zeros(500, np.int64), np.full(500, OFTEN), START + np.arange(500) * 1000)
    assert len(shown.limited(CountLimits(same_item_ms=30 * MINUTE))) == 1
    page = ShownStream(np.zeros(40, np.int64), FIRST_ID + np.arange(40), np.full(40, START))
    assert len(page.limited(CountLimits(same_item_ms=30 * MINUTE, user_events=10))) == 40  # a page is no flood
    assert len(shown.limited(CountLimits())) == 500


def test_a_version_begins_with_what_may_count_yet(tmp_path):
    old = START - 12 * LIVE_HALF_LIVES_MS[-1] * 2
    stream = ShownStream(np.arange(3), np.array([3, 4, 5]), np.array([old, START, START + 1]))
    stream.save(tmp_path / "shown.npz")
    loaded = ShownStream.load(tmp_path / "shown.npz")
    assert loaded.ids.tolist() == [4, 5] and loaded.times_ms.tolist() == [START, START + 1]
    with pytest.raises(FileNotFoundError, match="run 'vivace compile' again"):
        ShownStream.load(tmp_path / "none.npz")
