"""Text to terms, BM25 by hand, what a query means."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from search.lexical import Field, Lexical
from search.text import normalise, terms
from search.understanding import Intent, QueryUnderstanding, coclick_synonyms, read_synonyms, with_typos

TITLES = [
    "Sony wireless headphones black", "Bose wireless earbuds", "Leather sofa brown", "Fabric couch grey",
    "红色连衣裙 女装", "Running shoes 12 ounces", "Wireless mouse", "Table lamp",
]  # fmt: skip
BRANDS = ["Sony", "Bose", "", "", "", "", "", ""]


@pytest.fixture(scope="module")
def understanding():
    return QueryUnderstanding.learn([TITLES], {"brand": BRANDS}, {"sofa": ["couch"]})


@pytest.mark.parametrize(
    ("written", "one"),
    [
        ("12 Ounces", "12oz"), ("12-ounce", "12oz"), ("１２ ｏｚ", "12oz"), ("5' x 7\"", "5ft x 7in"),
        ("Extra Large", "xl"), ("2XL", "xxl"), ("  A \t B\n", "a b"), ("a\u202eb\u0000c", "a b c"),
        ("Women’s", "women's"),
        ("30in", "30in"), ("in 30 days", "in 30 days"), ("model 3x", "model 3x"), ("ﬁne", "fine"),
    ],
)  # fmt: skip
def test_one_spelling(written, one):
    assert normalise(written) == one


def test_terms_by_script():
    assert terms("Wireless Headphones") == ["wireless", "headphon"]
    assert terms("The Café's chairs") == ["cafe", "chair"]
    assert terms("红色连衣裙") == ["红色", "色连", "连衣", "衣裙"] and terms("茶") == ["茶"]
    assert terms("iPhone13 手机壳") == ["iphone13", "手机", "机壳"]
    assert terms("") == terms("😀🎉") == terms("'; -- ^$.*") == []


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_cut_into_terms(text):
    once = normalise(text)
    found = terms(text)
    assert all(found) and normalise(once) == once and terms(once) == found


def test_bm25_by_hand():
    """Lucene's BM25, k1 1.2, b .75: idf ln(1 + (N - n + .5) / (n + .5)), tf / (tf + k1 (1 - b + b length / mean))."""
    index = Lexical.build({"title": ["red shoe", "shoe shoe blue", "green hat"]}, [Field("title", 2.0)])
    mean = 7 / 3
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    by_hand = [2 * idf * tf / (tf + 1.2 * (0.25 + 0.75 * n / mean)) for tf, n in ((1, 2), (2, 3), (0, 2))]
    assert index(["shoe"]) == pytest.approx(by_hand, rel=1e-5)
    assert index(["shoe", "never"], [0.5, 1]) == pytest.approx(np.array(by_hand) / 2, rel=1e-5)
    assert index.coverage(["shoe", "red"], np.arange(3))[1].tolist() == [1.0, 0.5, 0.0]
    lead, phrase, first, last, last_at, share, length, density = index.places(["red", "shoe", "red"], np.arange(3)).T
    assert lead.tolist() == [1, 0.5, 0] and phrase.tolist() == [1, 0, 0] and last.tolist() == [1, 1, 0]
    assert first == pytest.approx([1, 1, 1 / 33]) and last_at == pytest.approx([1 / 2, 1, 1 / 33])
    assert share == pytest.approx([1, 1 / 3, 0]) and density == pytest.approx([1, 1 / 2, 0])
    assert (length * 32).tolist() == [2, 3, 2]
    assert index.places(["never"], np.arange(3))[:, [0, 1, 3, 5, 7]].sum() == index.places([], np.arange(0)).sum() == 0


def test_the_index_is_the_same_when_read_back(tmp_path):
    fields = [Field("title", 2.0), Field("text", 0.5, 0.3)]
    index = Lexical.build({"title": TITLES, "text": ["wireless"] * 4 + [""] * 4}, fields)
    index.save(tmp_path)
    again = Lexical.load(tmp_path)
    assert again.fields == tuple(fields) and again.bytes == index.bytes
    for q in ("wireless mouse", "连衣裙", ""):
        assert np.array_equal(again(terms(q)), index(terms(q)))
    with pytest.raises(ValueError, match=r"expected texts of \['brand'\]"):
        Lexical.build({"title": TITLES}, [Field("brand")])


def test_errors_are_mended_and_both_spellings_asked(understanding):
    found = understanding("wireles hedphones sony")
    assert found.corrected == {"wireles": "wireless", "hedphones": "headphones"}
    assert found.mended == "wireless headphones sony"
    weight = dict(zip(found.terms, found.weights, strict=True))
    assert weight["headphon"] == 0.9 and weight["hedphon"] == 1.0 and weight["soni"] == 1.0
    assert understanding("tabel").corrected == {"tabel": "table"}
    assert understanding("xk9 usb 12oz cat").corrected == {}  # short words and numbers stay


def test_what_the_client_is_shown(understanding):
    shown = json.loads(understanding("SONY sofa").with_intents([Intent("colour", "black", 0.61, False)]).to_json())
    assert shown["text"] == "sony sofa" and shown["synonyms"] == {"sofa": ["couch"]}
    assert shown["intents"] == [
        {"attribute": "brand", "value": "Sony", "probability": 1.0, "named": True},
        {"attribute": "colour", "value": "black", "probability": 0.61, "named": False},
    ]


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.text(max_size=80), st.sampled_from(["'; DROP TABLE items; --", "(a+)+$", "\\", "‮مرحبا‬", "😀" * 50]))
)
def test_no_query_breaks_it(understanding, query):
    found = understanding(query)
    json.loads(found.to_json())
    assert len(found.terms) == len(found.weights) and all(w > 0 for w in found.weights)


def test_a_long_query_is_understood(understanding):
    assert understanding("wireless " * 2000).terms == ("wireless",)
    assert understanding("x" * 10_000).corrected == {}


def test_it_is_the_same_when_read_back(understanding, tmp_path):
    understanding.save(tmp_path)
    again = QueryUnderstanding.load(tmp_path)
    for q in ("wireles sofa", "bose", "连衣裙"):
        assert again(q) == understanding(q)


def test_synonyms_of_a_file(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text("sofa, couch # furniture\ntv => television, telly\n")
    assert read_synonyms(path) == {"sofa": ["couch"], "couch": ["sofa"], "tv": ["television", "telly"]}
    path.write_text("sofa\n")
    with pytest.raises(ValueError, match="1: expected 'a, b'"):
        read_synonyms(path)


def test_words_that_lead_to_the_same_items_are_synonyms():
    queries = ["grey sofa", "grey couch", "sofa", "couch", "big sofa", "big couch", "lamp", "lamp", "lamp"]
    clicked = [
        {"a": 1.0},
        {"a": 1.0},
        {"b": 1.0},
        {"b": 1.0},
        {"a": 1.0},
        {"a": 1.0},
        {"c": 1.0},
        {"c": 1.0},
        {"c": 1.0},
    ]
    assert coclick_synonyms(queries, clicked) == {"couch": ["sofa"], "sofa": ["couch"]}


def test_typing_errors_have_the_rate_they_promise():
    query = "wireless headphones with microphone for running outside"
    changed = [
        sum(a != b for a, b in zip(query.split(), with_typos(query, 0.2, s).split(), strict=False)) for s in range(300)
    ]
    assert 0.13 < np.mean(changed) / 7 < 0.27 and with_typos(query, 0, 1) == query
