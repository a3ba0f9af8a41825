"""The text encoder of search: it learns, resumes, is the same when read back."""

from __future__ import annotations

import numpy as np
import pytest

from search.data import Catalogue, Judgments
from search.lexical import Field
from training.models.text_encoder import TextConfig
from training.search.encoder import (
    EncoderTraining,
    Questions,
    SearchEncoderConfig,
    TextSearchEncoder,
    item_texts,
    known_values,
)
from training.search.evaluate import WORDS, SearchConfig, evaluate_folds, render
from training.search.ranker import SearchRankerConfig

THINGS = ["sofa", "lamp", "chair", "table", "shelf", "mirror", "carpet", "clock"]
COLOURS = ["red", "blue", "green", "white"]
SIZES = ["small", "large", "tall"]


@pytest.fixture(scope="module")
def catalogue():
    rows = [(t, c, s) for t in THINGS for c in COLOURS for s in SIZES]
    return Catalogue(
        [f"sku{i}" for i in range(len(rows))],
        {"title": [f"{s} {c} {t}" for t, c, s in rows], "text": [f"a {t} for the home in {c}" for t, c, _ in rows]},
        {"colour": [c for _, c, _ in rows]},
    )


@pytest.fixture(scope="module")
def config():
    text = TextConfig(width=32, layers=1, heads=2, tokens=16, vocabulary=200)
    return SearchEncoderConfig(
        text=text, query_tokens=8, vector=16, language_epochs=1, question_epochs=40, judged_epochs=1, batch_size=16,
        learning_rate=3e-3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(catalogue, config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    training = EncoderTraining(catalogue, config, folder, 3, quiet=True)
    training.language()
    training.questions()
    return folder, training.finish()


def test_it_finds_items_and_knows_what_is_asked_for(catalogue, trained):
    folder, encoder = trained
    items = encoder.items(item_texts(catalogue))
    assert np.linalg.norm(items, axis=1) == pytest.approx(np.ones(len(items)), abs=1e-5)
    queries = ["blue lamp", "white clock", "green sofa", "red mirror"]
    vectors, logits = encoder.queries(queries)
    right = [
        sum(all(w in catalogue.texts["title"][i] for w in q.split()) for i in np.argsort(-(items @ v))[:3])
        for q, v in zip(queries, vectors, strict=True)
    ]
    assert sum(right) >= 9, right  # of 12; by chance 0.4
    found = [{i.value for i in encoder.intents(row)} for row in logits]
    assert sum(q.split()[0] in own for q, own in zip(queries, found, strict=True)) >= 3, found
    again, _ = TextSearchEncoder.load(folder).queries(queries)
    assert np.array_equal(vectors, again)
    single = np.concatenate([encoder.queries([q])[0] for q in queries])
    assert single == pytest.approx(vectors, abs=1e-5)  # neighbours and padding change nothing
    assert encoder.queries([""])[0].shape == (1, 16) and len(encoder.items([])) == 0


def test_questions_are_of_the_item_itself(catalogue):
    make, rng = Questions(catalogue), np.random.default_rng(3)
    for i in range(0, 96, 7):
        own = set(" ".join(t[i] for t in catalogue.texts.values()).split()) | {catalogue.attributes["colour"][i]}
        assert all(set(make(i, rng).split()) <= own for _ in range(5))
    bare = Catalogue(["a"], {"title": [""]})
    assert Questions(bare)(0, rng) == ""
    assert known_values(catalogue, 2)["colour"] == ["red", "blue"]


def test_folds_are_learned_and_judged(catalogue, config, tmp_path):
    title = catalogue.texts["title"]
    queries = [f"{c} {t}" for t in THINGS[:5] for c in COLOURS[:2]]
    gains = [{f"sku{i}": 1.0 if q in title[i] else 0.0 for i in range(0, 96, 3)} | {
        f"sku{i}": 1.0 for i in range(96) if q in title[i]} for q in queries]  # fmt: skip
    small = SearchConfig(
        fields=(Field("title", 2.0), Field("text", 0.5)), encoder=config, folds=2,
        ranker=SearchRankerConfig(epochs=10, members=1),
    )  # fmt: skip
    said: list[str] = []
    results = evaluate_folds(catalogue, Judgments(queries, gains), small, tmp_path, 3, said.append, quiet=True)
    table = results["table"]
    assert results["queries"] == 10 and len(said) == 3
    assert table[WORDS]["NDCG@10"]["mean"] > 0.9 and table[WORDS]["over BM25"]["mean"] == 0
    for row in table.values():
        low, high = row["NDCG@10"]["interval"]
        assert low <= row["NDCG@10"]["mean"] <= high and row["recall@100"]["mean"] > 0.5
    assert render(results, "t").row_count == len(table)
