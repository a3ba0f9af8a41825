"""CSV, Parquet and JSON of the same rows are the same rows; a file of another name is refused."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from preprocessing.item_file import ItemFile
from vivace.contract import MAX_ROW_BYTES, DataSchema

SCHEMA = DataSchema("shop", item_categoricals=("brand",), item_continuous=("price",))
ROWS = [
    {"item_id": "a", "title": "Red, shoe", "brand": "Alto", "price": 12.5, "stock": 3},
    {"item_id": "b", "title": "Hat", "brand": None, "price": None, "stock": 0},
]
ROW_OF_B = json.dumps({"item_id": "b", "title": "hat"})
EXPECTED = [
    {"item_id": "a", "title": "Red, shoe", "text": "Red, shoe", "brand": "Alto", "price": 12.5, "stock": 3.0},
    {"item_id": "b", "title": "Hat", "text": "Hat", "brand": None, "price": None, "stock": 0.0},
]


LINES, LIST = "\n".join(map(json.dumps, ROWS)) + "\n", "\n " + json.dumps(ROWS, indent=2) + "\n"


def _written(path, rows, text):
    """``rows`` as the file's ending says; of JSON ``text``."""
    frame = pd.DataFrame(rows)
    if path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    elif "json" in path.suffix:
        path.write_text(text, encoding="utf-8-sig")
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.fixture(
    params=[
        *(("csv", ""), ("CSV", ""), ("csv.gz", ""), ("tsv", ""), ("txt", ""), ("parquet", "")),
        *((ending, text) for ending in ("json", "jsonl", "ndjson") for text in (LINES, LIST)),
    ],
    ids=lambda param: f"{param[0]} {'list' if param[1] == LIST else ''}".strip(),
)
def file(request, tmp_path):
    return _written(tmp_path / f"items.{request.param[0]}", ROWS, request.param[1])


@pytest.mark.parametrize("name", ["items.xlsx", "items.xml", "items", "items.json.gz", "items.parquet.gz", "items.jsn"])
def test_a_file_of_another_name_is_refused(name, tmp_path):
    (tmp_path / name).write_text("item_id,title\na,b\n")
    with pytest.raises(ValueError, match=f"{name}: expected a name that says what it is: .*json"):
        ItemFile(tmp_path / name, SCHEMA, None, tmp_path / "rejects.csv")


def test_one_json_object_over_several_lines_is_a_row(tmp_path):
    (tmp_path / "item.json").write_text(json.dumps(ROWS[0], indent=1))
    assert ItemFile(tmp_path / "item.json", SCHEMA, None, tmp_path / "rejects.csv").rows == EXPECTED[:1]


NOT_NUMBERS = [("cheap", "price"), ("12,50 EUR", "price"), ("many", "stock"), (None, ""), (" ", ""), ("1.5", "")]


@pytest.mark.parametrize("ending", ["csv", "parquet", "json", "jsonl"])
@pytest.mark.parametrize(("value", "column"), NOT_NUMBERS)
def test_a_number_that_cannot_be_read_is_missing_and_said(ending, value, column, tmp_path):
    row = {"item_id": "a", "title": "t", "price": "1", "stock": "2"} | {column or "price": value}
    read = ItemFile(_written(tmp_path / f"i.{ending}", [row], json.dumps([row])), SCHEMA, None, tmp_path / "r.csv")
    assert read.rows[0][column or "price"] == (1.5 if value == "1.5" else None) and not read.rejected
    assert [column in said and "taken as missing" in said for said in read.changed] == [True] * bool(column)


def test_rows_by_the_schema_s_names(file, tmp_path):
    assert ItemFile(file, SCHEMA, None, tmp_path / "rejects.csv").rows == EXPECTED
    only = ItemFile(file, SCHEMA, None, tmp_path / "rejects.csv", ids_only=True)
    assert [row["item_id"] for row in only.rows] == ["a", "b"]


def test_rows_by_the_columns_of_a_mapping(tmp_path):
    (tmp_path / "mapping.toml").write_text(
        '[interactions]\nfiles = "e.csv"\nuser = "u"\nitem = "i"\ntime = "t"\n'
        '[items]\nfiles = "i.csv"\nitem = "sku"\ntitle = ["maker", "name"]\ncategorical = ["maker"]\n'
        'continuous = ["cost"]\nrename = { maker = "brand", cost = "price" }\n'
    )
    file = tmp_path / "items.csv"
    file.write_text("sku,maker,name,cost\na,Alto,shoe,12.5\n,Alto,none,1\na,Alto,again,1\n")
    read = ItemFile(file, SCHEMA, tmp_path / "mapping.toml", tmp_path / "rejects.csv")
    title = "Alto shoe"
    assert read.rows == [{"item_id": "a", "title": title, "text": title, "brand": "Alto", "price": 12.5}]
    assert dict(read.rejected) == {"items: missing item id": 1, "items: duplicate": 1}
    only = ItemFile(file, SCHEMA, tmp_path / "mapping.toml", tmp_path / "rejects.csv", ids_only=True)
    assert [row["item_id"] for row in only.rows] == ["a"]


def test_what_cannot_be_read_is_named(tmp_path):
    file = tmp_path / "items.jsonl"
    file.write_text('{"item_id": "a"}\n{"item_id"\n[1]\n{"item_id": "b", "colour": 1}\n')
    read = ItemFile(file, SCHEMA, None, tmp_path / "rejects.csv")
    assert len(read.rows) == 1 and [key.partition(":")[0] for key in read.rejected] == ["line 2", "line 3", "line 4"]
    with pytest.raises(FileNotFoundError, match="no file"):
        ItemFile(tmp_path / "none.csv", SCHEMA, None, tmp_path / "rejects.csv")
    (tmp_path / "other.csv").write_text("sku,title\na,b\n")
    with pytest.raises(ValueError, match="no column 'item_id'"):
        ItemFile(tmp_path / "other.csv", SCHEMA, None, tmp_path / "rejects.csv")


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_file_without_rows_and_a_row_too_large_are_named(ending, tmp_path):
    file, long = tmp_path / f"items.{ending}", "x" * MAX_ROW_BYTES
    file.write_text("item_id,title\n" if ending == "csv" else "\n")
    with pytest.raises(ValueError, match="found none"):
        ItemFile(file, SCHEMA, None, tmp_path / "rejects.csv")
    lines = [f"a,{long}", "b,hat"] if ending == "csv" else [json.dumps({"item_id": "a", "title": long}), ROW_OF_B]
    file.write_text("\n".join((["item_id,title"] if ending == "csv" else []) + lines) + "\n")
    read = ItemFile(file, SCHEMA, None, tmp_path / "rejects.csv")
    assert [row["item_id"] for row in read.rows] == ["b"]
    assert dict(read.rejected) == {f"row of more than {MAX_ROW_BYTES} bytes": 1}


def test_columns_that_the_catalogue_does_not_have_are_named(tmp_path):
    file = tmp_path / "items.csv"
    file.write_text("item_id,title,colour,price\na,shoe,red,1\n")
    read = ItemFile(file, SCHEMA, None, tmp_path / "rejects.csv")
    assert read.left_out == ["colour"] and read.rows[0]["price"] == 1.0
