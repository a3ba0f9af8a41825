"""Paths of a version's catalogue beside the reasons of an explanation."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from serving.runtime.paths import Paths
from serving.runtime.response import ResponseStage
from serving.runtime.ruled import ATTRIBUTES, SCHEMA, write_attributes
from serving.runtime.variants import Part
from serving.runtime.why import Because, Reason, record
from vivace.contract import FIRST_ID, ITEM, TITLE, DataSchema
from vivace.explain_contract import CONTEXT, HISTORY

NAMES = np.array([b""] * FIRST_ID + [b"a", b"b", b"c", b"d"], object)
TITLES = {"a": "Ahab", "b": "Bell", "c": "Cave", "d": ""}


def hangs_on(item: str, **drops: float) -> Because:
    return Because(item, 1, 1.0, tuple(Reason(Part(HISTORY, of), drop, 2) for of, drop in drops.items()), ())


def test_an_item_is_joined_to_what_it_hangs_on_and_to_nothing_else(tmp_path):
    respond = ResponseStage(NAMES)
    assert Paths.of(tmp_path, respond) is None  # an older version
    schema = DataSchema("music", item_lists=("tags",), item_continuous=("price",))
    tags = [["doom", "metal"], ["doom"], ["metal"], []]
    table = {ITEM: list("abcd"), TITLE: ["Ahab", "Bell", "Cave", ""], "tags": pa.array(tags, pa.list_(pa.string()))}
    pq.write_table(pa.table({**table, "price": [1.0, 1.0, 1.0, 1.0]}), tmp_path / "catalogue.parquet")
    write_attributes(tmp_path / "catalogue.parquet", schema, tmp_path / ATTRIBUTES)
    (tmp_path / SCHEMA).write_text(json.dumps(schema.to_json()))
    paths = Paths.of(tmp_path, respond)
    assert paths is not None
    of = hangs_on("b", d=math.inf, a=2.0)
    assert record(of, [], TITLES, path=paths(of))["path"] == {
        "item": "a", "relation": "tags", "value": "doom", "others": 0, "sentence": "Bell and Ahab share tags: doom",
    }  # fmt: skip
    assert record(of, [], TITLES, "zh", paths(of))["path"]["sentence"] == "Bell与Ahab的tags相同：doom"
    lifted = hangs_on("c", b=1.0, a=-1.0)  # c shares a tag with a, whose loss would lift it
    ruled = Because("b", 1, 1.0, hangs_on("b", a=2.0).reasons, (), ruled=True)
    moment = Because("b", 1, 1.0, (Reason(Part(CONTEXT, "a", "phone"), 2.0, 3),), ())
    for without in (lifted, ruled, moment, hangs_on("d")):
        assert paths(without) is None and "path" not in record(without, [], TITLES, path=paths(without))
