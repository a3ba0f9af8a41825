"""The context of a request: clocks, spellings, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vivace.client_request import batch_tensors, request_tensors
from vivace.client_updates import _row
from vivace.context import ContextColumns, category_text, clock, parse_context, unknown_names
from vivace.contract import CONTEXT_OF_REQUEST, HISTORY, HOUR, WEEKDAY, DataSchema
from vivace.store.interface import Event

COLUMNS = ContextColumns(("device", HOUR), (5, 27), ("price_limit",))
# Sunday 2021-03-28, 00:59 and 01:00 UTC: the clock of Berlin goes from 01:59 to 03:00
BEFORE, AFTER = 1_616_893_140_000, 1_616_893_200_000


@pytest.mark.parametrize(
    ("zone", "hours", "weekdays"),
    [
        ("UTC", ["0", "1"], ["6", "6"]),
        ("Europe/Berlin", ["1", "3"], ["6", "6"]),
        ("America/Sao_Paulo", ["21", "22"], ["5", "5"]),
        ("+05:30", ["6", "6"], ["6", "6"]),
        ("-01:15", ["23", "23"], ["5", "5"]),
    ],
)
def test_the_clock_is_that_of_the_zone(zone, hours, weekdays):
    of = clock(np.array([BEFORE, AFTER]), zone)
    assert of[HOUR].tolist() == hours and of[WEEKDAY].tolist() == weekdays
    for i, moment in enumerate((BEFORE, AFTER)):  # one by one as together
        assert clock(np.array([moment]), zone)[HOUR][0] == hours[i]


def test_values_are_spelled_as_readers_spell_them():
    spelled = [(None, ""), (True, "true"), (False, "false"), (3, "3"), (3.0, "3"), (2.5, "2.5"), (" de ", "de")]
    assert [category_text(value) for value, _ in spelled] == [text for _, text in spelled]


def test_what_a_request_sends_is_read_by_column():
    raw = json.dumps({"device": "phone", "price_limit": 12, "colour": "red"}).encode()
    values, unknown = parse_context(raw, COLUMNS)
    assert values == {"device": "phone", "price_limit": 12.0} and unknown == ["colour"]
    assert "'colour'" in unknown_names(unknown, COLUMNS) and "device, hour, price_limit" in unknown_names(
        unknown, COLUMNS
    )
    assert parse_context(b"", COLUMNS) == ({}, [])
    values, _ = parse_context(b'{"price_limit": null, "device": null}', COLUMNS)
    assert np.isnan(values["price_limit"]) and values["device"] == ""


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"phone", "CONTEXT: expected JSON"),
        (b'["phone"]', "CONTEXT: expected a JSON object, got list"),
        (b'{"device": ["phone"]}', "CONTEXT: device: expected a text"),
        (b'{"price_limit": "cheap"}', "CONTEXT: price_limit: expected a number"),
        (b'{"price_limit": true}', "CONTEXT: price_limit: expected a number"),
        (b'{"device": "' + b"x" * 1100 + b'"}', "CONTEXT: device: expected at most"),
        (b'{"a": "' + b"x" * 20_000 + b'"}', "CONTEXT: expected at most 16384 bytes"),
        (b'{"device": ' + b"[" * 5000, "CONTEXT: expected JSON"),
        (b"\xff", "CONTEXT: expected JSON"),
        (rb'{"device": "\ud800"}', "CONTEXT: device: expected text that UTF-8 can hold"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(raw, words):
    with pytest.raises(ValueError, match=words):
        parse_context(raw, COLUMNS)


def test_outcomes_are_no_context():
    """Type and weight of an event are known after it: a request that read them would read the answer."""
    schema = DataSchema("x", ("event_type", "device"), ("weight", "price_limit"), time_zone="UTC")
    assert schema.context_categoricals == ("device", HOUR, WEEKDAY) and schema.context_continuous == ("price_limit",)
    with pytest.raises(ValueError, match="user_columns"):
        DataSchema("x", user_columns=("weight",))


def test_a_cross_is_made_of_columns_of_the_context_and_sent_by_nobody():
    schema = DataSchema("x", ("event_type", "device"), time_zone="UTC", crosses=(("device", HOUR),))
    assert DataSchema.from_json(json.loads(json.dumps(schema.to_json()))) == schema
    columns = ContextColumns.of(schema, (5, 27, 10, 9), 0)
    assert columns.categoricals == ("device", HOUR, WEEKDAY, "device_x_hour")
    assert columns.sent == ("device", HOUR, WEEKDAY) and columns.counted == [0]
    assert parse_context(b'{"device_x_hour": "phone", "device": "phone"}', columns)[1] == ["device_x_hour"]
    for cross in (("device",), ("device", "device"), ("device", "event_type"), ("device", "colour")):
        with pytest.raises(ValueError, match=r"cross \[.*: expected two or more different"):
            DataSchema("x", ("event_type", "device"), time_zone="UTC", crosses=(cross,))


def test_the_client_sends_parts_of_events_and_numpy_numbers():
    tensors = dict(
        (t.name, v)
        for t, v in request_tensors(
            "u", ["a", ("b", "view"), ("c", "buy", 5), ("d", "", 6)], context={"device": "phone", "n": np.int64(3)}
        )
    )
    assert tensors[HISTORY.name][0].tolist() == [b"a", b"b\x1fview", b"c\x1fbuy\x1f5", b"d\x1f\x1f6"]
    assert json.loads(tensors[CONTEXT_OF_REQUEST.name][0, 0]) == {"device": "phone", "n": 3}
    assert CONTEXT_OF_REQUEST.name not in {t.name for t, _ in request_tensors("u")}
    for bad in ({"x": {1, 2}}, {"x": float("nan")}, "phone", [], 0, ""):
        with pytest.raises(ValueError, match="context"):
            request_tensors("u", context=bad)
    for event in (("a", 3), ("a", "view", "now"), ()):
        with pytest.raises(ValueError, match=r"history\[0\]"):
            request_tensors("u", [event])


def test_a_batch_of_events_names_the_one_that_is_wrong():
    good = Event("u", "i", "view", 5, context='{"device": "phone"}')
    tensors = {t.name: v.ravel().tolist() for t, v in batch_tensors([good, Event("w", "j")])}
    assert tensors["USER_ID"] == [b"u", b"w"] and tensors["TIMESTAMP_MS"] == [5, 0]
    assert tensors["CONTEXT"] == [b'{"device": "phone"}', b""]
    of_events = (Event("u", 3), Event("u", "i", context={"a": 1}), Event("u", "i", event_id="x"))
    for bad in (("u", "i"), {"user_id": "u"}, *of_events):
        with pytest.raises(ValueError, match=r"events\[8\]"):
            batch_tensors([good, bad], 7)


def test_rows_of_the_catalogue_may_hold_numbers_of_numpy():
    assert json.loads(_row({"item_id": "a", "price": np.float32(1.5), "stock": np.int64(3)}, 0)) == {
        "item_id": "a", "price": 1.5, "stock": 3,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"rows\[4\]"):
        _row({"item_id": "a", "price": {1}}, 4)
