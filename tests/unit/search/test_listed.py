"""Attributes of several values in search: filters, facets and features by hand, and rows that come later."""

from __future__ import annotations

import numpy as np
import pytest

from search.changes import ChangingIndex
from search.data import Catalogue
from search.features import feature_names, features
from search.hybrid import Filters, HybridIndex
from search.lexical import Field, Lexical
from search.online import read_catalogue, write_catalogue
from search.understanding import QueryUnderstanding
from tests.unit.search.test_changes import Live
from vivace.contract import FIRST_ID

GENRES = [["Drama", "War"], ["Comedy"], [], ["Comedy", "Drama"], ["Science Fiction"]]


@pytest.fixture
def catalogue() -> Catalogue:
    texts = {"title": ["red", "blue", "red", "red", "blue"], "genres": [" ".join(values) for values in GENRES]}
    return Catalogue(
        list("abcde"), texts, {"studio": ["x", "y", "x", "", "y"]}, popularity=np.ones(5), lists=dict(genres=GENRES)
    )


def _index(catalogue: Catalogue) -> HybridIndex:
    fields = [Field("title"), Field("genres")]
    return HybridIndex(catalogue, Lexical.build(catalogue.texts, fields), np.eye(5, dtype=np.float32))


def test_an_item_matches_by_any_of_its_values(catalogue, tmp_path):
    write_catalogue(catalogue, tmp_path)
    read = read_catalogue(tmp_path)
    assert read.lists == catalogue.lists
    index = _index(catalogue)
    allowed = lambda *values, **more: np.flatnonzero(index.allowed(Filters({"genres": values, **more}))).tolist()  # noqa: E731
    assert allowed("Drama") == [0, 3] and allowed("War", "Comedy") == [0, 1, 3] and allowed("Opera") == []
    assert allowed("Drama", studio=["x"]) == [0]
    with pytest.raises(ValueError, match=r"an attribute of \['genres', 'studio'\], got 'tags'"):
        index.allowed(Filters({"tags": ["x"]}))
    assert index.facets(np.array([0, 1, 2, 3]))["genres"] == [("Comedy", 2), ("Drama", 2), ("War", 1)]
    assert index.facets(np.array([2]))["genres"] == []


def test_a_value_that_a_query_names_is_a_feature_of_items_that_have_it(catalogue):
    index = _index(catalogue)
    understood = QueryUnderstanding.learn(list(catalogue.texts.values()), catalogue.values())("a science fiction")
    assert [(i.attribute, i.value) for i in understood.intents] == [("genres", "Science Fiction")]
    found = index.candidates(understood, index.vectors[0], 5)
    named = features(index, understood, index.vectors[0], found)[:, feature_names(index).index("named genres")]
    assert named.tolist() == [float(row == 4) for row in found.rows]


def test_a_row_that_comes_later_is_filtered_and_counted_by_its_values(catalogue):
    live = Live()
    changing = ChangingIndex(_index(catalogue), lambda texts: np.zeros((len(texts), 5), np.float32), live)
    live.put("new", 777, {"title": "red", "genres": ["Opera", "War"], "studio": None})
    live.put("a", FIRST_ID, {"title": "red", "genres": [], "studio": "x"})
    assert changing.refresh()
    index = changing.index
    assert changing.ids(np.flatnonzero(index.allowed(Filters({"genres": ["War"]})))).tolist() == [777]
    assert index.facets(np.flatnonzero(~index.shut_V))["genres"] == [
        ("Comedy", 2), ("Drama", 1), ("Science Fiction", 1), ("War", 1), ("Opera", 1),
    ]  # fmt: skip
