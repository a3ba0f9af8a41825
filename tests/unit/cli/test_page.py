"""The page beside its server: what it shows of an item, and where it listens."""

from __future__ import annotations

import pandas as pd
import pytest
import typer

from preprocessing.features import CATALOGUE_FILE, SCHEMA_FILE
from vivace.cli.page.catalogue import LISTED, Catalogue
from vivace.cli.ui import LOOPBACK, listen
from vivace.contract import ITEM, TITLE, DataSchema, TaskHead
from vivace.manifest import write_json
from vivace.run import Run

COMMON = ["rock", "indie", "80s", "live", "pop"]


@pytest.fixture
def catalogue(tmp_path):
    """Most items have the first of the common tags, fewer the others; a has two that nobody else has."""
    run = Run(tmp_path)
    run.features.mkdir()
    run.feature_store.mkdir()
    lists = ("tags",)
    schema = DataSchema(
        name="m", item_categoricals=("label",), item_lists=lists, item_continuous=("length", "made_ms"),
        heads=(TaskHead("play", 0.0),),
    )  # fmt: skip
    write_json(run.features / SCHEMA_FILE, schema.to_json())
    tags = [["a whim", *COMMON, "zither"], COMMON[:1], COMMON[:2], COMMON, None]
    rows = {ITEM: list("abcde"), TITLE: list("ABCDE"), "label": ["Food, drinks", "", None, "281", ""], "tags": tags}
    rows |= {"length": [None, None, None, 2.5, None], "made_ms": [None, None, None, 1506988116110.0, None]}
    pd.DataFrame(rows).to_parquet(run.features / CATALOGUE_FILE)
    return Catalogue(run)


def test_of_many_values_the_common_ones_are_shown_and_the_others_counted(catalogue):
    first, second, third, fourth, bare = catalogue.cards(list("abcde"))
    assert len(COMMON) == LISTED
    assert first["attributes"] == {"label": "Food, drinks", "tags": "rock, indie, 80s, live, pop and 2 more"}
    assert third["attributes"] == {"tags": "rock, indie"} and bare["attributes"] == {}
    assert list(fourth["attributes"].values())[::2] == ["label 281", "length 2.5"]  # numbers with what they are of
    assert fourth["attributes"]["made_ms"] == "made 2017-10-02"
    assert [card["kind"] for card in (first, second, fourth, bare)] == ["Food, drinks", "rock", "label 281", ""]
    assert catalogue.cards(["unknown"])[0] == {
        "id": "unknown", "title": "unknown", "price": None, "attributes": {}, "kind": "", "new": False
    }  # fmt: skip


def test_a_port_that_is_taken_is_refused_with_a_way_out():
    with listen(LOOPBACK, 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(typer.BadParameter, match=f"{port} is taken.* 0 for a free one"):
            listen(LOOPBACK, port)
