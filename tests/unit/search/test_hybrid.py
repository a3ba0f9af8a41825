"""Fusion, filters, facets, diversity by hand; the ranker, clicks with a known bias; metrics by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from search.data import Catalogue, Judgments, read_esci
from search.features import feature_names, features, personal
from search.hybrid import DENSE, LEXICAL, MATCHED, POPULAR, Filters, HybridIndex, diversify, fuse, top
from search.lexical import Field, Lexical
from search.log import SearchLog
from search.propensity import inverse_propensity, propensities
from search.understanding import QueryUnderstanding
from training.search.evaluate import judge, ndcg
from vivace import contract

TITLES = ["red shoe", "blue shoe", "red hat", "green scarf", "blue hat", "red scarf"]
COLOURS = ["red", "blue", "red", "green", "blue", "red"]


@pytest.fixture(scope="module")
def catalogue():
    return Catalogue(
        [f"sku{i}" for i in range(6)],
        {"title": TITLES},
        {"colour": COLOURS},
        {"price": np.array([10, 20, 30, 40, np.nan, 60], np.float32)},
        np.arange(6, dtype=np.float32),
    )


@pytest.fixture(scope="module")
def index(catalogue):
    vectors = np.eye(6, dtype=np.float32)
    return HybridIndex(catalogue, Lexical.build(catalogue.texts, [Field("title")]), vectors)


@pytest.fixture(scope="module")
def understanding(catalogue):
    return QueryUnderstanding.learn([TITLES], catalogue.attributes)


def test_reciprocal_ranks_by_hand():
    found = fuse({"a": np.array([7, 3]), "b": np.array([3, 9])}, 3)
    assert found.rows.tolist() == [3, 7, 9]
    assert found.fused == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62])
    assert found.rank["a"].tolist() == [1, 0, -1] and found.found_by(0) == ["a", "b"] and found.found_by(2) == ["b"]
    assert fuse({"a": np.array([7, 3]), "b": np.array([3, 9])}, 3, {"b": 0.0}).rows[0] == 7


def test_the_best_rows_ties_by_row():
    scores = np.array([1, 3, 3, -np.inf, 2], np.float32)
    assert top(scores, 3).tolist() == [1, 2, 4] and top(scores, 9).tolist() == [1, 2, 4, 0]
    assert top(np.full(3, -np.inf, np.float32), 2).tolist() == []


def test_branches_find_and_say_so(index, understanding):
    found = index.candidates(understanding("red shoe"), index.vectors[3], 6)
    assert found.rows[0] in (0, 3) and set(found.rows) == set(range(6))
    place = found.rows.tolist().index(0)
    assert LEXICAL in found.found_by(place) and DENSE in found.found_by(place)
    nothing = index.candidates(understanding("😀"), None, 3)
    assert nothing.rows.tolist() == [5, 4, 3] and nothing.found_by(0) == [POPULAR]


def test_a_broad_query_finds_what_is_popular_among_its_matches(index, understanding, catalogue):
    place = lambda found: found.rows[np.argsort(found.rank[MATCHED])][(found.rank[MATCHED] < 0).sum() :].tolist()  # noqa: E731
    vector = index.vectors[3]
    assert place(index.candidates(understanding("red"), vector)) == [5, 2, 0]  # sku5 is the most popular
    assert place(index.candidates(understanding("red shoe"), vector)) == [0, 5, 2, 1]  # both terms, then one
    assert MATCHED not in index.candidates(understanding("red"), None).rank
    unknown = HybridIndex(replace(catalogue, popularity=None), index.lexical, index.vectors)
    unwanted = HybridIndex(catalogue, index.lexical, index.vectors, {MATCHED: 0.0})
    for other in (unknown, unwanted):
        assert MATCHED not in other.candidates(understanding("red"), vector).rank
        assert len(feature_names(other)) == len(feature_names(index)) - 1


def test_a_narrow_filter_still_fills_the_answer(index, understanding):
    allowed = index.allowed(Filters({"colour": ["blue", "green"]}, {"price": (15, None)}, [3]))
    assert np.flatnonzero(allowed).tolist() == [1]  # 4 has no price, 3 was seen
    wide = index.allowed(Filters({"colour": ["red"]}))
    found = index.candidates(understanding("scarf"), index.vectors[3], 3, wide)
    assert len(found.rows) == 3 and set(found.rows) == {0, 2, 5}
    for bad, said in ((Filters({"size": ["1"]}), "an attribute"), (Filters({}, {"weight": (0, 1)}), "a number")):
        with pytest.raises(ValueError, match=said):
            index.allowed(bad)


def test_facets_count_what_matches(index, understanding):
    rows = index.candidates(understanding("red"), None).matches
    assert rows.tolist() == [0, 2, 5] and index.facets(rows) == {"colour": [("red", 3)]}
    both = index.candidates(understanding("shoe hat"), None)
    assert index.facets(both.matches)["colour"] == [("blue", 2), ("red", 2)]
    own = index.candidates(understanding("red"), None, allowed_V=np.arange(6) > 1)
    assert own.matches.tolist() == [2, 5] and own.fields_FN.shape == (len(index.lexical.fields), 4)


@pytest.mark.parametrize("items", [0, 1, 64, 200, 2000])
def test_the_best_are_those_of_a_whole_sort(items):
    rng = np.random.default_rng(items)
    for scores_V in (rng.normal(size=items), rng.integers(0, 4, items), np.where(rng.random(items) < 0.9, -np.inf, 1)):
        whole = [i for i in np.argsort(-scores_V, kind="stable").tolist() if np.isfinite(scores_V[i])]
        for count in (0, 1, 7, 30, 5000):
            assert top(scores_V.astype(np.float32), count).tolist() == whole[:count]


def test_marginal_relevance_by_hand():
    vectors = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    scores = np.array([1.0, 0.9, 0.0])
    assert diversify(scores, vectors, 3, 0.0).tolist() == [0, 1, 2]
    assert diversify(scores, vectors, 2, 0.5).tolist() == [0, 2]  # 1: .45 - .5; 2: 0 - 0
    assert diversify(np.zeros(0), np.zeros((0, 2)), 3, 0.5).tolist() == []
    with pytest.raises(ValueError, match="expected 0"):
        diversify(scores, vectors, 2, 1.5)


def test_features_are_named(index, understanding):
    u = understanding("red shoes")
    found = index.candidates(u, index.vectors[0], 6)
    x = features(index, u, index.vectors[0], found)
    names = feature_names(index)
    assert x.shape == (6, len(names))
    best = x[found.rows.tolist().index(0)]
    assert best[names.index("in title")] == 1 and best[names.index("named colour")] == 1
    assert best[names.index("dense")] == 1 and best[names.index("bm25 of the best")] == 1


def test_where_query_and_history_meet_by_hand():
    x = np.zeros((3, 4), np.float32)
    filled, at = personal(x, np.array([8, 5, 9]), np.array([5, 7, 8, 0]), np.array([3.0, 2.0, 1.0, -9.0]))
    assert at.tolist() == [2, 0, -1] and not x.any()
    assert filled[:, 2] == pytest.approx([10 / 12, 1, 0]) and filled[:, 3] == pytest.approx([0, 1, 0])


def test_position_bias_is_found_and_taken_out_of_clicks():
    """Simulated: the chance to be looked at falls as 1, 1/2, 1/3 ..; clicks on what is relevant. Each query's items
    are mostly shown in an order that hides the good ones, as an old ranker would."""
    rng = np.random.default_rng(3)
    queries, items, seen = 300, 5, 1 / np.arange(1, 6)
    relevant = rng.uniform(0.05, 0.9, (queries, items))
    pair, position, clicked = [], [], []
    for _ in range(150):
        places = np.argsort(np.argsort(relevant + rng.normal(0, 0.3, relevant.shape), axis=1), axis=1)  # worst first
        pair.append(np.arange(queries * items))
        position.append(places.ravel())
        clicked.append((rng.random(relevant.shape) < relevant * seen[places]).ravel())
    pair, position, clicked = (np.concatenate(v) for v in (pair, position, clicked))
    found = propensities(pair, position, clicked)
    assert found == pytest.approx(seen, abs=0.05)
    weight = inverse_propensity(clicked, position, found)

    def right(value: np.ndarray) -> float:
        """Share of queries whose best item has the most."""
        total = np.bincount(pair, value).reshape(queries, items)
        return float((total.argmax(1) == relevant.argmax(1)).mean())

    assert right(weight) > right(clicked.astype(float)) + 0.25


def test_a_log_of_searches_by_hand():
    rows = [("s1", "Red Shoe", 3, 1, False), ("s1", "Red Shoe", 4, 2, True), ("s1", "Red Shoe", 5, 3, False),
            ("s2", "hat", 6, 1, False), ("s3", "red shoe", 4, 1, True), ("s3", "red shoe", 3, 4, True)]  # fmt: skip
    log = SearchLog.of(
        pd.DataFrame(
            rows, columns=[contract.SEARCH, contract.QUERY_TEXT, contract.ITEM, contract.POSITION, contract.CLICKED]
        )
    )
    assert len(log) == 3 and log.column(contract.QUERY_TEXT) == ["Red Shoe", "hat", "red shoe"]
    log = log.with_clicks()
    assert len(log) == 2 and log.clicked() == [[4], [4, 3]] and log.passed_over() == [[3], []]
    assert log.gains(np.array([1.0, 0.5, 0.25])) == [
        {4: 2.0},
        {4: 1.0, 3: 4.0},
    ]  # places beyond are as the last
    assert log.part(1, 2).clicked() == [[4, 3]]


def test_metrics_by_hand():
    assert ndcg([1, 0, 0.1], [1, 0.1, 0.01]) == pytest.approx((1 + 0.1 / 2) / (1 + 0.1 / np.log2(3) + 0.01 / 2))
    assert ndcg([0, 0], [0, 0]) == 0
    found = judge(["x", "b", "a"], {"a": 1.0, "b": 0.1, "c": 1.0})
    assert found["MRR"] == pytest.approx(1 / 3) and found["recall@100"] == 0.5


def test_each_query_is_tested_once_and_never_learned_from():
    j = Judgments([str(i) for i in range(11)], [{}] * 11)
    folds = list(j.folds(5, 3))
    assert sorted(q for _, test in folds for q in test) == list(range(11))
    assert all(not set(train) & set(test) and len(train) + len(test) == 11 for train, test in folds)


def test_a_wrong_catalogue_is_refused(catalogue, index, tmp_path):
    with pytest.raises(ValueError, match="expected 2 values, one an item, got 1"):
        Catalogue(["a", "b"], {"title": ["x"]})
    with pytest.raises(ValueError, match="expected as many vectors"):
        HybridIndex(catalogue, index.lexical, np.zeros((5, 2), np.float32))
    with pytest.raises(FileNotFoundError, match="--path names the folder"):
        read_esci(tmp_path)
