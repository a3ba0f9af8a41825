"""Paths of the catalogue beside the reasons of an explanation."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.features import CATALOGUE_FILE
from vivace.cli.paths import in_common
from vivace.client import Explained
from vivace.client_explain import Explanation
from vivace.contract import ITEM, TITLE, DataSchema
from vivace.run import Run


def reason(item: str, effect: float | None) -> dict[str, object]:
    return {"kind": "history", "events": [item], "effect": effect}


def test_an_item_is_joined_to_what_it_hangs_on_and_to_nothing_else(tmp_path):
    run = Run(tmp_path)
    run.features.mkdir()
    (run.features / "schema.json").write_text(json.dumps(DataSchema("music", item_lists=("tags",)).to_json()))
    tags = [["doom", "metal"], ["doom"], ["metal"], []]
    table = {ITEM: list("abcd"), TITLE: ["Ahab", "Bell", "Cave", ""], "tags": pa.array(tags, pa.list_(pa.string()))}
    pq.write_table(pa.table(table), run.features / CATALOGUE_FILE)
    reasons = {"b": [reason("d", None), reason("a", 2.0)], "c": [reason("a", -1.0), reason("b", 1.0)], "d": []}
    items = [Explanation(item, 1.0, of, [], "") for item, of in reasons.items()]
    said = ["Bell and Ahab share tags: doom", "", ""]  # c shares a tag with a, whose loss would lift it
    assert in_common(run, Explained(items, "ok")) == said
    assert in_common(run, Explained(items[:1], "ok"), "zh") == ["Bell与Ahab的tags相同：doom"]
