"""What stands for an item that is put in live is what training gives the same item of the catalogue."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import torch

from preprocessing.features import Features
from preprocessing.item_rows import parse_item
from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers.shop import Shop, ShopConfig
from serving.runtime.new_items import NewItem, NewItems
from tests.support import quiet
from training.data.counters import popularity
from training.data.new_items import new_item_tables
from training.learn.warm_start import free_unseen, new_retriever
from training.presets import tiny
from vivace.contract import FIRST_ID

CONFIG = ShopConfig(users=200, items=200, events=3000, seed=5)
NEW = 4
SAME = 0.9999  # cosine: the weights of the other items are those of a catalogue without the new ones
NEAR = 0.95  # where these change which of ten neighbours that are nearly alike is the last


class ShopWithNew(Shop):
    """The same shop with items that nobody has touched, described in words old and new."""

    def __init__(self) -> None:
        super().__init__(CONFIG)

    def items(self) -> pd.DataFrame:
        frame = super().items()
        more = frame.iloc[:: len(frame) // NEW][:NEW].copy()
        more["item_id"] = [f"new-{n}" for n in range(len(more))]
        more["title"] = [f"{t} word{n}" if n % 2 else t for n, t in enumerate(more["title"])]
        more.loc[more.index[0], "brand"] = None
        more["price"] = more["price"] * 1.5
        return pd.concat([frame, more], ignore_index=True)


def _trained(source, root):
    prepare(source, PrepareConfig(partitions=1), root, 5, quiet)
    features = Features(root / "features")
    counts = popularity(features.files("train"), features.item_count())
    torch.manual_seed(0)
    model = new_retriever(features, tiny(), counts)
    return features, counts, model


def test_a_live_item_has_the_vector_of_the_same_item_of_the_catalogue(tmp_path):
    features, counts, model = _trained(Shop(CONFIG), tmp_path / "without")
    later, later_counts, later_model = _trained(ShopWithNew(), tmp_path / "with")
    names, later_names = features.items()["item_id"].tolist(), later.items()["item_id"].tolist()
    place = {name: i + FIRST_ID for i, name in enumerate(names)}
    with torch.no_grad():  # both have learned the same of what both have
        for i, name in enumerate(later_names):
            if name in place:
                later_model.items.id.weight[i + FIRST_ID] = model.items.id.weight[place[name]]
                later_model.bias[i + FIRST_ID] = model.bias[place[name]]
    free_unseen(model, counts, features, by_neighbours=True)
    free_unseen(later_model, later_counts, later, by_neighbours=True)
    new_item_tables(features, model, counts).save(tmp_path)
    new_items = NewItems.load(tmp_path)
    catalogue = pd.read_parquet(later.folder / "catalogue.parquet")
    rows = json.loads(catalogue[catalogue["item_id"].str.startswith("new-")].to_json(orient="records"))
    assert len(rows) == NEW
    parsed = [parse_item(row, later.schema) for row in rows]
    same = 0
    for row, item in zip(parsed, new_items(parsed), strict=True):
        assert item is not None
        at = later_names.index(row["item_id"]) + FIRST_ID
        trained = later_model.table()[at].detach().numpy()
        cosine = item.vector @ trained / np.linalg.norm(item.vector) / np.linalg.norm(trained)
        assert cosine > NEAR, (row, cosine)
        same += cosine > SAME
        if cosine < SAME:
            continue
        np.testing.assert_allclose(np.linalg.norm(item.vector), np.linalg.norm(trained), rtol=0.01)
        np.testing.assert_allclose(item.bias, later_model.bias[at].item(), atol=0.02)
        again = NewItem.from_bytes(item.to_bytes())
        assert (again.bias, again.nearest) == (np.float32(item.bias), item.nearest)
        np.testing.assert_array_equal(again.vector, item.vector)
        assert counts[item.nearest] > 0
    assert same >= NEW - 1


def test_attributes_are_encoded_as_prepare_encodes_them(features, root):
    counts = popularity(features.files("train"), features.item_count())
    model = new_retriever(features, tiny(), counts)
    tables = new_item_tables(features, model, counts)
    raw, encoded = pd.read_parquet(features.folder / "catalogue.parquet"), features.items()
    schema, new_items = features.schema, NewItems(tables)
    for row, (_, of_prepare) in zip(json.loads(raw.to_json(orient="records")), encoded.iterrows(), strict=True):
        ids, _, numbers = new_items.attributes(row)
        assert ids.tolist() == [of_prepare[name] for name in schema.item_categoricals]
        np.testing.assert_allclose(numbers, [of_prepare[name] for name in schema.item_continuous], atol=1e-5)
    ids, *_ = new_items.attributes({"category": "never seen", "brand": None})
    assert ids.tolist() == [2, 1]


def test_a_row_that_shares_nothing_has_no_vector(features):
    counts = popularity(features.files("train"), features.item_count())
    tables = new_item_tables(features, new_retriever(features, tiny(), counts), counts)
    strange, known = parse_item({"item_id": "x", "title": "qwrtz zxcvb"}, features.schema), features.items()["title"][3]
    nothing, something = NewItems(tables)([strange, {**strange, "text": known}])
    assert nothing is None and something is not None
