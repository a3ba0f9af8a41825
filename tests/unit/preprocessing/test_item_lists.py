"""List attributes: how odd cells are read, and the ids they get, by hand."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from preprocessing.features import Features
from preprocessing.item_file import ItemFile
from preprocessing.item_lists import list_ids, padded
from preprocessing.item_rows import digest, list_values, parse_item, parse_item_json, to_json
from preprocessing.items import ITEM_WORKFLOW, described, encoded
from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers.tables import Tables
from preprocessing.refresh import read_catalogue
from preprocessing.workflow import load_workflow
from tests.unit.preprocessing.tables import HEAD, read, write
from vivace.contract import FIRST_ID, MAX_VALUES, NULL_ID, OOV_ID, DataSchema

SCHEMA = DataSchema("films", item_lists=("genres", "tags"), list_separators=("|", ","))
EVENTS = "user,item,ts\n" + "".join(f"u{i % 3},{'ABCDE'[i % 5]},{1_700_000_000 + i}\n" for i in range(30))
ITEMS = '[items]\nfiles = "{items}"\nitem = "item"\nlists = ["genres", "tags"]\nseparator = {{ tags = "," }}\n'
CELLS = [" Drama | Comedy ", "Comedy||Comedy", "", None, "|"]
GENRES = [["Comedy", "Drama"], ["Comedy"], [], [], []]
TAGS = [["1", "2"], ["2"], [], [], ["7"]]


def _csv() -> str:
    cells = ["" if cell is None else cell for cell in CELLS]
    tags = ['"2,1"', "2", "", "", "7"]
    return "item,genres,tags\n" + "".join(f"{i},{g},{t}\n" for i, g, t in zip("ABCDE", cells, tags, strict=True))


def _parquet() -> pa.Table:
    genres = [["Drama", " Comedy"], ["Comedy", None, "", "Comedy"], [], None, [None]]
    tags = pa.array([[2, 1], [2], None, None, [7]], pa.list_(pa.int64()))
    return pa.table({"item": list("ABCDE"), "genres": genres, "tags": tags})


@pytest.mark.parametrize("items", [_csv(), _parquet()], ids=["csv", "parquet"])
def test_odd_cells_are_tidied_and_counted(tmp_path, items):
    out = read(tmp_path, EVENTS, items, item_keys=ITEMS)
    assert out.items["genres"].tolist() == GENRES and out.items["tags"].tolist() == TAGS
    tidied = {reason: n for (table, reason), n in out.rejects.changed.items() if table == "items"}
    assert tidied["blanks, empty parts or repeats in genres removed"] == 3  # " Drama | Comedy ", "Comedy||Comedy", "|"


def test_what_is_no_list_is_refused_with_file_and_column(tmp_path):
    for items, says in (
        ("item,genres,tags\nA,\"['Drama', 'Comedy']\",x\n", r"i.csv: column 'genres': .* a list written as text"),
        (
            pa.table({"item": ["A"], "genres": [[["Drama"]]], "tags": ["x"]}),
            r"i.parquet: column 'genres': expected sing",
        ),
        (
            pa.table({"item": ["A"], "genres": [{"a": 1}], "tags": ["x"]}),
            r"i.parquet: column 'genres': expected single",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            read(tmp_path, EVENTS, items, item_keys=ITEMS)
    out = read(tmp_path, EVENTS, "item,genres,tags\nA,a;b,x\nB,b;c,x\n", item_keys=ITEMS)
    assert "no value has the separator '|', most have ';': set separator in [items]" in out.rejects.notes[0]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ('lists = ["a"]\ncategorical = ["a"]\n', r"\[items\] lists: 'a' is among categorical too"),
        ('separator = ","\n', r"\[items\] separator: expected columns under lists"),
        ('lists = ["a"]\nseparator = { b = "," }\n', r"\[items\] separator: 'b' is not among lists \['a'\]"),
        ('lists = ["a"]\nseparator = ""\n', r"\[items\] separator: expected a text"),
        ('lists = ["a"]\nseparator = 3\n', r"\[items\] separator: expected a text, or a text for each"),
        ('lists = ["title"]\n', r"\[items\] column 'title' cannot be called"),
    ],
)
def test_wrong_keys_are_named(tmp_path, keys, says):
    write(tmp_path, "mapping.toml", HEAD.format(events="e.csv") + '[items]\nfiles = "i.csv"\nitem = "item"\n' + keys)
    with pytest.raises(ValueError, match=says):
        Tables(tmp_path / "mapping.toml")


def test_a_row_means_what_the_same_row_of_a_file_means(tmp_path):
    as_text, as_list = ({"item_id": "A", "genres": g, "tags": t} for g, t in ((" Drama|Comedy|", "2, 1"),
                        (["Comedy", "Drama", "Drama", None], [1, 2.0])))  # fmt: skip
    rows = [parse_item_json(json.dumps(row).encode(), SCHEMA) for row in (as_text, as_list)]
    assert rows[0] == rows[1] and rows[0]["genres"] == ["Comedy", "Drama"] and rows[0]["tags"] == ["1", "2"]
    assert digest(to_json(rows[0])) == digest(to_json(parse_item({**as_list, "tags": np.array(["2", "1"])}, SCHEMA)))
    for name, content in (
        ("rows.jsonl", json.dumps(as_list)),
        ("rows.csv", 'item_id,genres,tags\nA,Drama|Comedy,"2,1"\n'),
    ):
        write(tmp_path, name, content)
        assert ItemFile(tmp_path / name, SCHEMA, None, tmp_path / "rejects.csv").rows == rows[:1]
    assert parse_item({"item_id": "A"}, SCHEMA)["genres"] == []
    for wrong in ({"a": 1}, [["a"]], [{"a": 1}]):
        with pytest.raises(ValueError, match=r"genres.*: expected a"):
            parse_item({"item_id": "A", "genres": wrong}, SCHEMA)


def test_ids_by_hand():
    assert list_ids([5, 3, 5], 3) == [3, 5] == list_ids([3, 5, OOV_ID], 3)
    assert list_ids([OOV_ID, OOV_ID], 2) == [OOV_ID] and list_ids([], 0) == [NULL_ID]
    assert list_ids(range(40, 2, -1), 38) == list(range(3, 3 + MAX_VALUES))
    assert padded([[3, 5], [1]])[:, :3].tolist() == [[3, 5, 0], [1, 0, 0]]
    assert list_values("a", "x", "|") == ["a"] and list_values(float("nan"), "x", "|") == []


@pytest.mark.parametrize("empty", [False, True])
def test_prepare_encodes_lists(tmp_path, empty):
    many = "|".join(f"g{i}" for i in range(20))
    genres = ["", "", "", "", ""] if empty else ["Drama|Comedy", "Comedy", "", many, "Drama|Comedy|War"]
    text = "item,genres,tags\n" + "".join(f"{i},{g},t\n" for i, g in zip("ABCDE", genres, strict=True))
    read(tmp_path, EVENTS, text, item_keys=ITEMS)
    source = Tables(tmp_path / "mapping.toml")
    done = prepare(source, PrepareConfig(partitions=1), tmp_path / "out", 0, lambda _: None)
    features = Features(tmp_path / "out" / "features")
    raw = pd.read_parquet(features.folder / "catalogue.parquet").set_index("item_id")
    ids = features.items().set_index("item_id")["genres"]
    assert features.schema == source.schema and features.list_values()["tags"] == ["t"]
    if empty:
        assert all(x.tolist() == [NULL_ID] for x in ids) and all(len(x) == 0 for x in raw["genres"])
        return
    later = tmp_path / "later.csv"
    write(tmp_path, later.name, "item_id,title,genres,tags\nF,New,Drama|Unheard|Comedy,\nG,New,Unheard,t\n")
    listed = described(read_catalogue(later, source.schema, tmp_path / "rejects.csv"), source.schema)
    workflow = load_workflow(features.folder / ITEM_WORKFLOW)
    new = encoded(workflow, listed, source.schema)
    assert [x.tolist() for x in new["genres"]] == [[FIRST_ID, FIRST_ID + 1], [OOV_ID]]
    assert [x.tolist() for x in new["tags"]] == [[NULL_ID], [FIRST_ID]]
    assert encoded(workflow, listed[:0].reset_index(drop=True), source.schema).empty
    values = features.list_values()["genres"]
    assert values[:2] == ["Comedy", "Drama"] and len(values) == 23
    assert ids["A"].tolist() == [FIRST_ID, FIRST_ID + 1] and ids["B"].tolist() == [FIRST_ID]
    assert ids["C"].tolist() == [NULL_ID] and raw["genres"]["C"].tolist() == []
    assert len(ids["D"]) == MAX_VALUES and len(raw["genres"]["D"]) == 20
    assert any(
        "genres: 1 items have more than 16 values" in n and "4 values are left" in n for n in done["results"]["notes"]
    )


@pytest.mark.parametrize("printed", ["[1, 2]", "[rot, blau]", "{rot,blau}", '{"a","b"}', "('a', 'b')", " [] "])
def test_a_list_that_was_printed_is_refused_whatever_printed_it(printed):
    with pytest.raises(ValueError, match="a list written as text"):
        list_values(printed, "tags", ",")


def test_a_value_in_parentheses_is_a_value_and_true_has_one_spelling():
    assert list_values("(live)|TRUE|true", "tags", "|") == ["(live)", "true"]
