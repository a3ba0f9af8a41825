"""A search index that follows changes: what is put in is found by words, what is taken out is not, the rest stays."""

from __future__ import annotations

import numpy as np
import pytest

from search import changes
from search.changes import ChangingIndex
from search.data import Catalogue
from search.features import features
from search.hybrid import LEXICAL, Filters, HybridIndex
from search.lexical import Field, Lexical
from search.understanding import QueryUnderstanding
from vivace.contract import FIRST_ID

TITLES = ["red shoe", "blue shoe", "red hat", "green scarf", "blue hat", "red scarf"] * 4
COLOURS = [t.split()[0] for t in TITLES]
FIELDS = [Field("title", 2.0), Field("colour")]


class Live:
    def __init__(self) -> None:
        self.number = 0
        self.rows: dict = {}
        self.ids: dict[str, int] = {}

    def refresh(self) -> None: ...

    def put(self, item: str, id_: int, row: dict | None) -> None:
        self.number += 1
        self.rows[item], self.ids[item] = row, id_


@pytest.fixture
def catalogue():
    numbers = {"price": np.arange(len(TITLES), dtype=np.float32)}
    texts = {"title": TITLES, "colour": COLOURS}
    items = [f"sku{i}" for i in range(len(TITLES))]
    return Catalogue(items, texts, {"colour": COLOURS}, numbers, np.ones(len(TITLES), np.float32))


@pytest.fixture
def base(catalogue):
    return HybridIndex(catalogue, Lexical.build(catalogue.texts, FIELDS), np.eye(len(TITLES), dtype=np.float32))


@pytest.fixture
def live():
    return Live()


@pytest.fixture
def index(base, live):
    return ChangingIndex(base, lambda texts: np.eye(len(TITLES), dtype=np.float32)[: len(texts)], live)


def found(changing: ChangingIndex, query: str, count: int = 50, filters: Filters | None = None) -> list[str]:
    """Items by words, best first."""
    index = changing.index
    understood = QueryUnderstanding.learn([TITLES], {})(query)
    candidates = index.candidates(understood, None, count, index.allowed(filters or Filters()))
    order = np.argsort(np.where(candidates.rank[LEXICAL] < 0, 999, candidates.rank[LEXICAL]), kind="stable")
    hits = [r for r, p in zip(candidates.rows[order], candidates.rank[LEXICAL][order], strict=True) if p >= 0]
    return [index.catalogue.items[r] for r in hits]


def test_what_is_put_in_is_found_with_its_values_and_the_others_keep_their_order(index, live):
    before = found(index, "red shoe")
    live.put("new", 777, {"title": "red shoe zebra", "colour": "crimson", "price": 12.5})
    assert index.refresh() and not index.refresh()
    after = found(index, "red shoe")
    assert [item for item in after if item != "new"] == before and "new" in after
    assert found(index, "zebra") == ["new"]
    assert found(index, "zebra", filters=Filters(ranges={"price": (12, 13)}, values={"colour": ["crimson"]})) == ["new"]
    assert found(index, "zebra", filters=Filters(ranges={"price": (13, None)})) == []
    row = index.index.catalogue.items.index("new")
    assert index.ids(np.array([0, row])).tolist() == [FIRST_ID, 777] and index.rows_of([777, FIRST_ID, 0]) == [row, 0]
    understood = QueryUnderstanding.learn([TITLES], {"colour": COLOURS})("red shoe")
    candidates = index.index.candidates(understood, np.ones(len(TITLES), np.float32), 40)
    x = features(index.index, understood, np.ones(len(TITLES), np.float32), candidates)
    assert np.isfinite(x).all() and len(x) == len(candidates.rows)


def test_weights_are_those_of_an_index_that_had_the_row(catalogue, base, index, live):
    """A copy of a row weighs as the row does."""
    live.put("copy", 777, {"title": "green scarf", "colour": "green", "price": 1.0})
    index.refresh()
    lexical = index.index.lexical
    np.testing.assert_allclose(lexical(["green", "scarf"])[-1], base.lexical(["green", "scarf"])[3], rtol=1e-6)
    np.testing.assert_array_equal(lexical(["green", "scarf"])[:-1], base.lexical(["green", "scarf"]))
    for a, b in zip(lexical.weights, base.lexical.weights, strict=True):
        np.testing.assert_array_equal(a[: b.shape[0], : b.shape[1]].toarray(), b.toarray())


def test_another_row_takes_the_place_of_the_old_and_what_is_taken_out_is_shut_at_once(index, live, monkeypatch):
    monkeypatch.setattr(changes, "LEAST_S", 3600.0)
    live.put("sku0", FIRST_ID, {"title": "purple shoe", "colour": "purple", "price": 99.0})
    index.refresh()
    assert "sku0" not in found(index, "red") and found(index, "purple") == ["sku0"]
    assert index.index.facets(np.array([len(TITLES)]))["colour"] == [("purple", 1)]
    live.put("sku0", FIRST_ID, None)
    live.put("sku1", FIRST_ID + 1, None)
    assert not index.refresh()  # too soon for another index
    assert found(index, "purple") == [] and "sku1" not in found(index, "blue shoe")
    monkeypatch.setattr(changes, "LEAST_S", 0.0)
    monkeypatch.setattr(changes, "SHARE", 0.0)
    live.put("sku1", FIRST_ID + 1, {"title": "blue shoe", "colour": "blue", "price": 1.0})
    assert index.refresh() and "sku1" in found(index, "blue shoe")


def test_a_word_that_came_later_is_no_error():
    understanding = QueryUnderstanding.learn([["kettle lamp"] * 3], {"brand": ["Alto"]})
    assert understanding("kettie").corrected == {"kettie": "kettle"}
    understanding.learn_more(["Kettie deluxe"], {"brand": ["Largo Nova"]})
    assert understanding("kettie").corrected == {}
    assert [(i.attribute, i.value) for i in understanding("largo nova lamp").intents] == [("brand", "Largo Nova")]
