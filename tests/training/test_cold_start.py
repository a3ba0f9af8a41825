"""Items without training events: their events are gone from training, and text lets them be found."""

from __future__ import annotations

import numpy as np
import torch

from preprocessing.contract import FIRST_ID
from training.cold_start import WithoutItems
from training.counters import popularity
from training.retrieval_model import EncoderConfig, RetrievalModel
from training.train import free_unseen


def test_events_of_held_out_items_leave_the_training_sequences(features, tmp_path):
    count = features.item_count()
    items = np.array([FIRST_ID, FIRST_ID + 5])
    less = WithoutItems(features, items, tmp_path)
    before, after = popularity(features.files("train"), count), popularity(less.files("train"), count)
    assert (after[items] == 0).all() and (before[items] > 0).all()
    rest = np.setdiff1d(np.arange(count), items)
    assert (after[rest] == before[rest]).all() and less.files("test") == features.files("test")


def test_unseen_items_are_left_to_their_description():
    model = RetrievalModel(EncoderConfig(width=8, history=5), 8, torch.ones(8))
    with torch.no_grad():
        model.bias.copy_(torch.tensor([0.0, 0, 0, 5.0, -9.0, 1.0, 2.0, 3.0]))
    seen = model.items.id.weight[5].clone()
    free_unseen(model, np.array([0, 0, 0, 9, 0, 1, 8, 9]))
    assert (model.items.id.weight[4] == 0).all() and float(model.bias[4].detach()) == 1.0  # the rarest item's
    assert torch.equal(model.items.id.weight[5], seen) and float(model.bias[3].detach()) == 5.0
