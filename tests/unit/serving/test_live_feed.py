"""What a server counts: the prepared log's newest events, then the store's log, whatever clock and store do."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import groupby
from operator import itemgetter

import numpy as np
import pytest

from serving.runtime.live_feed import LiveFeed
from vivace.contract import FIRST_ID, LIVE_FEATURES, OOV_ID, PADDING_ID, StageTensors
from vivace.limits import FREE, CountLimits
from vivace.live import LiveTable, Stream
from vivace.live_shown import RECENT_SHOWN, ShownStream
from vivace.store.interface import Change, Event
from vivace.store.lmdb_store import LmdbStore

SHAPES = StageTensors(history=8, candidates=4, items=FIRST_ID + 6, width=4, rising=4)
HOUR = 3_600_000
MINUTE = 60_000


def _ids(items):
    return np.array([FIRST_ID + int(i) if i.isdigit() and int(i) < 6 else OOV_ID for i in items])


@pytest.fixture
def store(tmp_path):
    opened = LmdbStore(tmp_path / "store")
    opened.fill([], [])
    yield opened
    opened.close()


def _feed(tmp_path, store, prepared: list[tuple[int, int]]) -> LiveFeed:
    ids, times = np.array([i for i, _ in prepared], np.int64), np.array([t for _, t in prepared], np.int64)
    Stream.of(np.arange(len(ids)), ids, times, np.empty((len(ids), 0), np.int64)).save(tmp_path / "recent.npz")
    return LiveFeed(tmp_path / "recent.npz", store, _ids, SHAPES, start=False)


def test_it_goes_on_where_the_prepared_log_ends(tmp_path, store):
    now = int(time.time() * 1000) + 60_000  # the feed has looked at its start: later than that
    prepared = [(FIRST_ID, now - HOUR)]
    store.append(
        [Event("a", "0", "", now - HOUR), Event("a", "1", "", now - 60_000), Event("b", "x", "", now - 50_000)]
    )
    feed = _feed(tmp_path, store, prepared)
    store.append([Event("c", "1", "", now - 40_000), Event("c", "2", "", now - 30_000)])
    feed.refresh(now)
    expected = LiveTable(SHAPES.items, SHAPES.rising)  # the first event came with the data, x is no item
    expected.add(
        np.array([FIRST_ID, FIRST_ID + 1, FIRST_ID + 1, FIRST_ID + 2]),
        now - np.array([HOUR, 60_000, 40_000, 30_000]), np.array([True, True, True, False]),
    )  # fmt: skip
    ids, features = feed.rows(None, np.array([FIRST_ID + 1, PADDING_ID]))
    for got, rows in zip(expected.at(now), (ids, features[..., :LIVE_FEATURES]), strict=True):
        np.testing.assert_array_equal(rows, np.stack([got, got]))
    # of the feed's visits one went on, from 1 to 2: 30 s ago
    assert np.expm1(features[0, 1, -2]) == pytest.approx(1, abs=0.02) and not features[0, [0, 2, 3], -2].any()
    assert not features[1, :, -2:].any()
    assert ids[0].tolist() == [FIRST_ID + 1, FIRST_ID + 2, FIRST_ID, 0]


def test_one_account_counts_no_more_live_than_in_a_replay(tmp_path, store):
    """A server's counters and those that training replays hold back the same of a log with a hostile account."""
    now, rng = int(time.time() * 1000) + 60_000, np.random.default_rng(4)
    honest = [(f"u{rng.integers(20)}", int(rng.integers(6)), int(now - rng.integers(HOUR))) for _ in range(200)]
    hostile = [("mallory", 2, now - 50 - 200 * n) for n in range(300)] + [("mallory", n % 6, now - n) for n in range(9)]
    log = sorted(honest + hostile, key=lambda event: event[2])
    users, items, times = zip(*log, strict=True)
    names = {user: n for n, user in enumerate(sorted(set(users)))}
    whose, ids, times = np.array([names[u] for u in users]), FIRST_ID + np.array(items), np.array(times)
    none = np.empty((0, 0), np.int64)
    features = {}
    for name, limits in (("limited", CountLimits(HOUR // 2, 5)), ("open", CountLimits())):
        Stream.of(*(np.empty(0, np.int64),) * 3, none).save(tmp_path / f"{name}.npz")
        server = LmdbStore(tmp_path / name)
        server.fill([], [])
        server.append([Event(u, str(i), "", int(t)) for u, i, t in zip(users, items, times, strict=True)])
        shapes = replace(SHAPES, same_item_s=limits.same_item_ms // 1000, user_events=limits.user_events)
        feed = LiveFeed(tmp_path / f"{name}.npz", server, _ids, shapes, start=False)
        feed.refresh(now)
        features[name] = feed.rows(None, np.zeros(1, np.int64))
        server.close()
        table = LiveTable(SHAPES.items, SHAPES.rising)
        Stream.of(whose, ids, times, np.empty((len(ids), 0), np.int64), limits).into(table)
        for replayed, live in zip(table.at(now), features[name], strict=True):
            np.testing.assert_array_equal(live[0][..., : replayed.shape[-1]], replayed)
    pushed = FIRST_ID + 2
    assert features["open"][0][0, 0] == pushed
    counts = {name: np.expm1(rows[1][0, rows[0][0] == pushed, 4]) for name, rows in features.items()}
    assert counts["open"] > 300 and counts["limited"] < 60  # of 12 hours; 200 honest events fall on six items


def test_what_is_shown_counts_live_as_in_a_replay(tmp_path, store):
    """The same bits of an item's rates from a version's beginning and the store's log as of one replay of both."""
    now, rng = int(time.time() * 1000) + 60_000, np.random.default_rng(5)
    shapes, limits = replace(SHAPES, shown=True, same_item_s=1800), CountLimits(HOUR // 2)
    log = sorted(
        (now - int(rng.integers(1, 2 * HOUR)), int(rng.integers(12)), int(rng.integers(7)), bool(rng.random() < 0.8))
        for _ in range(400)
    )
    log += [(now - 900 + n, 99, 4, True) for n in range(300)]  # one account that looks at one item all the time
    times, users, items, shown = (np.array(column) for column in zip(*log, strict=True))
    prepared = times < now - HOUR  # an item's id of 6 is none of the catalogue's
    ids, users = _ids(items.astype(str)), users + np.where(prepared, 1000, 0)  # as limits begin anew with a server
    whole = ShownStream(users, ids, times)[shown]
    clicks = [(x[~shown]) for x in (users, ids, times)]
    stream = Stream.of(*clicks, np.empty(((~shown).sum(), 0), np.int64), limits)
    stream[stream.times_ms < now - HOUR].save(tmp_path / "recent.npz")
    whole[whole.times_ms < now - HOUR].limited(limits).save(tmp_path / RECENT_SHOWN)
    store.append([
        Event(f"u{u}", str(i), "seen" if s else "click", int(t), shown=bool(s))
        for t, u, i, s in zip(times, users, items, shown, strict=True) if t >= now - HOUR
    ])  # fmt: skip
    assert store.histories(["u99"]) == [None]
    feed = LiveFeed(tmp_path / "recent.npz", store, _ids, shapes, start=False)
    feed.refresh(now)
    expected = LiveTable(SHAPES.items, SHAPES.rising, shown=True)
    stream.into(expected)
    known = whole[whole.ids >= FIRST_ID].limited(limits)
    expected.add_shown(known.ids, known.times_ms)
    rows = expected.rows(now).of(np.empty((1, 0), np.int64), np.zeros(1, np.int64))
    for got, replayed in zip(feed.rows(None, np.zeros(1, np.int64)), rows, strict=True):
        np.testing.assert_array_equal(got, replayed)
    counts = dict(zip(rows[0][0].tolist(), np.expm1(rows[1][0, :, -6]), strict=True))  # shown in 12 hours
    assert all(20 < count < 60 for count in counts.values()), counts


def test_what_no_person_sends_is_in_its_history_and_counts_for_nobody_else(tmp_path, store):
    """By the log, which every server reads: whichever of them took an event."""
    now = int(time.time() * 1000)
    Stream.of(*(np.empty(0, np.int64),) * 3, np.empty((0, 0), np.int64)).save(tmp_path / "recent.npz")
    store.append([Event("mallory", str(n % 3), "", now - 3_600_000 * n) for n in range(9)])
    store.append([Event("mallory", "4", "", now), Event("eve", "5", "", now + HOUR), Event("ann", "3", "", now - 5)])
    feed = LiveFeed(tmp_path / "recent.npz", store, _ids, replace(SHAPES, minute_events=3), start=False)
    feed.refresh(now + 2 * HOUR)
    assert sorted(feed.rows(None, np.zeros(1, np.int64))[0][0].tolist()) == [FIRST_ID + n for n in range(4)]
    assert np.expm1(feed._table.at(now + 2 * HOUR)[1][:, 3]).max() < 1.1  # of mallory's nine, one an item
    assert store.histories(["mallory", "eve"]) == [[str(n % 3) for n in range(9)] + ["4"], ["5"]]


def test_who_has_a_history_is_no_newcomer_whatever_its_events_claim(tmp_path, store):
    """Nor do events of long ago, or of items that nobody knows, make an account an old one."""
    now = int(time.time() * 1000)
    store.fill([(f"old {n}", ["0"], [""], [now - 9 * HOUR]) for n in range(20)], [])
    with_prepared = [(FIRST_ID, now - HOUR)]
    store.append([Event(f"new {n}", item, "", now - 5 * HOUR) for n in range(20) for item in "0x"])
    ids, times = np.array([i for i, _ in with_prepared]), np.array([t for _, t in with_prepared])
    Stream.of(np.zeros(1, np.int64), ids, times, np.empty((1, 0), np.int64)).save(tmp_path / "recent.npz")
    feed = LiveFeed(tmp_path / "recent.npz", store, _ids, replace(SHAPES, newcomers=1.0), start=False)
    store.append([Event(f"other {n}", "x", "", now) for n in range(20)])
    feed.refresh(now)
    store.append([Event(f"{kind} {n}", "1", "", now) for kind in ("new", "other") for n in range(20)])
    store.append([Event(f"old {n}", "2", "", now) for n in range(20)])
    feed.refresh(now + 1_000)
    rising, features = feed.rows(None, np.zeros(1, np.int64))
    counts = dict(zip(rising[0].tolist(), np.expm1(features[0, :, 4]).round().tolist(), strict=True))  # of 12 hours
    assert counts[FIRST_ID + 2] == 20 and counts[FIRST_ID + 1] == FREE


def test_newcomers_count_no_more_live_than_in_a_replay(tmp_path, store, monkeypatch):
    """Who came first is told by all events of the log, in training as beside a server: by those of items that nobody
    knows, by impressions, and by those that are suspect."""
    rng, now = np.random.default_rng(6), int(time.time() * 1000) + HOUR  # the feed has looked at its start
    shapes = replace(SHAPES, newcomers=0.5, same_item_s=600, minute_events=3)
    log = {(now - 4 * MINUTE * int(rng.integers(10, 30)), n, "x" if n % 2 else "0", n % 2 == 0) for n in range(90)}
    log |= {(now - HOUR, 90 + n // 4, f"x{n}", False) for n in range(40)}  # four in a minute are suspect
    clicks = zip(*(rng.integers(*of, 200).tolist() for of in ((1, 20), (0, 130), (0, 3))), strict=True)
    log = sorted(log | {(now - MINUTE * at, user, str(item), False) for at, user, item in clicks})
    for at, events in groupby(log, itemgetter(0)):
        monkeypatch.setattr("vivace.store.lmdb_store._now_ms", lambda at=at: at)
        store.append([Event(f"u{user}", item, "seen" if shown else "click", at, shown=shown)
                      for _, user, item, shown in events])  # fmt: skip
    Stream.of(*(np.empty(0, np.int64),) * 3, np.empty((0, 0), np.int64)).save(tmp_path / "recent.npz")
    feed = LiveFeed(tmp_path / "recent.npz", store, _ids, shapes, start=False)
    feed.refresh(now)
    times, users, items, shown = (np.array(column) for column in zip(*log, strict=True))
    clicks = (users[~shown], _ids(items[~shown]), times[~shown], np.empty(((~shown).sum(), 0), np.int64))
    counts = []
    for seen in ((users[shown], times[shown]), None):
        table = LiveTable(SHAPES.items, SHAPES.rising)
        Stream.of(*clicks, CountLimits.of(shapes), seen).into(table)
        counts.append(table.at(now))
    for replayed, live in zip(counts[0], feed.rows(None, np.zeros(1, np.int64)), strict=True):
        np.testing.assert_array_equal(live[0][..., : replayed.shape[-1]], replayed)
    assert np.expm1(counts[0][1][:, 4]).sum() > np.expm1(counts[1][1][:, 4]).sum() + 5  # what impressions say matters


def test_a_clock_that_is_set_back_stops_nothing(tmp_path, store):
    now = int(time.time() * 1000) + HOUR
    feed = _feed(tmp_path, store, [])
    feed.refresh(now)
    store.append([Event("a", "3", "", now - 2 * HOUR)])
    feed.refresh(now - HOUR)
    assert feed.rows(None, np.zeros(1, np.int64))[0][0, 0] == FIRST_ID + 3


def test_no_answer_outlives_the_counts_that_it_went_by(tmp_path, store, monkeypatch):
    feed, other = _feed(tmp_path, store, []), _feed(tmp_path, store, [])
    before, meanwhile = feed.epoch, list[str]()
    assert before == feed.epoch != other.epoch  # no two processes count at the same moment
    count = feed._table.moment
    monkeypatch.setattr(feed._table, "moment", lambda now_ms: (meanwhile.append(feed.epoch), count(now_ms))[1])
    feed.refresh()
    assert len({before, *meanwhile, feed.epoch}) == 3


def test_old_counts_are_said_to_be_old(tmp_path, store, monkeypatch):
    feed = _feed(tmp_path, store, [])
    feed.error = "OSError: no such store"
    assert feed.status() == ""  # a moment's trouble
    later = time.monotonic() + 60
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert "live counts are" in feed.status() and "no such store" in feed.status()


def test_a_version_without_its_events_is_refused(tmp_path, store):
    with pytest.raises(FileNotFoundError, match="vivace compile"):
        LiveFeed(tmp_path / "none.npz", store, _ids, SHAPES, start=False)


def test_a_long_log_is_read_from_its_end(store):
    store.append([Event(f"u{n}", str(n % 6), "", 1_000 + n) for n in range(50)])
    number, events = store.live_events(0, most=7)
    assert [e.timestamp_ms for e in events] == list(range(1_043, 1_050))
    assert store.live_events(number) == (number, [])
    assert [e.user_id for e in store.live_events(number - 2)[1]] == ["u48", "u49"]
    assert store.live_events(0, since_ms=int(time.time() * 1000) + HOUR)[1] == []


def test_after_a_refresh_the_log_is_counted_behind_the_last_event_that_it_took(tmp_path, store):
    """By the number, not the time: one that came late counts, one of the future is not counted twice."""
    now = int(time.time() * 1000) + 60_000
    times = [now - HOUR, now + HOUR]  # both in the prepared log since the refresh, the second ahead of the clock
    store.append([Event("a", "0", "", times[0]), Event("b", "1", "", times[1])])
    stream = Stream.of(np.arange(2), FIRST_ID + np.arange(2), np.array(times), np.empty((2, 0), np.int64))
    stream.save(tmp_path / "recent.npz", number=2)
    feed = LiveFeed(tmp_path / "recent.npz", store, _ids, SHAPES, start=False)
    store.append([Event("c", "2", "", now - 2 * HOUR)])
    feed.refresh(now + 2 * HOUR)
    expected = LiveTable(SHAPES.items, SHAPES.rising)
    expected.add(FIRST_ID + np.arange(3), np.array([*times, now - 2 * HOUR]), np.ones(3, bool))
    ids, features = feed.rows(None, np.array([PADDING_ID]))
    for got, rows in zip(expected.at(now + 2 * HOUR), (ids, features[..., :LIVE_FEATURES]), strict=True):
        np.testing.assert_array_equal(rows[0], got)


def test_items_that_were_put_in_since_are_counted_by_their_slots(tmp_path, store):
    shapes = replace(SHAPES, fresh=4, rising_fresh=2)
    now = int(time.time() * 1000) + 60_000
    Stream.of(*(np.empty(0, np.int64),) * 3, np.empty((0, 0), np.int64)).save(tmp_path / "recent.npz")
    feed = LiveFeed(tmp_path / "recent.npz", store, _ids, shapes, start=False)
    *_, slots, features = feed.rows(None, np.array([PADDING_ID]))
    assert not slots.any() and not features.any()
    first, second = store.change_catalogue([Change("new", "{}"), Change("newer", "{}")])
    store.append([Event("a", "newer", "", now - 9_000), Event("b", "new", "", now - 8_000)])
    store.append([Event("a", "3", "", now - 7_000), Event("c", "new", "", now - 6_000), Event("c", "x", "", now - 5)])
    feed.refresh(now)
    ids, _, slots, features = feed.rows(None, np.array([shapes.items + second.slot]))
    assert slots.tolist() == [[first.slot, second.slot]] and ids[0].tolist() == [FIRST_ID + 3, 0, 0, 0]
    assert np.expm1(features[0, :, 4]).round(2).tolist() == [2, 1]
    assert feed.rows(None, np.array([shapes.items + second.slot]))[1][0, 0, -2] > 0  # 3 came after it
