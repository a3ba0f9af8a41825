"""The Python stages as functions: status texts, padding, rows of unequal length."""

from __future__ import annotations

import numpy as np
import pytest

from serving.runtime.events import event_status, parse_event, parse_id
from serving.runtime.response import ResponseStage
from serving.runtime.stages import (
    NO_SUCH_ITEM,
    parse_row,
    read_search_for,
    search_for,
)
from vivace import contract
from vivace.context import ContextColumns
from vivace.store.interface import Event


def test_parse_row():
    row = parse_row("ü1".encode(), b"", np.array([b"a", b"", b"b"], object), 5)
    assert (row.user_id, row.history, row.top_k) == ("ü1", ["a", "b"], 5)
    assert parse_row(b"", b"", np.array([b"", b""], object), 5).history is None
    with pytest.raises(ValueError, match=r"HISTORY\[2\]: expected UTF-8, got byte 0xff at offset 1"):
        parse_row(b"", b"", np.array([b"a", b"b", b"c\xff"], object), 5)
    item = b"i" * contract.MAX_ID_BYTES  # the longest id there is, with the other parts of its event
    row = parse_row(b"u", b"", np.array([item + b"\x1fview\x1f5", item + b"i\x1fbuy"], object), 5)
    assert (row.history, row.types, row.times) == ([item.decode(), NO_SUCH_ITEM], ("view", "buy"), (5, 0))


def test_parse_event():
    assert parse_event("ü".encode(), b"a", b"view", 5) == Event("ü", "a", "view", 5)
    cases = {
        "USER_ID: expected a user id": (b"", b"a", b""),
        "ITEM_ID: expected an item id": (b"u", b"", b""),
        "ITEM_ID: expected at most 1024 bytes, got 1025": (b"u", b"a" * 1025, b""),
        "EVENT_TYPE: expected at most 128 bytes": (b"u", b"a", b"v" * 129),
        "EVENT_TYPE: expected UTF-8, got byte 0xff": (b"u", b"a", b"\xff"),
    }
    for message, values in cases.items():
        with pytest.raises(ValueError, match=message):
            parse_event(*values, 1)
    assert parse_event(b"u", b"a", b"", 5, "n").event_id == "n"
    columns = ContextColumns(shown_types=("seen",))
    sent = [parse_event(b"u", b"a", kind, 5, columns=columns) for kind in (b"seen", b"view")]
    assert [(event.shown, event.came_ms) for event in sent] == [(True, 0), (False, 0)]


def test_parse_id():
    assert (parse_id(None, "event_id"), parse_id("", "event_id"), parse_id("ü" * 64, "event_id")) == ("", "", "ü" * 64)
    for given, message in ((5, "expected a text, got int"), ("ü" * 65, "at most 128 bytes"), ("\ud800", "UTF-8")):
        with pytest.raises(ValueError, match=f"event_id: .*{message}"):
            parse_id(given, "event_id")


def test_what_is_not_known_of_an_event_is_reported():
    event = Event("u", "a", "view", 1)
    assert event_status(event, contract.FIRST_ID, {"view"}) == "ok" == event_status(event, 3, set())
    assert event_status(Event("u", "a"), 3, {"view"}) == "ok"  # no type was given
    item = event_status(event, contract.OOV_ID, {"view"})
    assert item == "degraded: stored, but ITEM_ID 'a' is not in the catalogue of the models"
    kind = event_status(event, 3, {"buy", "click"})
    assert kind == "degraded: stored, but the data has no EVENT_TYPE 'view'; it has buy, click"
    assert (
        event_status(event, contract.OOV_ID, {"buy", "click"})
        == f"{item}; {kind.removeprefix('degraded: stored, but ')}"
    )


def test_what_a_search_is_told_is_read_back():
    for ids, query in (([], "red  shoe"), ([3, 9], " 1 2,3 "), ([7], "名 字")):
        found_ids, found = read_search_for(search_for(np.array(ids, np.int64), query).encode())
        assert (found_ids.tolist(), found) == (ids, query)
    assert search_for(np.array([3]), "") == "" and read_search_for(b"")[1] == ""


def test_response_pads_rows_and_answers_no_failed_row():
    stage = ResponseStage(np.array([b"", b"", b"", b"A", b"B", b"C"], object))
    ranked = np.array([[5, 4, 3], [3, 4, 0], [3, 4, 5]])
    scores = np.array([[3, 2, 1], [3, 2, -1e30], [3, 2, 1]], np.float32)
    status = [b"ok", b"ok", f"{contract.STATUS_ERROR}broken".encode()]
    items, values = stage(ranked, scores[:, None], np.array([1, 3, 3]), status)
    assert items.tolist() == [[b"C", b"", b""], [b"A", b"B", b""], [b"", b"", b""]]
    assert values.tolist() == [[3, 0, 0], [3, 2, 0], [0, 0, 0]]
    single, value = stage(ranked[1:2], scores[1:2, None], np.array([3]), [b"ok"])
    assert single.tolist() == [[b"A", b"B"]] and value.tolist() == [[3, 2]]
