"""Groups of readers of the log of live events: one contract, held by every store; and the command that follows."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter

import pytest
from typer.testing import CliRunner

from tests.support import PATIENCE_S, vivace, wait_until
from vivace.cli.main import app
from vivace.manifest import CHECKOUT
from vivace.store.event_groups import follow
from vivace.store.interface import Event, GroupState
from vivace.store.lmdb_store import LmdbStore
from vivace.store.opening import open_store
from vivace.store.remote import groups
from vivace.store.retention import Retention


def items(batch) -> str:
    return " ".join(d.event.item_id for d in batch)


def test_each_event_goes_to_one_of_a_group_and_again_where_it_is_not_acknowledged(store):
    assert store.groups() == [] and not store.drop_group("g")
    store.append([Event("u", "before")])
    assert store.create_group("g") and not store.create_group("g", 0)  # what is there stays as it is
    assert store.create_group("all", 0)
    assert store.read_group("g", "a", 10, 60_000) == []
    store.append([Event("u", str(n), "view", n + 1, context='{"d": "x"}', request_id=f"r{n}") for n in range(7)])
    first, second = store.read_group("g", "a", 3, 60_000), store.read_group("g", "b", 3, 60_000)
    assert (items(first), items(second), items(store.read_group("g", "a", 3, 60_000))) == ("0 1 2", "3 4 5", "6")
    assert [(d.number, d.times) for d in first] == [(2, 1), (3, 1), (4, 1)]
    assert (first[0].event.context, first[0].event.request_id) == ('{"d": "x"}', "r0")
    assert store.acknowledge("g", [3, 5, 99]) == 2 and store.acknowledge("g", [3]) == 0 == store.acknowledge("g", [])
    assert store.groups()[1] == GroupState("g", delivered=8, open=5, ahead=0, missed=0, acknowledged_to=1)
    time.sleep(0.05)
    again = store.read_group("g", "c", 4, 30)  # those of a and b, as nobody has acknowledged them
    assert [(d.event.item_id, d.times) for d in again] == [("0", 2), ("2", 2), ("4", 2), ("5", 2)]
    assert items(store.read_group("g", "c", 4, 60_000)) == ""
    assert store.acknowledge("g", [d.number for d in again]) == 4
    assert items(store.read_group("all", "a", 100, 60_000)) == "before 0 1 2 3 4 5 6"  # of its own
    assert store.drop_group("all") and [g.name for g in store.groups()] == ["g"]
    assert store.drop_group("g") and store.groups() == []
    with pytest.raises(ValueError, match=r"group 'g': no such group of readers \(there is none yet\)"):
        store.read_group("g", "a", 1, 1)
    with pytest.raises(ValueError, match="no such group"):
        store.acknowledge("g", [1])
    with pytest.raises(ValueError, match="group: expected 1 to 64 letters"):
        store.create_group("a b")
    assert store.create_group("g", 0) and items(store.read_group("g", "a", 2, 1)) == "before 0"  # the log is whole


def test_a_forgotten_user_is_handed_to_nobody(store):
    store.create_group("g")
    store.append([Event("u", "0"), Event("v", "1"), Event("u", "2"), Event("u", "3")])
    assert items(store.read_group("g", "a", 2, 60_000)) == "0 1"
    store.forget("u")
    time.sleep(0.01)
    assert items(store.read_group("g", "b", 10, 1)) == "1"  # neither of what was in hand nor of what is to come
    store.append([Event("v", "4")])
    assert items(store.read_group("g", "b", 10, 60_000)) == "4" and store.groups()[0].missed == 0


def test_what_ages_out_unread_is_counted_and_said(opening, caplog):
    store = opening(retention=Retention(live_events=5))
    store.append([Event("u", "early")])
    store.create_group("slow"), store.create_group("quick"), store.create_group("none", 0)
    store.append([Event("u", str(n)) for n in range(4)])
    in_hand = store.read_group("slow", "a", 3, 60_000)
    store.acknowledge("slow", [in_hand[0].number])
    store.acknowledge("quick", [d.number for d in store.read_group("quick", "a", 9, 60_000)])
    for n in range(4, 8):
        store.append([Event("u", str(n))])
    while store.sweep():
        pass
    assert items(e for e in map(_as_delivery, store.live_events(0)[1])) == "3 4 5 6 7"
    assert {g.name: g.missed for g in store.groups()} == {"none": 4, "quick": 0, "slow": 2}
    assert "before the group 'slow' had acknowledged them" in caplog.text and "quick" not in caplog.text
    time.sleep(0.01)
    assert items(store.read_group("slow", "b", 9, 1)) == "3 4 5 6 7" == items(store.read_group("none", "a", 9, 1))
    assert items(store.read_group("quick", "a", 9, 60_000)) == "4 5 6 7"
    store.close()


def _as_delivery(event):
    from vivace.store.interface import Delivery

    return Delivery(0, event)


def test_a_log_that_is_longer_than_one_step_is_read_whole(store, monkeypatch):
    monkeypatch.setattr(groups, "LOOKED_AT", 10)
    store.append([Event(f"u{n}", str(n)) for n in range(125)])
    read = [d.event.item_id for batch in follow(store, "g", after=0, most=40, once=True) for d in batch]
    assert read == [str(n) for n in range(125)]
    assert items(store.read_group("g", "a", 10, 1)) == ""  # all were acknowledged


_READER = """
import sys, time
from pathlib import Path
from vivace.store.event_groups import follow
from vivace.store.opening import open_store
from vivace.store.remote import groups
store = open_store(Path(sys.argv[1]), url=sys.argv[2])
for batch in follow(store, "g", most=7, idle_s=2.0):
    for delivery in batch:
        print(delivery.event.item_id, flush=True)
        time.sleep(float(sys.argv[3]))
"""


def _reader(place, pause_s: float) -> subprocess.Popen:
    command = [sys.executable, "-c", _READER, str(place[0]), place[1], str(pause_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT)


@pytest.mark.parametrize("opening", ["lmdb", "valkey"], indirect=True)
def test_a_reader_that_is_killed_loses_nothing(store, place):
    count = 200
    store.create_group("g")
    store.append([Event(f"u{n}", str(n)) for n in range(count)])
    victim = _reader(place, 0.02)
    lines = [victim.stdout.readline().strip() for _ in range(10)]
    victim.kill()  # in the middle of a batch
    lines += victim.communicate()[0].split()
    others = [_reader(place, 0.0), _reader(place, 0.0)]
    wait_until(lambda: store.groups()[0].acknowledged_to == count, "a group that has read it all")
    for other in others:
        other.terminate()
        lines += other.communicate()[0].split()
    seen = Counter(map(int, lines))
    assert set(seen) == set(range(count)), "each came to someone"
    assert sum(seen.values()) - count <= 7, "and again at most what was in the killed one's hand"


def test_the_command_follows_and_a_copy_goes_on_where_the_group_was(tmp_path, servers):
    folder = tmp_path / "artifacts" / "shop" / "feature_store"
    (folder.parent / "model_repository").mkdir(parents=True)
    store = LmdbStore(folder)
    store.append([Event("ü", str(n), "view", n + 1, context='{"d": "x"}') for n in range(5)])
    store.close()
    run = ("--name", "shop", "--artifacts", str(tmp_path / "artifacts"))
    read = vivace("events", "follow", *run, "--group", "dwh", "--from-start", "--batch", "2", "--once")
    rows = [json.loads(line) for line in read.stdout.splitlines()]
    assert [row["number"] for row in rows] == [1, 2, 3, 4, 5], read
    assert rows[0] == {"number": 1, "times": 1, "user_id": "ü", "item_id": "0", "event_type": "view",
                       "timestamp_ms": 1, "shown": False, "context": {"d": "x"}, "request_id": ""}  # fmt: skip
    (server,) = servers("valkey")
    with server.client() as client:
        client.flushall()
    url, here = f"{server.url}?limit_ms=2000&write_ms=20000", CliRunner()
    assert here.invoke(app, ["store", "copy", *run, "--to", url]).exit_code == 0
    shared = open_store(tmp_path, url=url)
    shared.append([Event("u", "new")])
    went_on = here.invoke(app, ["events", "follow", "--store", url, "--group", "dwh", "--once", "--from-start"])
    assert [json.loads(line)["item_id"] for line in went_on.stdout.splitlines()] == ["new"], went_on
    assert "goes on where it is" in went_on.stderr
    assert here.invoke(app, ["events", "drop", "dwh", "--store", url]).exit_code == 0 and shared.groups() == []
    wrong = here.invoke(app, ["events", "drop", "dwh", "--store", url])
    assert wrong.exit_code == 2 and "expected a group there is (none)" in wrong.output, wrong
    shared.close()


def test_a_closed_pipe_ends_the_command_before_the_next_event_comes(tmp_path):
    folder = tmp_path / "artifacts" / "shop" / "feature_store"
    (folder.parent / "model_repository").mkdir(parents=True)
    store = LmdbStore(folder)
    store.append([Event("u", str(n), "view", n + 1) for n in range(3)])
    command = [
        sys.executable,
        "-m",
        "vivace.cli.main",
        "events",
        "follow",
        "--name",
        "shop",
        "--from-start",
        "--group",
        "g",
    ]
    with subprocess.Popen(
        [*command, "--artifacts", str(tmp_path / "artifacts")], cwd=CHECKOUT, stdout=subprocess.PIPE
    ) as reader:
        try:
            assert reader.stdout is not None
            assert json.loads(reader.stdout.readline())["number"] == 1
            wait_until(lambda: store.groups()[0].open == 0, "the batch acknowledged")
            assert reader.poll() is None, "it waits for events"
            reader.stdout.close()
            assert reader.wait(PATIENCE_S) == 0
        finally:
            reader.kill()
    store.close()
