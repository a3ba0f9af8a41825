"""Changes of the catalogue in the store, and a user who is forgotten: logged, durable, made anew from the log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import lmdb
import pytest

from vivace.store.forgetting import compact, is_due
from vivace.store.interface import Event
from vivace.store.lmdb_catalogue import Change
from vivace.store.lmdb_store import LmdbStore


def put_in(item: str, title: str) -> Change:
    return Change(item, json.dumps({"item_id": item, "title": title}), "tables", b"1234")


@pytest.fixture
def store(tmp_path):
    store = LmdbStore(tmp_path / "store")
    store.fill([("ann", ["a"], ["view"], [1])], [("a", "Old title"), ("b", "Other")])
    yield store
    store.close()


def contents(store: LmdbStore) -> dict[bytes, list[tuple[bytes, bytes]]]:
    """Every record of every database."""
    store._open_databases()
    with store._begin() as transaction:
        return {
            name: [(bytes(k), bytes(v)) for k, v in transaction.cursor(db=database)]
            for name, database in store._databases.items()
        }


def test_the_newest_change_of_an_item_counts_and_its_slot_stays(store):
    first = store.change_catalogue([put_in("n", "New"), put_in("a", "Changed")])
    assert [(c.number, c.slot) for c in first] == [(1, 1), (2, 2)]
    store.change_catalogue([Change("n"), put_in("n", "Newer")])
    assert [(c.item_id, c.number, c.slot) for c in store.catalogue_changes(0)] == [("a", 2, 2), ("n", 4, 1)]
    assert [c.number for c in store.catalogue_changes(2)] == [4] and not store.catalogue_changes(4)
    assert store.titles(["a", "b", "n", "?"]) == ["Changed", "Other", "Newer", None]


def test_changes_outlive_a_new_data_set_and_numbers_never_come_again(store):
    store.change_catalogue([put_in("n", "New"), Change("b")])
    store.fill([], [("a", "Title of the new data set")])
    assert [c.item_id for c in store.catalogue_changes(0)] == ["n", "b"]
    assert store.drop_changes([1, 2, 7]) == 2 and store.titles(["n"]) == [None]
    assert [c.number for c in store.change_catalogue([put_in("n", "New")])] == [3]


def test_the_index_of_changes_and_histories_are_made_anew_bit_by_bit(store):
    for n in range(50):
        store.change_catalogue([put_in(f"n{n % 7}", f"Title {n}"), Change(f"n{n % 3}")])
        store.append([Event(f"user {n % 5}", "a", "view", 1000 + n, f"id {n}")])
    before = contents(store)
    with store._begin(write=True) as transaction:
        transaction.drop(store._databases[b"changed"], delete=False)
    assert contents(store) != before
    store.rebuild()
    assert contents(store) == before
    rows = [("ann", ["a"], ["view"], [1])], [("a", "Old title"), ("b", "Other")]
    store.fill(*rows)
    store.fill(*rows)  # twice: into the slot that it was in
    after = contents(store)
    del before[b"about"], after[b"about"]  # when it was filled
    assert after == before


def test_a_forgotten_user_is_in_no_database_and_after_compaction_in_no_byte(tmp_path):
    path, user = tmp_path / "store", "forgotten-user-7654321"
    store = LmdbStore(path)
    others = [(f"user {n:04d}", ["a", "b"], ["view", "buy"], [1, 2]) for n in range(2000)]
    store.fill([*others, (user, ["a", "secret-item"], ["view", "view"], [1, 2])], [("a", "A")])
    store.fill([*others, (user, ["a", "secret-item"], ["view", "view"], [1, 2])], [("a", "A")])
    for n in range(300):
        store.append([Event(user, "secret-item", "view", 10 + n, f"event {n}"), Event("user 0001", "b", "buy", 10 + n)])
    store.change_catalogue([put_in("n", "New")])
    kept = store.events("user 0001")
    assert store.forget(user) and not store.forget(user) and not store.forget("nobody")
    assert store.histories([user, "user 0001"]) == [None, [e.item_id for e in kept]]
    number, left = store.live_events(0)
    assert user not in {e.user_id for e in left} and len(left) == 300
    assert user.encode() in (path / "data.mdb").read_bytes()  # else compaction would not be needed
    assert is_due(path) and not compact(path)  # this process has it open
    with pytest.raises(lmdb.Error, match="already open"):  # and what could not open it does not keep it
        LmdbStore(path)
    before = contents(store)
    store.close()
    assert compact(path) and not is_due(path)
    raw = (path / "data.mdb").read_bytes()
    assert user.encode() not in raw and b"secret-item" not in raw
    store = LmdbStore(path)
    assert contents(store) == before
    assert store.append([Event("user 0001", "b", "buy", 9)]) == {"user 0001": len(kept) + 1}
    assert store.live_events(number)[0] == number + 1
    store.close()


def test_numbers_of_events_go_on_where_the_newest_is_forgotten(store):
    store.append([Event("ann", "a", "view", 1), Event("bob", "b", "view", 2)])
    assert store.forget("bob") and store.live_events(0) == (2, [Event("ann", "a", "view", 1)])
    store.append([Event("ann", "b", "view", 3)])
    assert store.live_events(2) == (3, [Event("ann", "b", "view", 3)])
    store.fill([], [])
    assert sorted(store.users()) == ["ann"]


def test_a_part_of_the_log_is_the_same_whoever_was_forgotten_since(store):
    """Numbers have gaps then: a refresh that planned to read up to an event must not read fewer, or more."""
    store.append([Event(f"user {n % 3}", f"i{n}", "view", n + 1) for n in range(12)])  # numbers 1 to 12
    planned = store.live_events(2, until=8)
    assert planned[0] == 8 and [e.item_id for e in planned[1]] == [f"i{n}" for n in range(2, 8)]
    store.forget("user 1")  # numbers 2, 5, 8 and 11
    number, events = store.live_events(2, until=8)
    assert number == 8 and [e.item_id for e in events] == ["i2", "i3", "i5", "i6"]
    assert store.live_events(8) == (12, [e for e in store.live_events(0)[1] if e.timestamp_ms > 8])
    assert store.live_events(2, until=99)[0] == 12 and store.live_events(20, until=30) == (20, [])


KILLED = """
import sys
from vivace.store.lmdb_catalogue import Change
from vivace.store.lmdb_store import LmdbStore
from pathlib import Path
store, n = LmdbStore(Path(sys.argv[1])), 0
while True:
    written = store.change_catalogue([Change(f"n{n + i}", '{"title": "x"}', "t", b"v") for i in range(5)])
    n += 5
    print(written[-1].number, n, flush=True)
"""


def test_what_was_acknowledged_outlives_a_kill(tmp_path):
    LmdbStore(tmp_path).close()
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(20)]
    os.kill(process.pid, signal.SIGKILL)
    lines += process.stdout.read().splitlines()
    acknowledged = [line for line in lines if len(line.split()) == 2]
    process.wait()
    last = int(acknowledged[-1].split()[0])
    store = LmdbStore(tmp_path)
    changes = store.catalogue_changes(0)
    assert [c.number for c in changes] == list(range(1, len(changes) + 1)) and len(changes) >= last
    assert [c.item_id for c in changes] == [f"n{n}" for n in range(len(changes))]
    store.close()
