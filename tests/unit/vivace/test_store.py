"""The feature store: histories and titles, readers in other processes, fills from a data set under live appends."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import lmdb
import msgpack
import pytest

from vivace.store.histories import MAX_STORED_EVENTS, merged
from vivace.store.history_rows import FILL_ROWS
from vivace.store.interface import Event
from vivace.store.lmdb_store import MAX_READERS, LmdbStore

SPAWN = get_context("spawn")


def events(*pairs: tuple[str, int]) -> list[Event]:
    return [Event("u", item, "view", time) for item, time in pairs]


def items(history: list[Event]) -> str:
    return " ".join(e.item_id for e in history)


# -- one history of two ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("live", "expected"),
    [
        ([("x", 9_000)], "a b c x"),  # newer than all
        ([("x", 1_500), ("y", 9_000)], "a x b c y"),  # older than some: at its time
        ([("y", 9_000), ("x", 1_500)], "a b c y x"),  # live events keep their order
        ([("b", 2_000), ("x", 2_001)], "a b x c"),  # the data set has it
        ([("b", 2_345)], "a b c"),  # and by whole seconds
        ([("b", 2_000), ("b", 2_000)], "a b b c"),  # one of them
        ([("b", 2_999), ("c", 2_000)], "a b c c"),  # another item of the same time
    ],
)
def test_live_events_join_those_of_a_data_set_once(live, expected):
    assert items(merged(events(("a", 1_000), ("b", 2_000), ("c", 3_000)), events(*live))) == expected


def test_the_newest_are_kept():
    long = merged(events(*((str(n), n) for n in range(MAX_STORED_EVENTS))), events(("x", MAX_STORED_EVENTS + 1)))
    assert len(long) == MAX_STORED_EVENTS and (long[0].item_id, long[-1].item_id) == ("1", "x")


# -- the store ---------------------------------------------------------------------------------------
_opened: list[LmdbStore] = []


def _open(path: Path) -> None:
    _opened.append(LmdbStore(path, readonly=True))


def _read(*users: str) -> list[list[str] | None]:
    return _opened[0].histories(users)


@pytest.fixture
def store(tmp_path):
    store = LmdbStore(tmp_path / "store")
    yield store
    store.close()


@pytest.fixture
def reader(store, tmp_path):
    """Reads in another process, with a store that stays open: a server's worker."""
    with ProcessPoolExecutor(1, mp_context=SPAWN, initializer=_open, initargs=(tmp_path / "store",)) as pool:
        yield lambda *users: pool.submit(_read, *users).result()


def test_histories_and_titles(store, reader, tmp_path):
    long_id = "ü" * 400  # longer than LMDB's keys
    first = [Event("u", "a", "view", 1), Event("u", "b", "buy", 2)]
    assert store.append([*first, Event(long_id, "c")]) == {"u": 2, long_id: 1}
    assert store.histories(["u", long_id, "nobody", ""]) == [["a", "b"], ["c"], None, None]
    assert store.typed_histories(["u"]) == [(["a", "b"], ["view", "buy"], [1, 2])]
    assert store.events("u") == first and list(store.users()) == ["u"]
    store.append(Event("busy", str(i)) for i in range(MAX_STORED_EVENTS + 10))
    (kept,) = store.histories(["busy"])
    assert len(kept) == MAX_STORED_EVENTS and kept[-1] == str(MAX_STORED_EVENTS + 9)
    assert reader("u") == [["a", "b"]]
    store.append([Event("u", "c")])
    assert reader("u") == [["a", "b", "c"]]
    with pytest.raises(FileNotFoundError, match="vivace prepare"):
        LmdbStore(tmp_path / "none", readonly=True)


def test_a_fill_keeps_what_was_appended_before_under_and_after_it(store, reader):
    first = [("u", ["a", "b"], ["view", "buy"], [1_000, 2_000]), ("v", ["a"], [""], [1_000])]
    assert store.fill(first, [("a", "Ein Stück")]) == {"users": 2, "titles": 1}
    assert store.titles(["a", "zzz"]) == ["Ein Stück", None] and store.event_types() == {"view", "buy"}
    assert reader("u", "v") == [["a", "b"], ["a"]]
    store.append([Event("u", "x", "view", 5_000), Event("new", "x", "view", 5_500), Event("new", "y", "view", 5_600)])

    def second():
        yield "u", ["a", "x", "c"], ["view"] * 3, [1_000, 5_000, 6_000]  # x is in the log that was read
        assert store.append([Event("u", "z", "view", 7_000)]) == {"u": 4}
        assert reader("u", "v", "new") == [["a", "b", "x", "z"], ["a"], ["x", "y"]]  # until the end the old ones

    assert store.fill(second(), [("c", "C")])["users"] == 1
    assert store.histories(["u", "v", "new"]) == [["a", "x", "c", "z"], None, ["x", "y"]]
    assert store.titles(["a", "c"]) == [None, "C"] and store.event_types() == {"view"}
    assert store.append([Event("u", "w", "view", 8_000)]) == {"u": 5}
    assert reader("u") == [["a", "x", "c", "z", "w"]]
    store.fill([], [])
    assert store.histories(["u", "new"]) == [["x", "z", "w"], ["x", "y"]]


def test_a_fill_that_fails_changes_nothing(store):
    store.fill([("u", ["a"], ["view"], [1])], [("a", "A")])

    def broken():
        yield "u", ["b"], ["view"], [1]
        raise ValueError("a broken file")

    for _ in range(2):
        with pytest.raises(ValueError, match="a broken file"):
            store.fill(broken(), [])
        assert store.histories(["u"]) == [["a"]] and store.titles(["a"]) == ["A"]


def _fill_for_ever(path: Path, ready) -> None:
    def rows():
        for n in range(FILL_ROWS + 1):
            yield f"u{n}", ["b"], ["view"], [1]
        ready.put("one transaction is written")
        signal.pause()

    LmdbStore(path).fill(rows(), [])


def test_a_fill_that_is_killed_changes_nothing(store, tmp_path):
    store.fill([("u1", ["a"], ["view"], [1])], [])
    ready = SPAWN.Queue()
    other = SPAWN.Process(target=_fill_for_ever, args=(tmp_path / "store", ready))
    other.start()
    try:
        ready.get(timeout=60)
        assert store.append([Event("u1", "x", "view", 2)]) == {"u1": 2}
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.join()
    assert store.histories(["u1", "u2"]) == [["a", "x"], None]
    assert store.append([Event("u1", "y", "view", 3)]) == {"u1": 3}
    store.fill([("u2", ["c"], ["view"], [1])], [])
    assert store.histories(["u1", "u2", "u3"]) == [["x", "y"], ["c"], None]


def test_a_store_of_one_slot_is_read_and_filled(tmp_path):
    """What was filled before there were two slots and a log."""
    path = tmp_path / "store"
    with lmdb.open(str(path), max_dbs=2, map_size=1 << 20) as old:
        users, titles = old.open_db(b"users"), old.open_db(b"items")
        with old.begin(write=True) as transaction:
            transaction.put(b"u", msgpack.packb([["a"], ["view"], [1]]), db=users)
            transaction.put(b"a", b"A", db=titles)
    with ProcessPoolExecutor(1, mp_context=SPAWN, initializer=_open, initargs=(path,)) as pool:
        assert pool.submit(_read, "u").result() == [["a"]]
        store = LmdbStore(path)
        assert store.titles(["a"]) == ["A"] and store.event_types() == set()
        assert store.append([Event("u", "b", "view", 2)]) == {"u": 2}
        store.fill([("u", ["c"], ["view"], [1])], [])
        assert store.histories(["u"]) == [["c", "b"]] == pool.submit(_read, "u").result()
        store.close()


def _hold_every_place(path: Path, ready) -> None:
    env = lmdb.open(str(path), max_dbs=6, readonly=True, max_readers=MAX_READERS)
    held = []
    try:
        while True:
            held.append(env.begin())
    except lmdb.ReadersFullError:
        ready.put(len(held))
    signal.pause()


def test_places_of_killed_readers_are_freed(store, tmp_path):
    store.append([Event("u", "a")])
    ready = SPAWN.Queue()
    other = SPAWN.Process(target=_hold_every_place, args=(tmp_path / "store", ready))
    other.start()
    try:
        assert ready.get(timeout=60) >= MAX_READERS - 2
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.join()
    assert store.histories(["u"]) == [["a"]] and store.append([Event("u", "b")]) == {"u": 2}
