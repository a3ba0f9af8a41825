"""What is rising: by hand, of the past alone, and the same for a stream as for a log."""

from __future__ import annotations

import time

import numpy as np
import pytest

from vivace.contract import FIRST_ID, LIVE_FEATURES, LIVE_HALF_LIVES_MS, OOV_ID, PADDING_ID
from vivace.live import KEPT_MS, VISIT_GAP_MS, LiveTable, Visits, entries, load_recent, save_recent

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
    visits = Visits()
    streamed = [visits.entry(str(user), int(at)) for user, at in zip(users, times, strict=True)]
    logged = entries(users, times)
    assert logged.tolist() == streamed and 0.1 < logged.mean() < 0.9
    by_hand = entries(np.array([1, 2, 1, 1]), START + np.array([0, 0, VISIT_GAP_MS, 2 * VISIT_GAP_MS + 1]))
    assert by_hand.tolist() == [True, True, False, True]


def test_what_a_server_begins_with_counts_as_the_whole_log(tmp_path):
    rng = np.random.default_rng(7)
    times = START + np.sort(rng.integers(0, 3 * KEPT_MS, 3_000))
    ids, entry = rng.integers(FIRST_ID, 30, 3_000), rng.random(3_000) < 0.5
    save_recent(tmp_path / "recent.npz", ids, times, entry)
    kept = load_recent(tmp_path / "recent.npz")
    assert 0 < len(kept[0]) < 0.5 * len(ids)
    whole, newest = LiveTable(30, 10), LiveTable(30, 10)
    whole.add(ids, times, entry)
    newest.add(*kept)
    now = int(times[-1]) + 1
    (ids_whole, of_whole), (ids_newest, of_newest) = whole.at(now), newest.at(now)
    np.testing.assert_array_equal(ids_whole, ids_newest)
    np.testing.assert_allclose(of_whole[:, :-1], of_newest[:, :-1], atol=1e-4)
    today = times + int(time.time() * 1000) - times[-1]
    save_recent(tmp_path / "today.npz", ids, today, entry)
    late = np.append(today, 10 * today[-1])  # one event that no clock has reached makes the others no older
    save_recent(tmp_path / "late.npz", np.append(ids, FIRST_ID), late, np.append(entry, True))
    of_today, of_late = (len(load_recent(tmp_path / f"{name}.npz")[0]) for name in ("today", "late"))
    assert of_late == pytest.approx(of_today, abs=2)
    save_recent(tmp_path / "none.npz", ids[:0], times[:0], entry[:0])
    assert len(load_recent(tmp_path / "none.npz")[0]) == 0
