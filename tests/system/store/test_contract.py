"""One contract, held by every store: LMDB, a real valkey-server, and a cluster of three."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.system.store.conftest import PATIENT
from vivace.store.interface import Change, Event, StoreError
from vivace.store.lmdb_store import LmdbStore
from vivace.store.opening import open_store
from vivace.store.remote.store import ValkeyStore
from vivace.store.retention import DAY_MS, MAX_STORED_EVENTS, Retention

SPAWN = get_context("spawn")


def names(events) -> str:
    return " ".join(event.item_id for event in events)


def test_histories_grow_in_order_and_keep_the_newest(store):
    long_id = "ü" * 400
    assert store.append([]) == {}
    first = [Event("u", "a", "view", 1), Event("u", "b", "buy", 2)]
    assert store.append([*first, Event(long_id, "c")]) == {"u": 2, long_id: 1}
    assert store.histories(["u", long_id, "nobody", ""]) == [["a", "b"], ["c"], None, None]
    assert [None if r is None else tuple(r) for r in store.typed_histories(["u", "?"])] == [
        (["a", "b"], ["view", "buy"], [1, 2]), None]  # fmt: skip
    assert store.events("u") == first and list(store.users()) == ["u"]
    assert store.append(Event("busy", str(i)) for i in range(MAX_STORED_EVENTS + 10)) == {"busy": MAX_STORED_EVENTS}
    assert store.append([Event("busy", "last")]) == {"busy": MAX_STORED_EVENTS}
    (kept,) = store.histories(["busy"])
    assert (len(kept), kept[0], kept[-1]) == (MAX_STORED_EVENTS, "11", "last")
    assert store.fault() == ""


@pytest.mark.parametrize("text", ["a b", "{x}", "*", "\\", "\0", "日本", "x" * 1024, "é\n", "[a-z]?"])
def test_any_text_is_an_id(store, text):
    store.fill([(text, [text], [text], [5])], [(text, text)], [(text, {"of": text})])
    assert store.append([Event(text, text, text, 7, text, '{"d": "' + "x" * 20 + '"}', f"of {text}")]) == {text: 2}
    assert store.append([Event(text, text, text, 7, text)]) == {text: 2}
    assert store.events(text)[-1] == Event(text, text, text, 7)
    assert store.titles([text]) == [text] and store.attributes([text]) == [{"of": text}]
    (event,) = store.live_events(0)[1]
    assert (event, event.context) == (Event(text, text, text, 7), '{"d": "' + "x" * 20 + '"}')
    assert event.request_id == f"of {text}"
    store.change_catalogue([Change(text, '{"title": "' + text.replace("\\", "").strip("\0\n") + '"}')])
    assert store.catalogue_change(text).item_id == text
    assert store.forget(text) and store.histories([text]) == [None] and not store.forget(text)


def test_text_that_no_utf8_can_hold_is_refused_and_nothing_of_its_batch_is_kept(store):
    for event in (Event("\ud800", "a"), Event("u", "\ud800"), Event("u", "a", "\ud800")):
        with pytest.raises(ValueError):
            store.append([Event("u", "first"), event])
    assert store.histories(["u"]) == [None] and store.live_events(0) == (0, [])


def test_an_event_that_is_sent_again_counts_once(store):
    events = [Event("u", "a", "view", 1, "one"), Event("v", "a", "view", 1, "one"), Event("u", "b", "view", 2, "two")]
    assert store.append(events) == {"u": 2, "v": 1}
    assert store.append([*events, Event("u", "c", "view", 3, "three")]) == {"u": 3, "v": 1}
    assert store.append([Event("u", "d", "", 4, "four")] * 2) == {"u": 4}
    assert store.append([Event("u", "d", "", 4)] * 2) == {"u": 6}  # without a name each is another
    assert store.histories(["u", "v"]) == [["a", "b", "c", "d", "d", "d"], ["a"]]
    assert store.live_events(0)[0] == 7


def _append(place: tuple[Path, str], sender: int, count: int) -> None:
    store = open_store(place[0], url=place[1])
    for n in range(count):
        events = [Event("all", f"{sender}-{n}", "view", n + 1, f"{sender}-{n}"), Event(f"own {sender}", str(n))]
        events.append(Event("same", "x", "view", 1, f"shared {n}"))  # every sender sends these
        store.append(events)
    store.close()


def test_writers_at_once_lose_nothing(store, place):
    senders, count = 3, 60
    with ProcessPoolExecutor(senders, mp_context=SPAWN) as pool:
        list(pool.map(partial(_append, place, count=count), range(senders)))
    everyone, same, *own = store.histories(["all", "same", *(f"own {s}" for s in range(senders))])
    assert sorted(everyone) == sorted(f"{s}-{n}" for s in range(senders) for n in range(count))
    for sender in range(senders):
        assert [i for i in everyone if i.startswith(f"{sender}-")] == [f"{sender}-{n}" for n in range(count)]
    assert own == [[str(n) for n in range(count)]] * senders and len(same) == count
    number, events = store.live_events(0)
    assert number == len(events) == (2 * senders + 1) * count


def test_what_is_only_shown_is_in_the_log_and_in_no_history(store):
    store.fill([("u", ["a"], ["view"], [1])], [])
    seen = [Event(who, "b", "seen", 2, f"{who} 1", shown=True) for who in ("u", "nobody")]
    assert store.append([*seen, Event("u", "c", "view", 3)]) == {"u": 2, "nobody": 0}
    assert store.append([Event("u", "c", "view", 4), seen[1], Event("later", "d", "seen", 5, shown=True)]) == {
        "u": 3, "nobody": 0, "later": 0,
    }  # fmt: skip
    number, events = store.live_events(0)
    assert number == 5 and [(e.user_id, e.item_id, e.shown) for e in events] == [
        ("u", "b", True), ("nobody", "b", True), ("u", "c", False), ("u", "c", False), ("later", "d", True),
    ]  # fmt: skip
    store.fill([("u", ["a"], ["view"], [1])], [])  # the next data set
    assert store.histories(["u", "nobody", "later"]) == [["a", "c", "c"], None, None]
    assert store.forget("nobody") and [e.user_id for e in store.live_events(0)[1]] == ["u", "u", "u", "later"]


def test_live_events_by_number_time_and_count(store):
    assert store.live_events(0) == (0, []) == (store.live_events(5)[0] - 5, store.live_events(5)[1])
    began = int(time.time() * 1000)
    store.append([Event("u", str(n), "view", n + 1) for n in range(5)])
    time.sleep(0.05)
    middle = int(time.time() * 1000)
    store.append([Event("v", str(n), "view", 1) for n in range(5, 8)])
    assert (store.live_events(0)[0], names(store.live_events(0)[1])) == (8, "0 1 2 3 4 5 6 7")
    assert names(store.live_events(3)[1]) == "3 4 5 6 7" and store.live_events(8) == (8, [])
    assert names(store.live_events(0, most=2)[1]) == "6 7" and names(store.live_events(1, until=3)[1]) == "1 2"
    assert store.live_events(0, until=3)[0] == 3 and store.live_events(5, until=3) == (5, [])
    assert names(store.live_events(0, since_ms=middle)[1]) == "5 6 7"
    assert len(store.live_events(0, since_ms=began)[1]) == 8
    came = [e.came_ms for e in store.live_events(0)[1]]  # by which suspect events are told, whatever their time says
    assert began <= came[0] <= came[4] <= middle <= came[5] <= came[7] <= int(time.time() * 1000)
    assert store.live_events(20) == (20, [])


def test_a_fill_keeps_what_was_appended_before_under_and_after_it(store, opening):
    reader = store if isinstance(store, LmdbStore) else opening()  # LMDB opens a folder once a process
    first = [("u", ["a", "b"], ["view", "buy"], [1_000, 2_000]), ("v", ["a"], [""], [1_000])]
    assert store.fill(first, [("a", "Ein Stück")], [("u", {"age": "30"})]) == {"users": 2, "titles": 1}
    assert store.titles(["a", "zzz"]) == ["Ein Stück", None] and store.event_types() == {"view", "buy"}
    assert store.attributes(["u", "v"]) == [{"age": "30"}, None]
    assert reader.histories(["u", "v"]) == [["a", "b"], ["a"]]
    store.append([Event("u", "x", "view", 5_000), Event("new", "x", "view", 5_500), Event("new", "y", "view", 5_600)])

    def second():
        yield "u", ["a", "x", "c"], ["view"] * 3, [1_000, 5_000, 6_000]  # x is in the log that was read
        assert store.append([Event("u", "z", "view", 7_000), Event("later", "z", "view", 7_000)])["u"] == 4
        assert reader.histories(["u", "v", "new"]) == [["a", "b", "x", "z"], ["a"], ["x", "y"]]  # until the end the old

    assert store.fill(second(), [("c", "C")])["users"] == 1
    for who in (store, reader):
        assert who.histories(["u", "v", "new", "later"]) == [["a", "x", "c", "z"], None, ["x", "y"], ["z"]]
        assert who.titles(["a", "c"]) == [None, "C"] and who.event_types() == {"view"}
        assert who.attributes(["u"]) == [None]
    assert store.append([Event("u", "w", "view", 8_000)]) == {"u": 5}
    assert reader.histories(["u"]) == [["a", "x", "c", "z", "w"]]
    store.fill([], [])
    assert reader.histories(["u", "new", "later"]) == [["x", "z", "w"], ["x", "y"], ["z"]]


def test_a_fill_that_fails_changes_nothing(store):
    store.fill([("u", ["a"], ["view"], [1])], [("a", "A")])
    store.append([Event("u", "x", "view", 2, "x")])

    def broken():
        yield "u", ["b"], ["view"], [1]
        raise ValueError("a broken file")

    for n in range(2):
        with pytest.raises(ValueError, match="a broken file"):
            store.fill(broken(), [])
        assert store.append([Event("u", f"y{n}", "view", 3 + n)]) == {"u": 3 + n}
    assert store.histories(["u"]) == [["a", "x", "y0", "y1"]] and store.titles(["a"]) == ["A"]
    store.fill([("u", ["c"], ["view"], [1])], [])
    assert store.histories(["u"]) == [["c", "x", "y0", "y1"]]
    assert store.append([Event("u", "x", "view", 2, "x")]) == {"u": 4}


def _append_until_told(place: tuple[Path, str], go, over) -> int:
    store, n = open_store(place[0], url=place[1]), 0
    go.set()
    while not over.is_set():
        store.append([Event(f"u{n % 5}", str(n), "view", n + 10)])
        n += 1
    store.close()
    return n


def test_fills_beside_a_writer_lose_nothing(store, place):
    with SPAWN.Manager() as manager, ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        go, over = manager.Event(), manager.Event()
        writer = pool.submit(_append_until_told, place, go, over)
        go.wait(60)
        fills = 0
        while fills < 4 or store.live_events(0)[0] < 100:
            store.fill(((f"u{n}", ["old"], ["view"], [1]) for n in range(4)), [])
            fills += 1
        over.set()
        count = writer.result()
    for user in range(5):
        expected = [str(n) for n in range(user, count, 5)]
        assert store.histories([f"u{user}"]) == [(["old"] if user < 4 else []) + expected]


def test_changes_of_the_catalogue(store):
    assert (store.last_change(), store.catalogue_changes(0), store.catalogue_change("a")) == (0, [], None)
    written = store.change_catalogue([Change("a", '{"title": "A"}', "key", b"\0\xff"), Change("b", '{"title": "B"}')])
    assert [(c.item_id, c.number, c.slot, c.vector) for c in written] == [("a", 1, 1, b"\0\xff"), ("b", 2, 2, b"")]
    assert store.catalogue_changes(0) == written and written[0].came_ms > 0
    (gone,) = store.change_catalogue([Change("a")])
    assert (gone.number, gone.slot, gone.removed) == (3, 1, True)
    assert [c.item_id for c in store.catalogue_changes(0)] == ["b", "a"] and store.catalogue_changes(3) == []
    assert [c.item_id for c in store.catalogue_changes(0, 1)] == ["b"] and store.last_change() == 3
    assert store.catalogue_change("a") == gone
    assert store.drop_changes([1, 2]) == 1 and [c.item_id for c in store.catalogue_changes(0)] == ["a"]
    assert store.drop_changes([3]) == 1 and store.catalogue_changes(0) == [] and store.last_change() == 3
    (again,) = store.change_catalogue([Change("a", "{}")])
    assert (again.number, again.slot) == (4, 4)
    many = store.change_catalogue([Change(f"i{n}", "{}") for n in range(1_200)])
    assert store.catalogue_changes(4) == many and len(store.catalogue_changes(0, 700)) == 700


def test_titles_are_those_of_the_catalogue_as_it_is(store):
    store.fill([], [("a", "A"), ("b", "B"), ("c", "C")])
    store.change_catalogue([Change("a", '{"title": "new"}'), Change("b"), Change("d", '{"title": "D"}'),
                            Change("c", "{}")])  # fmt: skip
    assert store.titles(["a", "b", "c", "d", "e"]) == ["new", "B", "", "D", None]


def test_a_forgotten_user_is_nowhere_and_numbers_go_on(store):
    store.fill([("u", ["a"], ["view"], [1]), ("w", ["a"], ["view"], [1])], [], [("u", {"age": "30"})])
    store.append([Event("u", "b", "view", 2, "named"), Event("w", "c", "view", 3), Event("u", "last", "view", 4)])
    assert store.forget("u") and not store.forget("u") and not store.forget("nobody")
    assert store.histories(["u", "w"]) == [None, ["a", "c"]] and store.attributes(["u"]) == [None]
    assert (store.live_events(0)[0], names(store.live_events(0)[1])) == (3, "c")
    assert store.append([Event("u", "b", "view", 2, "named")]) == {"u": 1}  # its id is not known any more
    assert store.live_events(3) == (4, [Event("u", "b", "view", 2)])
    store.fill([("w", ["a"], ["view"], [1])], [])
    assert store.histories(["u", "w"]) == [["b"], ["a", "c"]]


def test_bytes_of_a_forgotten_user_leave_the_server(store, servers):
    if isinstance(store, LmdbStore):
        pytest.skip("its file: test_live_catalogue.py")
    secret = "a very secret name"
    store.append([Event(secret, "theirs alone", "view", 2, "named"), *(Event("w", str(n)) for n in range(300))])
    store.forget(secret)
    dump = b""
    for server in servers("cluster" if store.address.cluster else "valkey"):
        with server.client() as client:
            client.save()
        dump += (server.folder / "dump.rdb").read_bytes()
    assert b"{w}" in dump and secret.encode() not in dump and b"theirs alone" not in dump


def test_what_is_too_much_or_too_old_goes(opening):
    store = opening(retention=Retention(live_events=5, days=10))
    store.fill([("of the data", ["a"], [""], [1])], [])
    for n in range(8):
        store.append([Event(f"u{n}", str(n), "view", n + 1, f"id {n}"), Event("of the data", str(n), "view", n + 1)])
    while store.sweep():
        pass
    kept = store.live_events(0)
    assert kept[0] == 16 and len(kept[1]) == 5 and kept[1][-1].user_id == "of the data"
    assert store.histories(["u0", "u7"]) == [None, ["7"]] and len(store.histories(["of the data"])[0]) == 9
    assert store.append([Event("u7", "7", "view", 8, "id 7")]) == {"u7": 1}
    assert store.append([Event("u0", "0", "view", 1, "id 0")]) == {"u0": 1}  # its id went with it
    while store.sweep(int(time.time() * 1000) + 9 * DAY_MS):
        pass
    assert len(store.live_events(0)[1]) >= 5
    while store.sweep(int(time.time() * 1000) + 11 * DAY_MS):
        pass
    number, left = store.live_events(0)
    assert number == 17 and len(left) == 1  # the newest stays
    store.close()


def test_an_account_that_may_not_look_through_the_keys_is_told_so(servers):
    server = servers("valkey")[0]
    with server.client() as client:
        client.execute_command("ACL SETUSER reader on >word ~* &* +@all -scan")
    url = server.url.replace("://", "://reader:word@")
    store = ValkeyStore(url + PATIENT)
    store.append([Event("u", "a")])
    with pytest.raises(StoreError, match=r"store: refused: .*no permissions"):
        list(store.users())
    assert store.fault() == "", "the store itself is well"
    store.close()
