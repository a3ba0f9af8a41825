"""Where a retriever starts from and what items without events end with: counts, another run's weights, neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.linear_model import Ridge

from preprocessing.features import Features
from training.checkpoints import WEIGHTS, device
from training.data.counters import cooccurrence_embeddings
from training.data.item_relations import related_vectors
from training.models.item_table import NEIGHBOURS, description, item_attributes, nearest_seen
from training.models.retrieval import RetrievalModel
from training.presets import Preset, RetrievalTraining
from training.text.cache import TextCache
from training.text.tower import TextTower
from vivace.contract import FIRST_ID, TEXT
from vivace.manifest import Progress, read_manifest
from vivace.run import Run

START_SCALE = 0.1  # root mean square of a starting item embedding
TOWER_NEIGHBOURS = 20  # seen items that speak for a new one where a text tower chooses them
DIRECTIONS, RIDGE = 256, 300.0  # of the TF-IDF matrix; the penalty of ``described_bias``
RARE_SHARE = 0.25  # the least frequent quarter of the items counts as rare


def new_retriever(features: Features, preset: Preset, counts: np.ndarray) -> RetrievalModel:
    """An untrained retriever of a prepared data set; ``counts``: training events of each item id [V]."""
    attributes = item_attributes(features, preset.encoder)
    model = RetrievalModel(preset.encoder, len(counts), torch.tensor(counts), attributes, features.context)
    model.to(device())
    if preset.retrieval.start == "cooccurrence":
        start_from_counts(model, features.files("train"), counts)
    return model


def start_from_counts(model: RetrievalModel, files: list[Path], counts: np.ndarray) -> None:
    """Item embeddings from co-occurrence, item biases from popularity; items without events keep their random start."""
    vectors = torch.from_numpy(cooccurrence_embeddings(files, len(counts), model.config.width, START_SCALE))
    with torch.no_grad():
        weight = model.items.id.weight
        seen = (vectors != 0).any(1)[:, None]
        weight.copy_(torch.where(seen, vectors, weight.cpu()))
        model.bias.copy_(torch.tensor(np.log((counts + 1) / (counts + 1).mean()), dtype=model.bias.dtype))


def described_bias(features: Features, counts: np.ndarray, bias_V: np.ndarray, vectors_VE: np.ndarray) -> np.ndarray:
    """The bias float32 [V] that an item's text lets expect: ridge regression of the seen items' biases, each weighed by
    the root of its count, on a text tower's ``vectors_VE`` and the first directions of the TF-IDF matrix."""
    matrix = description(features)
    parts = [vectors_VE]
    if matrix is not None and min(matrix.shape) > 2:
        parts.append(TruncatedSVD(min(DIRECTIONS, min(matrix.shape) - 1), random_state=0).fit_transform(matrix))
    x_VX, seen = np.concatenate(parts, 1), counts[FIRST_ID:] > 0
    weight = np.sqrt(counts[FIRST_ID:][seen])
    mean = float(bias_V[FIRST_ID:][seen].mean())
    ridge = Ridge(alpha=RIDGE, fit_intercept=False)
    ridge.fit(x_VX[seen], bias_V[FIRST_ID:][seen] - mean, sample_weight=weight**2)
    return np.concatenate([bias_V[:FIRST_ID], ridge.predict(x_VX) + mean]).astype(np.float32)


def tower_vectors(features: Features, name: str, say: Progress) -> np.ndarray:
    """A text tower's unit vectors float32 [V - FIRST_ID, E] of the catalogue's text; encoded once a run."""
    tower = TextTower(name)
    texts = TextCache(Run(features.folder.parent).text / f"tower-{tower.key}", tower.encode, f"text tower {name}")
    return texts(features.items()[TEXT].fillna("").tolist(), say)


def finish_unseen(model: RetrievalModel, counts: np.ndarray, features: Features, training: RetrievalTraining) -> None:
    """``free_unseen`` as ``training`` says."""
    by_tower = training.new_items == "tower" and bool((counts[FIRST_ID:] == 0).any())
    vectors_VE = tower_vectors(features, training.tower, print) if by_tower else None
    by_graph = training.new_items == "graph" and bool((counts[FIRST_ID:] == 0).any())
    related_VE = related_vectors(model, features, counts) if by_graph else None
    free_unseen(
        model, counts, features, training.new_items != "described", vectors_VE, training.new_item_boost, related_VE
    )


def free_unseen(
    model: RetrievalModel, counts: np.ndarray, features: Features, by_neighbours: bool,
    vectors_VE: np.ndarray | None = None, boost: float = 0.0, related_VE: np.ndarray | None = None,
) -> None:  # fmt: skip
    """Items without a training event get the weighted mean of their nearest seen items by text and attributes, with
    the length and the bias that those have on average. Where nothing is near (or without ``by_neighbours``) the id
    embedding is zero, so that attributes and words speak alone, and the bias that of a rare item.

    ``vectors_VE``: a text tower's, a row an item of the catalogue; then it has a part in who is near, and the bias is
    that of ``described_bias``. ``related_VE``: vector and bias of each item id by its relations
    (``related_vectors``); then an item's are half these, half its neighbours'. ``boost`` is added to the bias of all of
    them."""
    unseen = torch.from_numpy(counts == 0)
    unseen[:FIRST_ID] = False
    if not unseen.any():
        return
    rare = torch.from_numpy((counts > 0) & (counts <= np.quantile(counts[counts > 0], RARE_SHARE)))
    training = model.training
    model.eval()
    with torch.no_grad():
        weight, bias = model.items.id.weight, model.bias
        weight[unseen] = 0.0
        bias[unseen] = bias[rare.to(bias.device)].median()
        if by_neighbours:
            keep = NEIGHBOURS if vectors_VE is None else TOWER_NEIGHBOURS
            of_catalogue = nearest_seen(features, counts > 0, keep, vectors_VE)
            nearest = (torch.from_numpy(x).to(bias.device) for x in of_catalogue)
            ids_U, neighbours_UK, shares_UK = nearest
            table = model.table()  # what attributes and words say of an unseen item, as its id says nothing
            mean = (table[neighbours_UK] * shares_UK[:, :, None]).sum(1)
            length = (table[neighbours_UK].norm(dim=2) * shares_UK).sum(1, keepdim=True)
            vectors_UD = mean / mean.norm(dim=1, keepdim=True).clamp_min(1e-9) * length
            bias[ids_U] = (bias[neighbours_UK] * shares_UK).sum(1)
            if related_VE is not None:
                related_UE = torch.from_numpy(related_VE).to(bias)[ids_U]
                vectors_UD = (vectors_UD + related_UE[:, :-1]) / 2
                bias[ids_U] = (bias[ids_U] + related_UE[:, -1]) / 2
            weight[ids_U] = vectors_UD - table[ids_U]
            if vectors_VE is not None:
                expected_V = described_bias(features, counts, bias.cpu().numpy(), vectors_VE)
                bias[ids_U] = torch.from_numpy(expected_V).to(bias)[ids_U]
        bias[unseen] += boost
    model.train(training)


def take_up(model: RetrievalModel, folder: Path, features_key: str) -> dict[str, Any]:
    """Loads what fits of ``folder`` (a pretrained or trained retriever) into ``model``.

    Item embeddings and biases only where both stand on the same features, as ids mean nothing elsewhere; of a longer
    or shorter position table the newest places. Returns the names taken and left.
    """
    manifest = read_manifest(folder, "vivace pretrain")
    same_items = manifest["inputs"].get("features") == features_key
    given = torch.load(folder / WEIGHTS, weights_only=True, map_location="cpu")
    taken, left = [], []
    for name, value in model.state_dict().items():
        other = given.get(name)
        of_items = name.startswith("items.") or name in ("bias", "popularity")
        if other is None or (of_items and not same_items):
            left.append(name)
        elif other.shape == value.shape:
            value.copy_(other)
            taken.append(name)
        elif name == "position.weight" and other.shape[1] == value.shape[1]:
            n = min(len(other), len(value))
            value[-n:] = other[-n:]
            taken.append(name)
        else:
            left.append(name)
    if not any(name.startswith("encoder.") for name in taken):
        raise ValueError(
            f"--from {folder}: no encoder weight fits; it is a {manifest['config'].get('encoder')}; "
            f"this preset's encoder is {model.config}"
        )
    return {"from": str(folder), "key": manifest["key"], "taken": taken, "left": left}
