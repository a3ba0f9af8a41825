"""What a ValkeyStore does when its server is slow, gone, full, or was killed; a run copied there and back."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from benchmarks.local_valkey import ValkeyServer, stopped
from preprocessing.refresh import appended_since
from tests.support import wait_until
from vivace.cli.main import app
from vivace.manifest import CHECKOUT
from vivace.store.interface import Change, Event, StoreError, StoreUnreachableError
from vivace.store.lmdb_store import LmdbStore
from vivace.store.opening import STORE_URL
from vivace.store.remote.address import Address, shown
from vivace.store.remote.near import OVERHEAD, NearCache
from vivace.store.remote.store import ValkeyStore

LIMIT_MS = 200  # a busy machine lets a process wait so long; the default is 5


@pytest.fixture
def server(tmp_path):
    with ValkeyServer(tmp_path / "valkey") as server:
        yield server


def filled_store(server, limit_ms: int) -> Iterator[ValkeyStore]:
    with contextlib.closing(ValkeyStore(f"{server.url}?limit_ms={limit_ms}&write_ms=2000")) as store:
        store.fill([("u", ["a"], ["view"], [1])], [("a", "A")], [("u", {"age": "30"})])
        yield store


@pytest.fixture
def store(server):
    yield from filled_store(server, 2000)


@pytest.fixture
def hasty(server):
    yield from filled_store(server, LIMIT_MS)


def test_addresses():
    address = Address.parse("redis://me:se%20cret@host:7000/3?limit_ms=8&prefix=shop&health_check_interval=5")
    assert address.url == "valkey://me:se%20cret@host:7000/3?health_check_interval=5"
    assert (address.limit_ms, address.prefix, address.write_ms) == (8.0, "shop", 1000.0)
    assert "cret" not in repr(address) and shown(address.url).startswith("valkey://me:***@host:7000/3")
    assert (
        shown("valkey://:pw@h/0") == "valkey://:***@h/0"
        and shown("valkey://h/0?password=pw") == "valkey://h/0?password=%2A%2A%2A"
    )
    for wrong, words in (
        ("http://:pw@h", "expected a URL"),
        ("valkey://h?limit_ms=no", "limit_ms: expected a number"),
        ("valkey://h?prefix=a:*", "prefix: expected letters"),
        ("valkey://h?replicas=many", "replicas: expected how many"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            Address.parse(wrong)
        assert "pw" not in str(error.value)


def test_the_near_cache_is_bounded_and_the_least_recent_goes():
    cache = NearCache(3 * (OVERHEAD + 1))
    cache.put([b"a", b"b", b"c"], [b"1", b"2", b"3"])
    cache.put([b"a", b"d"], [b"4", b"5"])
    assert cache.get([b"a", b"b", b"c", b"d"]) == [b"4", None, b"3", b"5"]
    cache.put([b"c"], [None])
    assert cache.get([b"c", b"d"]) == [None, b"5"]


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_reads_go_on_from_what_is_known_and_are_whole_again(hasty, server, how):
    store = hasty

    def read() -> tuple:
        return store.typed_histories(["u"]), store.attributes(["u"]), store.titles(["a"]), store.event_types()

    known = wait_until(lambda: (values := read(), not store.fault())[1] and values, "a whole answer")
    server.send(signal.SIGSTOP) if how == "stopped" else server.kill()
    slow = 0  # this process may stand still for a moment
    for _ in range(50):
        began = time.monotonic()
        assert read() == known
        slow += time.monotonic() - began > 8 * LIMIT_MS / 1000
        assert store.typed_histories(["never read"]) == [None]
        assert store.fault().startswith("store: ") and store.fault() == ""
    assert slow <= 5, "answers wait for the limit, and no longer"
    began = time.monotonic()
    for _ in range(200):
        store.typed_histories(["u"])
    assert time.monotonic() - began < 10  # it is left alone, not asked 200 times
    with pytest.raises(StoreUnreachableError, match="store: "):
        store.append([Event("u", "b", "view", 2, "b")])
    with pytest.raises(StoreError):
        store.catalogue_changes(0)
    server.send(signal.SIGCONT) if how == "stopped" else server.start()
    if how == "killed":  # it kept nothing
        store._trips._closed_until = 0.0
        wait_until(lambda: store.typed_histories(["u"]) == [None] and not store.fault(), "the new server's answer")
        return
    wait_until(lambda: store.typed_histories(["u"])[0] and not store.fault(), "a whole answer")
    wait_until(lambda: _appended(store), "an append")
    assert store.histories(["u"]) == [["a", "b"]]  # also where the first one came through


def _appended(store) -> bool:
    try:
        return store.append([Event("u", "b", "view", 2, "b")]) == {"u": 2}
    except StoreError:
        return False


def test_a_password_is_in_no_message(server, caplog):
    with server.client() as client:
        client.config_set("requirepass", "right one")
    wrong = server.url.replace("valkey://", "valkey://:wrong-secret@")
    with caplog.at_level(logging.INFO):
        store = ValkeyStore(wrong)
        assert store.histories(["u"]) == [None] and "store: " in (fault := store.fault())
        with pytest.raises(StoreError) as error:
            store.append([Event("u", "a")])
    assert "wrong-secret" not in caplog.text + fault + str(error.value) and "127.0.0.1" in caplog.text
    right = ValkeyStore(server.url.replace("valkey://", "valkey://:right%20one@") + "?write_ms=5000&limit_ms=1000")
    assert right.append([Event("u", "a")]) == {"u": 1}


def test_a_full_server_refuses_what_is_new_and_answers(store, server):
    with server.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)
    with pytest.raises(StoreError, match="memory is full"):
        store.append([Event("u", "b", "view", 2, "b")])
    assert store.histories(["u"]) == [["a"]] and store.fault() == ""
    with server.client() as client:
        client.config_set("maxmemory", 0)
    assert store.append([Event("u", "b", "view", 2, "b")]) == {"u": 2}


def test_scripts_are_sent_again_to_a_server_that_has_lost_them(store, server):
    store.append([Event("u", "b")])
    with server.client() as client:
        client.script_flush()
    assert store.append([Event("u", "c"), Event("v", "c")]) == {"u": 3, "v": 1}


_SENDER = """
import sys
from vivace.store.interface import Event
from vivace.store.remote.store import ValkeyStore
store, n = ValkeyStore(sys.argv[1]), 0
while True:
    store.append([Event(f"u{n % 7}", str(n), "view", n + 1, str(n))])
    print(n, flush=True)
    n += 1
"""


def test_what_was_acknowledged_outlives_a_kill_of_the_server_and_of_the_sender(tmp_path):
    settings = ("--appendonly", "yes", "--appendfsync", "always")
    with ValkeyServer(tmp_path / "valkey", *settings) as server:
        url = f"{server.url}?write_ms=20000&limit_ms=2000"
        acknowledged = 0
        for _ in range(2):
            sender = subprocess.Popen([sys.executable, "-c", _SENDER, url], stdout=subprocess.PIPE,
                                      stderr=subprocess.DEVNULL, text=True, cwd=CHECKOUT)  # fmt: skip
            seen = [sender.stdout.readline() for _ in range(150)]
            server.kill()
            rest, _ = sender.communicate(timeout=60)
            acknowledged = max(acknowledged, 1 + int((seen + rest.split())[-1]))
            server.start()
            store = ValkeyStore(url)
            histories = store.histories([f"u{n}" for n in range(7)])
            kept = sorted(int(item) for history in histories for item in history)
            assert kept[:acknowledged] == list(range(acknowledged))  # each once, though the second sender repeats
            assert all(sorted(map(int, h)) == list(map(int, h)) for h in histories)
            store.close()


def test_what_replicas_have_outlives_the_primary(tmp_path):
    with ValkeyServer(tmp_path / "primary", "--repl-diskless-sync-delay", "0") as primary:
        following = ("--replicaof", "127.0.0.1", str(primary.port))
        with ValkeyServer(tmp_path / "replica", *following) as replica, replica.client() as copy:
            wait_until(lambda: copy.info("replication")["master_link_status"] == "up", "a replica that follows")
            store = ValkeyStore(f"{primary.url}?write_ms=3000&limit_ms=2000&replicas=1")
            assert store.append([Event("u", str(n), "view", n, str(n)) for n in range(50)]) == {"u": 50}
            last = Event("u", "last", "view", 60, "last")
            few = pytest.raises(StoreUnreachableError, match=r"0 of 1 replicas have it after 1500 ms")
            with stopped(replica):
                with few:
                    store.append([last])
                with few:  # which is in no history
                    store.append([Event("u", "seen", "show", 61, "seen", shown=True)])
            assert store.histories(["u"])[0][-1] == "last" and store.fault() == ""  # reads go on
            assert store.append([last]) == {"u": 51}  # once, and this time the replica has it
            store.change_catalogue([Change("i", "{}")])
            store.close()
            primary.kill()
            copy.execute_command("REPLICAOF", "NO", "ONE")
            after = ValkeyStore(f"{replica.url}?write_ms=4000&limit_ms=2000")
            assert after.histories(["u"]) == [[*map(str, range(50)), "last"]] and after.last_change() == 1
            assert after.live_events(0)[0] == 52 and after.append([last]) == {"u": 51}
            after.close()


@pytest.fixture
def filled(tmp_path):
    """A run's LMDB store with everything that a store may have."""
    path = tmp_path / "artifacts" / "shop" / "feature_store"
    (path.parent / "model_repository").mkdir(parents=True)
    store = LmdbStore(path)
    store.append([Event(f"early {n}", "a", "view", n + 1) for n in range(5)])
    users = [(f"u{n}", ["a", "b"], ["view", "buy"], [n + 1, n + 2]) for n in range(2_500)]
    ages = [(f"u{n}", {"age": n, "ö": None}) for n in range(50)]
    store.fill(users, [(f"i{n}", f"Ä {n}") for n in range(1_500)], ages)
    store.append([Event(f"u{n % 9}", str(n), "view", n + 5, f"id {n}", '{"d": "x"}', f"r{n}") for n in range(200)])
    store.append([Event("ü" * 400, "long"), Event("new", "x"), Event("gone", "x", "view", 1, "gone")])
    store.forget("gone")  # the newest: numbers go on from it
    store.change_catalogue([Change("i1", '{"title": "changed"}', "key", b"\0\xff"), Change("i2"), Change("i1")])
    store.close()
    return path


def read_all(store) -> list:
    users = sorted(store.users())
    number, events = store.live_events(0)
    return [
        number, [(e, e.context, e.request_id) for e in events], users,
        store.typed_histories([*users, "ü" * 400, "gone"]),
        store.titles([f"i{n}" for n in range(1_501)]), store.attributes(users), store.event_types(),
        store.catalogue_changes(0), store.last_change(),
    ]  # fmt: skip


def in_this_process(*arguments: str):
    """The command without the seconds that a process of its own takes to begin."""
    return CliRunner().invoke(app, arguments)


def test_a_run_is_copied_to_a_valkey_and_back(filled, server, tmp_path):
    before = LmdbStore(filled, readonly=True)
    expected = read_all(before)
    before.close()
    run = ("--name", "shop", "--artifacts", str(tmp_path / "artifacts"))
    there = in_this_process("store", "copy", *run, "--to", server.url)
    assert there.exit_code == 0 and "2507 users" in there.output.replace(",", ""), there
    url = f"{server.url}?limit_ms=2000&write_ms=20000"
    store = ValkeyStore(url)
    assert json.dumps(read_all(store), default=repr) == json.dumps(expected, default=repr)
    again = in_this_process("store", "copy", *run, "--to", server.url)
    assert again.exit_code == 1 and "--replace" in again.output, again
    assert store.append([Event("u1", "1", "view", 6, "id 1"), Event("u1", "n", "view", 9)])["u1"] == len(
        store.histories(["u1"])[0]
    )
    (change,) = store.change_catalogue([Change("i1", "{}")])
    assert (change.number, change.slot) == (4, 1)
    expected = read_all(store)
    over = in_this_process("store", "copy", *run, "--from", server.url)
    assert over.exit_code == 1 and "--replace" in over.output, over
    back = in_this_process("store", "copy", *run, "--from", server.url, "--replace")
    assert back.exit_code == 0, back
    after = LmdbStore(filled)
    assert json.dumps(read_all(after), default=repr) == json.dumps(expected, default=repr)
    number = expected[0]
    assert after.append([Event("u1", "n2"), Event("u1", "1", "view", 6, "id 1")])["u1"] == len(
        after.histories(["u1"])[0]
    )
    assert after.live_events(number)[0] == number + 1
    after.close()
    filled_anew = in_this_process("store", "fill", *run, "--to", server.url)
    assert filled_anew.exit_code == 0 and "2,500 users" in filled_anew.output, filled_anew
    long_history, gone = store.histories(["ü" * 400, "gone"])
    assert (long_history, gone) == (["long"], None) and store.live_events(0)[0] == number
    with server.client() as client:
        client.hset("vivace:{log}:about", "copying", "1")  # as one that was killed leaves it
    unfinished = in_this_process("store", "copy", *run, "--to", server.url)
    assert unfinished.exit_code == 0, unfinished
    assert store.live_events(0)[0] == number + 1


def test_a_refresh_reads_the_events_of_the_shared_store(store, server, tmp_path, monkeypatch):
    store.append([Event("u", "b", "view", 2), Event("v", "c", "", 3, context='{"device": "phone"}')])
    monkeypatch.setenv(STORE_URL, f"{server.url}?limit_ms=2000")
    appended = appended_since(tmp_path, 0, user_columns=("age",), context=("device",))
    assert (appended.until, appended.aged_out) == (2, 0)
    assert appended.rows.values.tolist() == [["u", "b", "view", 2, None, "30"], ["v", "c", None, 3, "phone", None]]
    known_columns = appended_since(tmp_path, 1, until=1)
    assert (known_columns.until, len(known_columns.rows)) == (1, 0)
    with stopped(server):
        monkeypatch.setenv(STORE_URL, f"{server.url}?limit_ms=20")
        with pytest.raises(StoreError, match="store: no answer"):
            appended_since(tmp_path, 0, user_columns=("age",))
