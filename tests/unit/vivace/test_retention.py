"""What a store forgets, and that it stops growing: events sent twice, events and users that age out, a full map."""

from __future__ import annotations

import json

import pytest

from vivace.store import lmdb_store
from vivace.store.interface import Event
from vivace.store.lmdb_store import LmdbStore
from vivace.store.retention import DAY_MS, SETTINGS, Retention


@pytest.fixture
def clock(monkeypatch):
    """What the store takes for now, in days."""
    now = {"days": 20_000}
    monkeypatch.setattr(lmdb_store, "_now_ms", lambda: now["days"] * DAY_MS)
    return now


@pytest.fixture
def opened(tmp_path):
    """Opens the store, again if it is called again."""
    stores = []

    def open_store(**retention) -> LmdbStore:
        for store in stores:
            store.close()
        stores[:] = [LmdbStore(tmp_path / "store", retention=Retention(**retention) if retention else None)]
        return stores[0]

    yield open_store
    stores[-1].close()


def swept(store: LmdbStore) -> int:
    """Sweeps to the end; how many transactions that took."""
    turns = 1
    while store.sweep():
        turns += 1
    return turns


def sent(user: str, item: str, event_id: str) -> Event:
    return Event(user, item, "view", 1, event_id)


def test_an_event_that_is_sent_again_is_stored_once(opened):
    store = opened()
    assert store.append([sent("u", "a", "1"), sent("u", "b", "2")]) == {"u": 2}
    assert store.append([sent("u", "a", "1")]) == {"u": 2}
    assert store.append([sent("u", "c", "3"), sent("u", "c", "3")]) == {"u": 3}  # twice in one batch
    assert store.append([sent("v", "a", "1")]) == {"v": 1}  # another user's event of the same name
    assert store.append([Event("u", "d"), Event("u", "d")]) == {"u": 5}  # events without a name are all new
    store = opened()  # after a restart
    assert store.append([sent("u", "b", "2")]) == {"u": 5}
    store.fill([("u", ["x"], [""], [1])], [])  # under another data set
    assert store.append([sent("u", "b", "2")]) == {"u": 6}
    assert store.histories(["u", "v"]) == [["x", "a", "b", "c", "d", "d"], ["a"]]


def test_ids_age_out_with_their_events(opened):
    store = opened(live_events=3)
    store.append([sent("u", str(n), str(n)) for n in range(3)])
    assert store.append([sent("u", "0", "0")]) == {"u": 3}
    store.append([sent("u", "3", "3")])
    assert store.append([sent("u", "2", "2")]) == {"u": 4}  # known still
    assert store.append([sent("u", "0", "0")]) == {"u": 5}  # aged out
    assert entries(store, b"ids") == entries(store, b"log") == 3


def entries(store: LmdbStore, database: bytes) -> int:
    with store._env.begin() as transaction:
        return transaction.stat(store._databases[database])["entries"]


def test_users_without_an_event_left_go_and_those_of_the_data_set_stay(opened):
    store = opened(live_events=4)
    store.fill([("of data", ["a"], [""], [1])], [])
    store.append([Event("of data", "b")])
    store.append([Event("stranger", "a")])
    for n in range(4):
        store.append([Event("regular", str(n))])
    assert store.histories(["of data", "stranger"]) == [["a", "b"], None]
    assert store.append([Event("stranger", "c")]) == {"stranger": 1}  # new again
    store.fill([("of data", ["z"], [""], [1])], [])  # what aged out does not join the next data set
    assert store.histories(["of data", "regular"]) == [["z"], ["1", "2", "3"]]


def test_what_is_old_goes_by_days(opened, clock):
    store = opened(days=30)
    store.fill([("idle", ["a"], [""], [1]), ("active", ["a"], [""], [1])], [])
    store.append([Event("stranger", "a", "", 1)])  # its own time is no matter, when it came is
    clock["days"] += 20
    store.append([Event("active", "b"), Event("newcomer", "b")])
    assert swept(store) == 1 and store.histories(["idle", "stranger"]) == [["a"], ["a"]]
    clock["days"] += 11
    swept(store)
    assert store.histories(["idle", "stranger", "active", "newcomer"]) == [None, None, ["a", "b"], ["b"]]
    clock["days"] += 20
    swept(store)
    assert store.histories(["active"]) == [None]
    clock["days"] += 1_000
    store = opened(days=0)
    swept(store)
    assert store.histories(["newcomer"]) == [["b"]]  # by no days at all nothing goes


def test_a_sweep_takes_short_turns_and_ends(opened, clock, monkeypatch):
    monkeypatch.setattr(lmdb_store, "SWEEP_ROWS", 10)
    store = opened(days=30)
    store.fill([(f"idle {n:02}", ["a"], [""], [1]) for n in range(45)], [])
    store.append([Event(f"u {n:02}", "a") for n in range(45)])
    clock["days"] += 31
    store.append([Event("newest", "a")])
    assert swept(store) == 5  # ten of each kind at a time
    assert list(store.users()) == ["newest"] and entries(store, b"log") == 1
    assert swept(store) == 1  # nothing is left
    assert store.append([Event("newest", "b")]) == {"newest": 2}


def test_a_store_stops_growing(opened):
    """Strangers with one event each, for ever: pages are used again."""
    store, sizes = opened(live_events=500), []
    for turn in range(60):
        store.append([sent(f"stranger {turn} {n}", "item", f"{turn} {n}") for n in range(100)])
        sizes.append(store._env.info()["last_pgno"])
    assert (
        entries(store, b"log") == 500 == entries(store, b"users") == entries(store, b"marks") == entries(store, b"ids")
    )
    assert max(sizes[30:]) <= max(sizes[:30]), sizes


def test_a_fill_leaves_out_users_who_aged_out_under_it(opened):
    store = opened(live_events=3)
    store.append([Event("leaves", "a"), Event("stays", "b")])

    def rows():
        yield "of data", ["a"], [""], [1]
        store.append([Event("late", "c"), Event("late", "d")])

    store.fill(rows(), [])
    assert store.histories(["leaves", "stays", "late", "of data"]) == [None, ["b"], ["c", "d"], ["a"]]


def test_events_of_before_there_were_ids_are_read(opened, clock):
    import msgpack

    store = opened(days=30)
    with store._env.begin(write=True) as transaction:
        record = msgpack.packb(["u", "a", "view", 5])
        transaction.put((1).to_bytes(8, "big"), record, db=store._databases[b"log"])
    store.append([Event("u", "b")])
    store.fill([], [])
    assert store.histories(["u"]) == [["a", "b"]]
    assert swept(store) == 1 and store.histories(["u"]) == [["a", "b"]]
    clock["days"] += 31
    store.append([Event("v", "b")])
    swept(store)
    assert store.histories(["u", "v"]) == [None, ["b"]]


def test_a_full_map_grows_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(lmdb_store, "MAP_SIZE_BYTES", 1 << 18)
    store = LmdbStore(tmp_path / "store")
    for n in range(200):
        assert store.append([Event(f"user {n}", "item" * 200)]) == {f"user {n}": 1}
    assert store._env.info()["map_size"] > 1 << 18
    assert all(store.histories([f"user {n}" for n in range(200)]))
    store.close()


@pytest.mark.parametrize(
    "settings", [{"days": -1}, {"days": "30"}, {"live_events": 0}, {"weeks": 3}, [1], {"days": True}]
)
def test_settings_that_are_none_are_refused_with_their_file(tmp_path, settings):
    (tmp_path / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=SETTINGS):
        LmdbStore(tmp_path)


def test_settings_beside_the_store_hold(tmp_path):
    (tmp_path / SETTINGS).write_text('{"live_events": 2}')
    store = LmdbStore(tmp_path)
    store.append([Event("u", "a"), Event("v", "b")])
    store.append([Event("w", "c")])
    assert store.histories(["u", "v", "w"]) == [None, ["b"], ["c"]]
    store.close()
