"""Builds the FAISS index of a trained retriever, finds the effort it needs, and refuses it if it finds too little.

See ``serving.runtime.item_index``. Axis legend: B states, V item ids, D width, N candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from preprocessing.features import Features
from serving.runtime.item_index import INDEX, POPULAR, ItemIndex
from training.compile.onnx_export import PARITY_REQUESTS
from training.data import batches
from training.judge.gate import GateError
from training.models.retrieval import RetrievalModel
from training.presets import Preset
from vivace.contract import FIRST_ID, MAX_SEEN, PADDING_ID

RECALL = 0.98  # of the exact top N that an index must find to be published


class EncoderGraph(nn.Module):
    """What is exported as ``encoder.onnx``: history ids (and times, where they are read) to the encoded history."""

    def __init__(self, model: RetrievalModel, memory: int = 0) -> None:
        super().__init__()
        self.model, self.memory = model, memory
        with torch.no_grad():
            self.register_buffer("table_VD", model.table().detach().clone())

    def forward(self, history_ids: Tensor, history_times: Tensor | None = None) -> Tensor:
        encoded: Tensor = self.model.encode(history_ids, self.table_VD, history_times, self.memory)  # type: ignore[arg-type]
        return encoded


def recall(expected: np.ndarray, got: np.ndarray) -> float:
    """Mean share of the ids of each row of ``expected`` (PADDING_ID does not count) that ``got`` has too."""
    shares = []
    for a, b in zip(expected, got, strict=True):
        real = a[a != PADDING_ID]
        shares.append(np.isin(real, b).mean() if len(real) else 1.0)
    return float(np.mean(shares))


@dataclass(frozen=True)
class Tuned:
    """The least effort that reaches the recall, and what every effort tried reached."""

    effort: int
    recall: float
    tried: dict[int, float]


def tune(index: ItemIndex, states_BD: np.ndarray, exact_BN: np.ndarray, least: float = RECALL) -> Tuned:
    """Doubles ``index.effort`` from N on until it finds ``least`` of the exact ids int64 [B, N] of ``states_BD``; the
    index keeps that effort. Raises GateError if looking at every item in 16 does not find them."""
    tried: dict[int, float] = {}
    effort = exact_BN.shape[1]
    while True:
        index.effort = effort
        tried[effort] = recall(exact_BN, index.search(states_BD, exact_BN.shape[1])[0])
        if tried[effort] >= least:
            return Tuned(effort, tried[effort], tried)
        if effort >= max(index.index.ntotal // 16, 16 * exact_BN.shape[1]):
            raise GateError(
                f"index: not published: finds {tried[effort]:.4f} of the exact candidates at effort {effort} of "
                f"{index.index.ntotal:,} items, expected {least}; take HNSW32 instead of eight-bit rows, or the exact "
                "search"
            )
        effort *= 2


def validation_states(features: Features, preset: Preset, model: RetrievalModel, count: int = 1000) -> Tensor:
    """Encoded states float32 [<= count, D] of validation requests."""
    heads, parts = [h.name for h in features.schema.heads], list[Tensor]()
    with torch.no_grad():
        for request in batches.requests(features.files("valid"), heads, preset.encoder.history, PARITY_REQUESTS):
            parts.append(model.encode(request.history_BT, times=request.time_BT)[:, -1])
            if sum(map(len, parts)) >= count:
                break
    return torch.cat(parts)[:count]


def build_index(
    model: RetrievalModel, states_BD: Tensor, count: int, factory: str, folder: Path, least: float = RECALL
) -> Tuned:
    """Writes INDEX and POPULAR into ``folder``: the index of ``model``'s items with the least effort that finds
    ``least`` of the exact ``count`` best for half of ``states_BD``; ``recall`` is that of the other half. Raises
    GateError."""
    with torch.no_grad():
        table, bias = model.table().detach().cpu(), model.bias.detach().cpu()
        scores = states_BD @ table.t() + bias
        scores[:, :FIRST_ID] = -torch.inf
        exact = scores.topk(count, dim=1).indices.numpy()
    index, states = ItemIndex.build(table.numpy(), bias.numpy(), factory), states_BD.numpy()
    half = len(states) // 2
    tuned = tune(index, states[:half], exact[:half], least)
    index.save(folder / INDEX)
    popularity = torch.log1p(model.popularity.cpu()).numpy()
    popularity[:FIRST_ID] = -np.inf
    best = np.argsort(-popularity, kind="stable")[: min(count + MAX_SEEN, len(popularity) - FIRST_ID)]
    np.savez(folder / POPULAR, ids=best.astype(np.int64), scores=popularity[best].astype(np.float32))
    held_out = recall(exact[half:], index.search(states[half:], count)[0])
    return Tuned(tuned.effort, held_out, tuned.tried)
