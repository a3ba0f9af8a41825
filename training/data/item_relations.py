"""Vectors of items by what the catalogue relates them to, for items that nobody has touched yet.

The graph is items - values: the attributes and words of the catalogue (``DescribedItems``). As in LightGCN (He et al.
2020) a vector is carried along its edges by a mean and nothing else: a value's starts as the mean of its items' trained
vectors, an item's is the mean of its values'. Then the values' vectors are trained, with the encoder and all other
items standing still, by what they are for: at each step some seen items are taken for new ones (as in DropoutNet,
Volkovs et al. 2017), and the next event must be found among all items. An item's bias comes the same way.
Axis legend: P predicted places, V item ids, W values, D width, S items taken for new ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from preprocessing.features import Features
from training.data.batches import training_batches
from training.data.columns import EventColumns
from training.models.item_table import description
from training.models.retrieval import MASKED, RetrievalModel
from vivace.contract import FIRST_ID, PADDING_ID

ENCODED = 256  # windows encoded at once


@dataclass(frozen=True)
class RelationTraining:
    """How the values learn."""

    steps: int = 300
    """Each of ``places`` draws."""
    places: int = 3072
    """Events drawn a step; of those whose item is not taken for new only ``others``, with the weight of all."""
    others: int = 256
    share: float = 0.1
    """Of the seen items that a step takes for new ones."""
    learning_rate: float = 0.01
    most: int = 400_000
    """Events that are drawn from, at most."""
    held_out: float = 0.1
    """Of the seen items; the values are those of the step that finds these best."""
    every: int = 50
    """Steps between two looks at them."""


def encoded_places(model: RetrievalModel, features: Features, most: int) -> tuple[Tensor, Tensor]:
    """(states float32 [P, D], the next items int64 [P]) of at most ``most`` places of the training windows. Raises
    ValueError for an encoder that does not predict the next item."""
    if model.masked:
        raise ValueError('retrieval.new_items "graph" is for encoders that predict the next item, not for bert4rec')
    columns, states, targets, count = EventColumns.read_by(model), list[Tensor](), list[Tensor](), 0
    windows = training_batches(features.files("train"), model.config.span, ENCODED, 0, 0, columns=columns)
    with torch.no_grad():
        for batch in windows:
            events = columns.read(batch.to(model.bias.device))
            inputs, following = events.ids[:, :-1], events.ids[:, 1:]
            times, types = (None if x is None else x[:, :-1] for x in (events.times, events.types))
            keep = (inputs != PADDING_ID) & (following >= FIRST_ID)
            ids, amounts = (None if x is None else x[:, 1:][keep] for x in events.context)
            encoded = model.encode(inputs, None, times, types=types)[keep]
            states.append(model.state(encoded, (ids, amounts)).float())
            targets.append(following[keep])
            count += len(targets[-1])
            if count >= most:
                break
    return torch.cat(states)[:most], torch.cat(targets)[:most]


class Relations:
    """The graph of a catalogue: ``mean_VW``, float32, the share of each value in an item, rows that sum to 1 or, where
    nothing is known of an item, 0."""

    def __init__(self, matrix: sparse.csr_matrix) -> None:
        """``matrix`` [V - FIRST_ID, W]: weights of the values of each item of the catalogue."""
        weights_VW = sparse.vstack([sparse.csr_matrix((FIRST_ID, matrix.shape[1]), dtype=np.float32), matrix]).tocsr()
        sums_V = np.asarray(weights_VW.sum(1)).ravel()
        self.mean_VW = (sparse.diags(1 / np.maximum(sums_V, 1e-9)) @ weights_VW).tocsr().astype(np.float32)
        self._weights_VW = weights_VW

    def of_values(self, rows: np.ndarray, vectors_VE: np.ndarray) -> np.ndarray:
        """float32 [W, E]: each value's mean of ``vectors_VE`` over the items ``rows``."""
        weights_SW = self._weights_VW[rows]
        sums_W = np.asarray(weights_SW.sum(0)).ravel()
        mean: np.ndarray = sparse.diags(1 / np.maximum(sums_W, 1e-9)) @ (weights_SW.T @ vectors_VE[rows])
        return mean.astype(np.float32)

    def of_items(self, rows: np.ndarray, values_WE: Tensor) -> Tensor:
        """float32 [S, E]: the items ``rows`` by their values' vectors, with their gradients."""
        part = self.mean_VW[rows]
        starts, places = (torch.from_numpy(x.astype(np.int64)) for x in (part.indptr[:-1], part.indices))
        weights = torch.from_numpy(part.data)
        return F.embedding_bag(places, values_WE, starts, mode="sum", per_sample_weights=weights)


def related_vectors(
    model: RetrievalModel, features: Features, counts: np.ndarray, config: RelationTraining | None = None, seed: int = 0
) -> np.ndarray | None:
    """float32 [V, D + 1]: vector and bias of every item by its relations alone; 0 where nothing is known of it. None
    where the catalogue says nothing of its items, or too few were seen to learn from. ``counts``: training events of
    each item id [V]."""
    config, matrix = config or RelationTraining(), description(features)
    seen = np.flatnonzero(counts[FIRST_ID:] > 0) + FIRST_ID
    if matrix is None or len(seen) < 2 / config.held_out:
        return None
    training = model.training
    model.eval()
    states_PD, targets_P = (x.cpu() for x in encoded_places(model, features, config.most))
    with torch.no_grad():
        table_VE = torch.cat([model.table(), model.bias[:, None]], 1).detach().float().cpu()
    model.train(training)
    relations, rng = Relations(matrix), np.random.default_rng(seed)
    order = rng.permutation(seen)
    held, known = np.sort(order[: int(config.held_out * len(seen))]), np.sort(order[int(config.held_out * len(seen)) :])
    start_WE = torch.from_numpy(relations.of_values(known, table_VE.numpy()))
    lengths = [v[:, :-1].norm(dim=1).mean() for v in (table_VE[known], relations.of_items(known, start_WE))]
    start_WE[:, :-1] *= lengths[0] / lengths[1].clamp_min(1e-9)  # a mean is shorter than what it is made of
    task = NextItems(table_VE, torch.from_numpy(counts == 0), states_PD, targets_P)
    return relations.of_items(
        np.arange(len(counts)), trained_values(task, relations, start_WE, held, known, config, rng)
    ).numpy()


class NextItems:
    """Finding the next item of each place among all seen items, some of which are exchanged."""

    def __init__(self, table_VE: Tensor, unseen_V: Tensor, states_PD: Tensor, targets_P: Tensor) -> None:
        self.table_VE, self.states_PD, self.targets_P = table_VE, states_PD, targets_P
        unseen_V[:FIRST_ID] = True
        self.hidden_V = torch.where(unseen_V, MASKED, 0.0)

    def losses(self, places_P: Tensor, rows: np.ndarray, vectors_SE: Tensor) -> Tensor:
        """float32 [P], with the items ``rows`` in the form of ``vectors_SE``."""
        table_VE = self.table_VE.index_copy(0, torch.from_numpy(rows), vectors_SE)
        scores_PV = self.states_PD[places_P] @ table_VE[:, :-1].T + table_VE[:, -1] + self.hidden_V
        return F.cross_entropy(scores_PV, self.targets_P[places_P], reduction="none")


def trained_values(
    task: NextItems, relations: Relations, start_WE: Tensor, held: np.ndarray, known: np.ndarray,
    config: RelationTraining, rng: np.random.Generator,
) -> Tensor:  # fmt: skip
    """The values' vectors float32 [W, D + 1] after the step that found the items ``held`` best as new ones."""
    is_held_P = torch.isin(task.targets_P, torch.from_numpy(held))
    learned_P, asked_P = is_held_P.logical_not().nonzero()[:, 0], is_held_P.nonzero()[: config.places, 0]
    change_WE = torch.zeros_like(start_WE, requires_grad=True)
    optimizer = torch.optim.Adam([change_WE], config.learning_rate)
    best, values_WE = float("inf"), start_WE
    for step in range(config.steps if len(learned_P) else 0):
        rows = known[rng.random(len(known)) < config.share]
        drawn_P = learned_P[torch.from_numpy(rng.integers(0, len(learned_P), config.places))]
        new_P = torch.isin(task.targets_P[drawn_P], torch.from_numpy(rows))
        others_P = drawn_P[~new_P]
        places_P = torch.cat([drawn_P[new_P], others_P[: config.others]])
        weight_P = torch.ones(len(places_P))
        weight_P[int(new_P.sum()) :] = len(others_P) / max(1, min(len(others_P), config.others))
        losses_P = task.losses(places_P, rows, relations.of_items(rows, start_WE + change_WE))
        optimizer.zero_grad()
        ((losses_P * weight_P).sum() / weight_P.sum()).backward()
        optimizer.step()
        if (step + 1) % config.every == 0 and len(asked_P):
            with torch.no_grad():
                now_WE = (start_WE + change_WE).detach()
                loss = float(task.losses(asked_P, held, relations.of_items(held, now_WE)).mean())
            if loss < best:
                best, values_WE = loss, now_WE.clone()
    return values_WE
