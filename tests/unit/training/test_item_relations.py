"""Vectors of items by their relations: carried along the graph, then trained for items that are taken for new ones."""

from __future__ import annotations

import numpy as np
import torch
from scipy import sparse

from training.data.item_relations import NextItems, Relations, RelationTraining, trained_values
from vivace.contract import FIRST_ID

COLOURS = 3


def test_vectors_are_carried_by_means():
    """Items red, red and blue, nothing; after the special ids."""
    relations = Relations(sparse.csr_matrix(np.array([[1, 0], [0.6, 0.8], [0, 0]], np.float32)))
    vectors = np.zeros((FIRST_ID + 3, 2), np.float32)
    vectors[FIRST_ID : FIRST_ID + 2] = [[1, 0], [5, 4]]
    rows = np.array([FIRST_ID, FIRST_ID + 1])
    values = relations.of_values(rows, vectors)
    np.testing.assert_allclose(values, [[(1 + 0.6 * 5) / 1.6, 0.6 * 4 / 1.6], [5, 4]], rtol=1e-6)
    items = relations.of_items(np.arange(FIRST_ID + 3), torch.from_numpy(values)).numpy()
    np.testing.assert_allclose(items[FIRST_ID + 1], (0.6 * values[0] + 0.8 * values[1]) / 1.4, rtol=1e-6)
    assert (items[FIRST_ID] == values[0]).all() and not items[FIRST_ID + 2].any() and not items[:FIRST_ID].any()


def test_values_learn_where_items_of_theirs_are_wanted_that_are_held_back():
    rng, items = np.random.default_rng(0), 60
    colour = np.arange(items) % COLOURS
    relations = Relations(sparse.csr_matrix(np.eye(COLOURS, dtype=np.float32)[colour]))
    table = torch.zeros(FIRST_ID + items, COLOURS + 1)
    table[FIRST_ID:, :-1] = 2 * torch.eye(COLOURS)[colour]
    targets = torch.from_numpy(FIRST_ID + rng.integers(0, items, 4_000))
    states = 2 * torch.eye(COLOURS)[colour[targets.numpy() - FIRST_ID]]
    task = NextItems(table, torch.zeros(len(table), dtype=torch.bool), states, targets)
    held, known = np.arange(FIRST_ID, FIRST_ID + 6), np.arange(FIRST_ID + 6, FIRST_ID + items)
    start, places = torch.zeros(COLOURS, COLOURS + 1), torch.isin(targets, torch.from_numpy(held)).nonzero()[:, 0]
    config = RelationTraining(steps=60, places=400, every=10, learning_rate=0.1)
    values = trained_values(task, relations, start, held, known, config, rng)
    loss = [float(task.losses(places, held, relations.of_items(held, of)).mean()) for of in (start, values)]
    truth = float(task.losses(places, held, table[held]).mean())
    assert loss[1] < truth + 0.2 * (loss[0] - truth), (loss, truth)
    assert (values[:, :-1].argmax(1) == torch.arange(COLOURS)).all()
