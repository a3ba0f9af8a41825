"""What is rising: by hand, of the past alone, and the same for a stream as for a log."""

from __future__ import annotations

import time
from dataclasses import fields, replace

import numpy as np
import pytest

from vivace.contract import FIRST_ID, LIVE_FEATURES, LIVE_HALF_LIVES_MS, OOV_ID, PADDING_ID
from vivace.limits import CountLimits
from vivace.live import KEPT_MS, VISIT_GAP_MS, LiveTable, Stream, Visits, entries, order_of, previous_items
from vivace.live_moment import HALF_LIFE_MS, PairCounts

MINUTE = 60_000
A, B, C = FIRST_ID, FIRST_ID + 1, FIRST_ID + 2
START = 1_506_826_800_000
LEVELS = len(LIVE_HALF_LIVES_MS)


def test_golden_values():
    table = LiveTable(10, 4)
    table.add(np.array([A, B, B]), START + np.array([0, 10, 20]) * MINUTE, np.array([True, False, True]))
    ids, features = table.at(START + 30 * MINUTE)
    assert ids.tolist() == [B, A, PADDING_ID, PADDING_ID]
    of_b, of_a = features[0], features[1]
    ten = LIVE_HALF_LIVES_MS.index(10 * MINUTE)
    assert np.expm1(of_b[ten]) == pytest.approx(1 / 4 + 1 / 2, abs=1e-4)
    assert np.expm1(of_a[ten]) == pytest.approx(1 / 8, abs=1e-4)
    assert np.expm1(of_b[LEVELS + ten]) == pytest.approx(1 / 2, abs=1e-4)  # of entries, the newest alone
    assert of_b[2 * LEVELS + ten] == pytest.approx(np.log((3 / 4 + 0.1) / (7 / 8 + 1)), abs=1e-4)
    assert of_b[-1] == pytest.approx(np.log1p(20.0))  # minutes since its first click
    assert features.shape == (4, LIVE_FEATURES) and not features[2:].any()


def test_the_future_and_the_cut_into_batches_change_nothing():
    rng = np.random.default_rng(3)
    ids, times = rng.integers(OOV_ID, 40, 900), START + np.sort(rng.integers(0, 240 * MINUTE, 900))
    entry, now = rng.random(900) < 0.4, START + 200 * MINUTE
    past = times < now
    whole, cut = LiveTable(40, 8), LiveTable(40, 8)
    whole.add(ids[past], times[past], entry[past])
    for part in np.array_split(np.arange(900), 7):  # those of the future wait
        cut.add(ids[part], times[part], entry[part])
    for expected, got in zip(whole.at(now), cut.at(now), strict=True):
        np.testing.assert_array_equal(expected, got)


def test_a_stream_has_the_visits_of_its_log():
    rng = np.random.default_rng(5)
    users, times = rng.integers(0, 9, 400), START + np.sort(rng.integers(0, 600 * MINUTE, 400))
    visits, ids = Visits(), rng.integers(FIRST_ID, 40, 400)
    streamed = [visits.entry(str(u), int(at), int(i)) for u, at, i in zip(users, times, ids, strict=True)]
    logged = entries(users, times)
    assert logged.tolist() == [begins for begins, _ in streamed] and 0.1 < logged.mean() < 0.9
    assert previous_items(users, ids, logged).tolist() == [before for _, before in streamed]
    by_hand = entries(np.array([1, 2, 1, 1]), START + np.array([0, 0, VISIT_GAP_MS, 2 * VISIT_GAP_MS + 1]))
    assert by_hand.tolist() == [True, True, False, True]


def test_what_a_server_begins_with_counts_as_the_whole_log(tmp_path):
    rng = np.random.default_rng(7)
    times = START + np.sort(rng.integers(0, 3 * KEPT_MS, 3_000))
    ids, entry = rng.integers(FIRST_ID, 30, 3_000), rng.random(3_000) < 0.5
    context, previous = rng.integers(1, 6, (3_000, 2)), rng.integers(0, 30, 3_000)
    log = Stream(ids, times, entry, context, previous)
    log.save(tmp_path / "recent.npz")
    kept = Stream.load(tmp_path / "recent.npz")
    assert 0 < len(kept) < 0.5 * len(ids) and kept.entry.dtype == bool
    whole, newest = LiveTable(30, 10, 2), LiveTable(30, 10, 2)
    log.into(whole)
    kept.into(newest)
    now = int(times[-1]) + 1
    (ids_whole, of_whole), (ids_newest, of_newest) = whole.at(now), newest.at(now)
    np.testing.assert_array_equal(ids_whole, ids_newest)
    np.testing.assert_allclose(of_whole[:, :-1], of_newest[:, :-1], atol=1e-4)
    moments = [(np.array([[3, 4]]), np.array([FIRST_ID])), (np.array([[1, 1]]), np.array([PADDING_ID]))]
    for context_BC, newest_B in moments:
        (ids_a, a), (ids_b, b) = (table.rows(now).of(context_BC, newest_B) for table in (whole, newest))
        np.testing.assert_array_equal(ids_a, ids_b)
        np.testing.assert_allclose(a[..., LIVE_FEATURES:], b[..., LIVE_FEATURES:], atol=1e-4)
    today = replace(log, times_ms=times + int(time.time() * 1000) - times[-1])
    today.save(tmp_path / "today.npz")
    # one event that no clock has reached makes the others no older
    late = Stream(*(np.append(getattr(today, f.name), getattr(today, f.name)[-1:], 0) for f in fields(Stream)))
    replace(late, times_ms=np.append(today.times_ms, 10 * today.times_ms[-1])).save(tmp_path / "late.npz")
    of_today, of_late = (len(Stream.load(tmp_path / f"{name}.npz")) for name in ("today", "late"))
    assert of_late == pytest.approx(of_today, abs=2)
    log[:0].save(tmp_path / "none.npz")
    assert len(Stream.load(tmp_path / "none.npz")) == 0


def test_the_future_of_a_log_changes_nothing_of_what_counts_before_it():
    """A log that is cut, as it is where no request comes after: the same events, visits and items before."""
    rng = np.random.default_rng(13)
    users, ids, context = rng.integers(0, 80, 900), rng.integers(OOV_ID, 20, 900), rng.integers(1, 5, (900, 2))
    times, seen = START + np.sort(rng.integers(0, 90 * MINUTE, 900)), START + rng.integers(0, 90 * MINUTE, 60)
    limits = CountLimits(10 * MINUTE, user_events=4, minute_events=3, newcomers=0.2)
    shown = rng.permutation(80)[:60], seen
    log = (users, ids, times, context)
    whole, cut = (Stream.of(*(column[:stop] for column in log), limits, shown) for stop in (900, 700))
    assert 100 < len(cut) < 650 and len(whole) > len(cut)
    for name in (f.name for f in fields(Stream)):
        np.testing.assert_array_equal(getattr(whole, name)[: len(cut)], getattr(cut, name))


def test_counts_by_context_and_after_an_item_are_those_counted_by_hand():
    rng = np.random.default_rng(11)
    ids, times = rng.integers(FIRST_ID, 60, 4_000), START + np.sort(rng.integers(0, 90 * MINUTE, 4_000))
    context, previous = rng.integers(1, 5, (4_000, 2)), rng.integers(0, 60, 4_000)
    pairs, now, items = PairCounts(2), START + 80 * MINUTE, np.arange(FIRST_ID, 60)
    for part in np.array_split(np.arange(4_000), 5):
        pairs.add(ids[part], times[part], context[part], previous[part])
    pairs.count(now)
    past = times < now
    weight = np.exp2((times - now) / HALF_LIFE_MS) * past

    def by_hand(with_value: np.ndarray) -> np.ndarray:
        counts = np.bincount(ids[with_value], weight[with_value], minlength=60)[FIRST_ID:]
        return np.stack([np.log1p(counts), np.log((counts + 0.1) / (weight[with_value].sum() + 1))], 1)

    for kind, value, rows in ((0, 3, context[:, 0] == 3), (1, 3, context[:, 1] == 3), (2, 7, previous == 7)):
        features = pairs.features(np.array([kind]), np.array([value]), items, now)
        np.testing.assert_allclose(features[0], by_hand(rows), atol=1e-3)


def test_each_context_has_an_order_of_its_own():
    """What is clicked on phones comes first on phones; features stay with their items."""
    table, minute = LiveTable(12, 4, 1), START + MINUTE
    ids = np.array([A] * 6 + [B] * 5)
    phone, desktop = 3, 4
    context = np.where(ids == B, phone, desktop)[:, None]
    Stream(ids, np.full(11, START), np.ones(11, bool), context, np.full(11, C)).into(table)
    rows = table.rows(minute)
    both = np.array([[phone], [desktop], [1]])
    ids_BM, features = rows.of(both, np.array([C, C, PADDING_ID]))
    assert ids_BM[:, :2].tolist() == [[B, A], [A, B], [A, B]]
    for row in range(3):
        alone_ids, alone = rows.of(both[row : row + 1], np.array([C, C, PADDING_ID])[row : row + 1])
        np.testing.assert_array_equal(alone_ids[0], ids_BM[row])
        np.testing.assert_array_equal(alone[0], features[row])
    of_b = features[0, 0]
    assert np.expm1(of_b[LIVE_FEATURES]) == pytest.approx(5, abs=0.2)  # on phones
    assert np.expm1(features[0, 1, LIVE_FEATURES]) == pytest.approx(0, abs=1e-6)  # A was never clicked there
    assert np.expm1(of_b[-2]) == pytest.approx(5, abs=0.2) and not features[2, :, -2:].any()  # after C; after nothing


def test_a_fresh_item_is_counted_as_any_other_and_changes_nothing_of_the_others(monkeypatch):
    """The events of one item of a log, sent under a fresh id: the same numbers, in every context."""
    monkeypatch.setattr("vivace.live.MAX_FRESH", 3)
    rng, v, slot = np.random.default_rng(2), 40, 700
    ids, times = rng.integers(FIRST_ID, v, 900), START + np.sort(rng.integers(0, 90 * MINUTE, 900))
    users, now = rng.integers(0, 60, 900), int(times[-1]) + 1
    log = Stream.of(users, ids, times, rng.integers(1, 5, (900, 2)))
    known, with_fresh = LiveTable(v, 40, 2), LiveTable(v, 40, 2, fresh=2)
    log.into(known)
    ids, previous = (np.where(x == A, v + slot, x) for x in (log.ids, log.previous))
    moved = replace(log, ids=ids, previous=previous)
    for part in np.array_split(np.arange(900), 6):
        moved[part].into(with_fresh)
    context, newest = np.array([[3, 4]]), np.array([C])
    expected, (of_known, of_fresh) = known.rows(now), with_fresh.moment(now)
    expected_ids, numbers = (x[0] for x in expected.of(context, newest))
    fresh_ids, fresh_numbers = (x[0] for x in of_fresh.of(context, newest))
    assert fresh_ids.tolist() == [v + slot, PADDING_ID] and not fresh_numbers[1].any()
    np.testing.assert_array_equal(fresh_numbers[0], numbers[expected_ids.tolist().index(A)])
    ids_left, numbers_left = (x[0] for x in of_known.of(context, newest))
    left = (expected_ids != A) & (expected_ids != PADDING_ID)
    np.testing.assert_array_equal(ids_left[: left.sum()], expected_ids[left])
    np.testing.assert_array_equal(numbers_left[: left.sum()], numbers[left])
    assert np.all(np.diff(order_of(numbers_left, 2)[: left.sum()]) <= 1e-6) and order_of(fresh_numbers, 2)[1] == 0
    after = [x[0] for x in of_known.of(context, np.array([v + slot]))][1]  # what came after the fresh item
    np.testing.assert_array_equal(after[: left.sum(), -2:], expected.of(context, np.array([A]))[1][0][left][:, -2:])


def test_the_fresh_item_that_was_counted_first_gives_up_its_place(monkeypatch):
    monkeypatch.setattr("vivace.live.MAX_FRESH", 2)
    table, one = LiveTable(10, 4, fresh=2), np.ones(1, bool)
    for n, slot in enumerate([5, 6, 5, 9]):
        table.add(np.array([10 + slot]), np.array([START + n * MINUTE]), one)
        rows = table.moment(START + n * MINUTE + 1)[1]
    assert rows.ids.tolist() == [19, 16]
    of_new = rows.base[0]
    assert np.expm1(of_new[LEVELS - 1]) == pytest.approx(1, abs=1e-3)  # not the two of the item that it follows
    assert of_new[-1] == pytest.approx(np.log1p(1 / 60_000))
