"""The text encoder: what it hides and pools, that it learns, and that the retriever reads its vectors."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from preprocessing.features import Features
from tests.support import quiet
from training.checkpoints import load_retrieval
from training.learn.retriever import train_retrieval
from training.learn.text import pretrain_text
from training.models.text_encoder import (
    FIRST_TOKEN,
    MASK,
    TextConfig,
    TextEncoder,
    item_vectors,
    standardise,
    tokens_of,
    train_tokenizer,
)
from training.presets import tiny
from vivace.contract import FIRST_ID

SMALL = TextConfig(width=32, heads=2, layers=1, tokens=16, vocabulary=300, epochs=4, batch_size=32)


def test_padding_changes_no_vector_and_an_empty_text_has_none():
    tokenizer = train_tokenizer(["red dress", "Red shoes", "blue dress"], 60)
    torch.manual_seed(0)
    model = TextEncoder(SMALL, tokenizer.get_vocab_size()).eval()
    one, wide = tokens_of(tokenizer, ["RED dress", ""], 4), tokens_of(tokenizer, ["red dress", ""], 16)
    torch.testing.assert_close(model.pooled(one), model.pooled(wide), atol=1e-5, rtol=1e-5)  # case is folded
    assert (model.pooled(wide)[1] == 0).all() and model.pooled(wide)[0].abs().sum() > 0


def test_the_loss_hides_what_it_asks_for():
    torch.manual_seed(0)
    model, asked = TextEncoder(SMALL, 100), []
    tokens = torch.randint(FIRST_TOKEN, 100, (64, 16))
    forward = model.forward
    model.forward = lambda seen: (asked.append(seen), forward(seen))[1]
    _, count = model.loss(tokens, 0.15)
    changed = asked[0] != tokens
    assert int(count) == pytest.approx(0.15 * tokens.numel(), rel=0.2)
    assert int((asked[0] == MASK).sum()) == pytest.approx(0.8 * int(count), rel=0.15)
    assert int(changed.sum()) < int(count)  # a tenth is asked for as it is


def test_rows_are_standardised():
    found = standardise(torch.tensor([[1.0, 5.0], [3.0, 5.0], [9.0, 9.0]]), torch.tensor([True, True, False]))
    assert found.ravel().tolist() == pytest.approx([-(0.5**0.5), 0.0, 0.5**0.5, 0.0, 0.0, 0.0])


def test_the_retriever_reads_the_pretrained_vectors(features, root, tmp_path):
    own = tmp_path / "shop"
    shutil.copytree(root / "features", own / "features")
    mine = Features(own / "features")
    manifest = pretrain_text(mine, SMALL, own, 3, quiet, quiet=True)
    losses = [e["loss"] for e in manifest["results"]["epochs"]]
    assert losses[-1] < losses[0] - 0.2
    vectors = item_vectors(own)
    assert vectors.shape == (mine.item_count(), SMALL.width) and (vectors[:FIRST_ID] == 0).all()
    titles = mine.items()["text"].tolist()
    same = [i for i, t in enumerate(titles) if t == titles[0]]
    np.testing.assert_allclose(vectors[FIRST_ID + same[-1]], vectors[FIRST_ID], atol=1e-4)
    preset = replace(tiny(), encoder=replace(tiny().encoder, text_encoder=True))
    train_retrieval(mine, preset, own, 3, quiet, quiet=True)
    model = load_retrieval(mine, preset, own)
    assert model.items.vector.weight.shape == (16, SMALL.width)
    blank = replace(preset, encoder=replace(preset.encoder, width=8))
    with pytest.raises(FileNotFoundError, match="vivace pretrain --objective text"):
        train_retrieval(features, blank, tmp_path / "other", 3, quiet, quiet=True)
