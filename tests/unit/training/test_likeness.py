"""What two items lack is no likeness, in training as in a server: null attributes, empty lists, unknown values."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest
import torch

from preprocessing.features import Features
from preprocessing.item_rows import parse_item
from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers.tables import Tables
from serving.runtime.new_items import NewItem, NewItems, attribute_shares
from tests.unit.preprocessing.tables import HEAD, write
from training.data.counters import popularity
from training.data.new_items import new_item_tables
from training.models.encoders import EncoderConfig
from training.models.item_table import nearest_seen
from training.models.retrieval import RetrievalModel
from vivace.contract import FIRST_ID, NULL_ID, OOV_ID

# brand, genres, colour; A to D are clicked, the others are not
ITEMS = {
    "A": ("Alto", "", ""), "B": ("", "War", ""), "C": ("", "", ""), "D": ("", "", "red"),
    "likeA": ("Alto", "", ""), "likeB": ("", "War|Love", ""), "nothing": ("", "", ""), "alone": ("Brio", "", ""),
}  # fmt: skip
LIKE = {"likeA": "A", "likeB": "B"}  # the others are like no seen item


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    folder = tmp_path_factory.mktemp("likeness")
    events = "".join(f"u{i % 9},{'ABCD'[i % 4]},{1_700_000_000 + i}\n" for i in range(80))
    write(folder, "e.csv", "user,item,ts\n" + events)
    rows = "".join(f"{name},{','.join(values)}\n" for name, values in ITEMS.items())
    write(folder, "i.csv", "item,brand,genres,colour\n" + rows)
    keys = '[items]\nfiles = "i.csv"\nitem = "item"\ncategorical = ["brand", "colour"]\nlists = "genres"\n'
    write(folder, "mapping.toml", HEAD.format(events="e.csv") + keys)
    prepare(Tables(folder / "mapping.toml"), PrepareConfig(partitions=1), folder / "run", 0, lambda _: None)
    return Features(folder / "run" / "features")


def test_what_both_lack_makes_no_neighbours_in_training(features):
    names, counts = features.items()["item_id"].tolist(), popularity(features.files("train"), features.item_count())
    ids, neighbours, share = nearest_seen(features, counts > 0)
    taken = {
        names[i - FIRST_ID]: {names[n - FIRST_ID] for n, w in zip(near, weights, strict=True) if w > 0}
        for i, near, weights in zip(ids, neighbours, share, strict=True)
    }
    assert taken == {name: {like} for name, like in LIKE.items()}


def test_a_server_takes_the_same(features):
    counts = popularity(features.files("train"), features.item_count())
    retriever = RetrievalModel(EncoderConfig(width=8, heads=2, layers=1), features.item_count(), torch.tensor(counts))
    new_items, names = NewItems(new_item_tables(features, retriever, counts)), features.items()["item_id"].tolist()
    raw = json.loads(pd.read_parquet(features.folder / "catalogue.parquet").to_json(orient="records"))
    rows = [parse_item(row, features.schema) for row in raw if row["item_id"] not in "ABCD"]
    rows.append(parse_item({"item_id": "strange", "brand": "never seen", "genres": ["unheard"]}, features.schema))
    taken = dict(zip([row["item_id"] for row in rows], new_items(rows), strict=True))
    assert {name: names[item.nearest - FIRST_ID] for name, item in taken.items() if item} == LIKE
    for name, like in LIKE.items():  # of one neighbour alone: its vector as it is
        torch.testing.assert_close(
            torch.from_numpy(taken[name].vector), retriever.table()[names.index(like) + FIRST_ID]
        )


def test_shares_by_hand():
    half = 1 / math.sqrt(2)
    assert attribute_shares({"brand": [5], "tags": [3, 4]}) == ({"brand=5": half, "tags=3": 0.5, "tags=4": 0.5}, True)
    assert attribute_shares({"brand": [5], "tags": [NULL_ID]}) == ({"brand=5": 1.0}, True)
    assert attribute_shares({"brand": [5], "tags": [OOV_ID]}) == ({"brand=5": half}, True)
    assert attribute_shares({"brand": [NULL_ID], "tags": [NULL_ID]}) == ({}, False)


def test_a_vector_does_not_depend_on_the_rows_beside_it_nor_on_what_came_before(features):
    counts = popularity(features.files("train"), features.item_count())
    retriever = RetrievalModel(EncoderConfig(width=8, heads=2, layers=1), features.item_count(), torch.tensor(counts))
    tables = new_item_tables(features, retriever, counts)
    described = [("Alto", ["War"]), (None, ["War", "Love"]), ("Alto", []), ("strange", ["unheard"]), (None, ["War"])]
    rows = [
        parse_item({"item_id": str(n), "brand": brand, "genres": genres, "colour": "red"[: n % 2 * 3]}, features.schema)
        for n, (brand, genres) in enumerate(described * 2)
    ]
    raw = [item and item.to_bytes() for item in NewItems(tables)(rows)]
    kept = NewItems(tables)
    assert [(item := kept([row])[0]) and item.to_bytes() for row in rows] == raw  # alone
    assert [(item := kept([row])[0]) and item.to_bytes() for row in rows] == raw  # again
    assert len(set(raw)) > 5 and NewItem.from_bytes(raw[0]).to_bytes() == raw[0]
