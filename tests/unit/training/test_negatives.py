"""Sampled negatives are items: never padding, null or out of vocabulary."""

from __future__ import annotations

import math

import pytest
import torch

from training.learn.objectives import item_loss, log_expected_counts, retrieval_loss
from training.models.retrieval import EncoderConfig, RetrievalModel
from training.presets import RetrievalTraining
from vivace.contract import FIRST_ID

ITEMS = FIRST_ID + 2
CONFIG = RetrievalTraining(loss="sampled", negatives=64, negative_power=0.5)


def _model() -> RetrievalModel:
    torch.manual_seed(0)
    return RetrievalModel(EncoderConfig(width=8, layers=1, heads=1, history=5, dropout=0.0), ITEMS, torch.ones(ITEMS))


def test_expected_counts_by_hand():
    log_expected = log_expected_counts(torch.tensor([7.0, 7.0, 7.0, 0.0, 8.0]), CONFIG)
    # weights 0, 0, 0, 1 ** .5, 9 ** .5: a quarter and three quarters of 64
    assert log_expected[:FIRST_ID].tolist() == [-math.inf] * FIRST_ID
    assert log_expected[FIRST_ID:].exp().tolist() == pytest.approx([16, 48])


def test_no_gradient_reaches_a_special_id_as_a_negative():
    """With two items and as many events of the special ids, 3 of 5 draws would be special."""
    model = _model()
    loss = item_loss(model, CONFIG, log_expected_counts(torch.ones(ITEMS), CONFIG))
    for _ in range(20):
        model.zero_grad()
        states = torch.randn(4, 8)
        loss(states, torch.full((4,), FIRST_ID), model.table()).backward()
        assert not model.bias.grad[:FIRST_ID].any() and model.bias.grad[FIRST_ID:].all()
        assert not model.items.id.weight.grad[:FIRST_ID].any()


def test_a_draw_that_could_be_special_is_refused():
    with pytest.raises(AssertionError, match="special ids"):
        retrieval_loss(_model(), CONFIG, torch.zeros(ITEMS))
