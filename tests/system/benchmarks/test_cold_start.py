"""Items without training events: their events are gone from training, and text lets them be found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.cold_start import WithoutItems
from preprocessing.features import Features
from training.checkpoints import load_retrieval
from training.data.counters import popularity
from training.data.item_relations import RelationTraining, related_vectors
from training.learn.warm_start import free_unseen
from training.models.item_table import nearest_seen
from training.models.retrieval import EncoderConfig, RetrievalModel
from training.presets import tiny
from vivace import contract
from vivace.contract import FIRST_ID


def test_events_of_held_out_items_leave_the_training_sequences(features, tmp_path):
    count = features.item_count()
    items = np.array([FIRST_ID, FIRST_ID + 5])
    less = WithoutItems(features, items, tmp_path)
    before, after = popularity(features.files("train"), count), popularity(less.files("train"), count)
    assert (after[items] == 0).all() and (before[items] > 0).all()
    rest = np.setdiff1d(np.arange(count), items)
    assert (after[rest] == before[rest]).all() and less.files("test") == features.files("test")


class _Catalogue(Features):
    """Five items: a seen red dress and red shoes, a seen lamp, an unseen red dress, an unseen thing of its own."""

    def __init__(self, category: bool) -> None:
        super().__init__(Path())
        texts = ["red dress", "red shoes", "lamp", "red dress", "zzz"]
        self.table = pd.DataFrame({contract.TEXT: texts, "colour": [3, 3, 4, 3, 5]})
        self.category = category

    @property
    def schema(self) -> contract.DataSchema:
        return contract.DataSchema("catalogue", item_categoricals=("colour",) if self.category else ())

    def items(self) -> pd.DataFrame:
        return self.table


COUNTS = np.array([0, 0, 0, 9, 1, 8, 0, 0])


def _model() -> RetrievalModel:
    torch.manual_seed(0)
    model = RetrievalModel(EncoderConfig(width=8, history=5), 8, torch.ones(8))
    with torch.no_grad():
        model.bias.copy_(torch.tensor([0.0, 0, 0, 5.0, 1.0, 2.0, -9.0, -9.0]))
    return model


def test_unseen_items_are_left_to_their_description():
    model = _model()
    seen = model.items.id.weight[5].clone()
    free_unseen(model, COUNTS, _Catalogue(False), by_neighbours=False)
    assert (model.items.id.weight[6:] == 0).all() and model.bias[6:].tolist() == [1.0, 1.0]  # the rarest item's
    assert torch.equal(model.items.id.weight[5], seen) and float(model.bias[3].detach()) == 5.0


@pytest.mark.parametrize("category", [False, True])
def test_an_unseen_item_stands_between_its_neighbours(category):
    catalogue = _Catalogue(category)
    own, near, share = nearest_seen(catalogue, COUNTS > 0, keep=2)
    assert own.tolist() == [6] and sorted(near[0].tolist()) == [3, 4] and share[0].sum() == pytest.approx(1)
    weight = dict(zip(near[0].tolist(), share[0].tolist(), strict=True))
    assert weight[3] > weight[4] > 0  # the other red dress is nearer than the red shoes
    model = _model()
    free_unseen(model, COUNTS, catalogue, by_neighbours=True)
    table = model.table().detach()
    mean = weight[3] * table[3] + weight[4] * table[4]
    assert float(torch.nn.functional.cosine_similarity(table[6], mean, dim=0)) == pytest.approx(1, abs=1e-5)
    length = weight[3] * float(table[3].norm()) + weight[4] * float(table[4].norm())
    assert float(table[6].norm()) == pytest.approx(length, rel=1e-5)
    assert float(model.bias[6].detach()) == pytest.approx(weight[3] * 5.0 + weight[4] * 1.0, rel=1e-5)
    assert (table[7] == 0).all() and float(model.bias[7].detach()) == 1.0  # nothing is near


def test_a_text_tower_knows_what_no_word_says():
    """Item 7, "zzz", shares no word with a seen one; by the tower's vectors it is a lamp, whose bias is the text's."""
    vectors = np.array([[1, 0], [1, 0], [0, 1], [1, 0], [0, 1]], np.float32)
    own, near, share = nearest_seen(_Catalogue(False), COUNTS > 0, keep=2, vectors_VE=vectors)
    assert own.tolist() == [6, 7]
    assert near[1][share[1].argmax()] == 5 and share[1].max() > 0.99
    model = _model()
    free_unseen(model, COUNTS, _Catalogue(False), True, vectors, boost=0.5)
    table = model.table().detach()
    assert float(torch.nn.functional.cosine_similarity(table[7], table[5], dim=0)) == pytest.approx(1, abs=1e-3)
    plain = _model()
    free_unseen(plain, COUNTS, _Catalogue(False), True, vectors)
    assert (model.bias - plain.bias).tolist() == pytest.approx([0, 0, 0, 0, 0, 0, 0.5, 0.5])


def test_by_its_relations_an_unseen_item_is_half_what_they_say():
    model, plain = _model(), _model()
    related = np.zeros((8, 9), np.float32)
    related[6] = [*range(8), 3.0]
    free_unseen(plain, COUNTS, _Catalogue(False), by_neighbours=True)
    free_unseen(model, COUNTS, _Catalogue(False), by_neighbours=True, related_VE=related)
    expected = (plain.table().detach()[6] + torch.arange(8.0)) / 2
    torch.testing.assert_close(model.table().detach()[6], expected)
    assert float(model.bias[6].detach()) == pytest.approx((float(plain.bias[6].detach()) + 3.0) / 2)
    assert torch.equal(model.table()[:6], plain.table()[:6])


def test_relations_place_items_of_the_shop_that_were_not_learned_from(features, root):
    """By brand, category and words, beside where training has put them."""
    model, counts = load_retrieval(features, tiny(), root), popularity(features.files("train"), features.item_count())
    hidden = np.random.default_rng(0).choice(np.flatnonzero(counts > 20), 30, replace=False)
    less = counts.copy()
    less[hidden] = 0
    related = related_vectors(model, features, less, RelationTraining(steps=60, places=512, every=20))
    trained = model.table().detach()[hidden]
    alike = torch.nn.functional.cosine_similarity(trained[:, None], torch.from_numpy(related[hidden, :-1])[None], dim=2)
    places = (alike > alike.diagonal()[:, None]).sum(1).float()
    assert places.mean() < 0.5 * (len(hidden) - 1) * 0.8, places  # by chance half of the others are nearer
    bert = load_retrieval(features, tiny(), root)
    bert.masked = True
    with pytest.raises(ValueError, match="not for bert4rec"):
        related_vectors(bert, features, less)
