"""A row of the catalogue as JSON means what the same row of a table means."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest

from preprocessing.cleaning import clean_items
from preprocessing.item_rows import digest, parse_item, parse_item_json, sold_out, to_json
from preprocessing.readers.base import Chunk
from preprocessing.rejects import Rejects
from tests.unit.preprocessing.tables import read
from vivace.context import ContextColumns, parse_context
from vivace.contract import DataSchema

SCHEMA = DataSchema("shop", item_categoricals=("brand", "class"), item_continuous=("price",))
ROWS = [
    {"item_id": " a ", "title": "Plain title", "brand": "Alto", "class": "x", "price": 1.1},
    {"item_id": 17, "title": None, "brand": " ", "class": None, "price": None},
    {"item_id": "c", "title": " kept blanks ", "brand": "日本", "class": "x", "price": "12.5"},
    {"item_id": "d", "title": "", "brand": "7", "class": "x", "price": "cheap"},
    {"item_id": "ü" * 30, "title": "t", "brand": "b", "class": "c", "price": float("nan")},
]


def test_rows_are_typed_as_a_table_s_are(tmp_path):
    frame = pd.DataFrame(ROWS, dtype=object)
    clean = clean_items([Chunk(frame)], SCHEMA, Rejects(tmp_path / "rejects.csv"))
    for row, (_, of_table) in zip(ROWS, clean.iterrows(), strict=True):
        for name, value in parse_item(row, SCHEMA).items():
            other = of_table[name]
            assert value == other or (value is None and (other is None or math.isnan(other))), (name, value, other)


SPELT = ["True", "TRUE", "true", "False", " false ", "0", "1.0", "yes", "é"]


def test_a_category_has_one_spelling_in_a_table_a_live_row_and_a_context(tmp_path):
    events = "user,item,ts,device\n" + "".join(f"u,A,{n + 1},{word}\n" for n, word in enumerate(SPELT))
    catalogue = "item,title,cat,price\nA,T,y,1\n" + "".join(f"i{n},T,{word},1\n" for n, word in enumerate(SPELT))
    out = read(tmp_path, events, catalogue, keys='context = ["device"]\n')
    expected = ["true"] * 3 + ["false"] * 2 + SPELT[5:]
    assert out.column("device") == expected and out.items["cat"].tolist()[1:] == expected
    assert [parse_item({"item_id": "x", "brand": word}, SCHEMA)["brand"] for word in SPELT] == expected
    columns = ContextColumns(categoricals=("device",))
    sent = [parse_context(json.dumps({"device": word}).encode(), columns)[0]["device"] for word in SPELT]
    assert sent == expected


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"{}", "item_id: expected an item id"),
        (b"[1]", "expected a JSON object"),
        (b'{"item_id": "a"', "expected a JSON object"),
        (b'{"item_id": "a", "colour": "red"}', "got 'colour'"),
        (b'{"item_id": "a", "price": [1]}', "price: expected a number, got list"),
        (b'{"item_id": {"a": 1}}', "item_id: expected a text, got dict"),
        (b'{"item_id": "a", "title": "\\ud800"}', "title: expected text that UTF-8 can hold"),
        (b'{"item_id": "' + b"a" * 70_000 + b'"}', "at most 65536 bytes"),
        (b"[" * 50_000, "expected a JSON object"),
        (b"\xff", "expected a JSON object"),
    ],
)
def test_what_is_no_row_is_named(raw, says):
    with pytest.raises(ValueError, match=r"item|price|title") as error:
        parse_item_json(raw, SCHEMA)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("column", "value", "note"),
    [
        ("price", "abc", "price: expected a number, got 'abc'; taken as missing"),
        ("price", "1e999", "price: expected a number, got '1e999'; taken as missing"),
        ("stock", "many", "stock: expected a number, got 'many'; taken as missing"),
        *(("price", value, "") for value in (None, "", " ", 3, "3", True, float("nan"))),
    ],
)
def test_a_number_that_cannot_be_read_is_missing_and_noted(column, value, note):
    notes = []
    row = parse_item({"item_id": "a", column: value}, SCHEMA, notes)
    assert notes == [note] * bool(note) and (row[column] is None) == (value not in (3, "3", True))


def test_equal_rows_have_one_digest_and_nothing_left_is_sold_out():
    a, b = ({"item_id": "a", "title": "T", "price": 1.5}, {"price": "1.5", "title": "T", "item_id": "a "})
    assert digest(to_json(parse_item(a, SCHEMA))) == digest(to_json(parse_item(b, SCHEMA)))
    assert digest(to_json(parse_item({**a, "price": 2}, SCHEMA))) != digest(to_json(parse_item(a, SCHEMA)))
    stocks = {0: True, -1: True, "0": True, 3: False, None: False, "many": False}
    assert {s: sold_out(parse_item({"item_id": "a", "stock": s}, SCHEMA)) for s in stocks} == stocks
    assert not sold_out(parse_item(a, SCHEMA))
