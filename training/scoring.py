"""Scores and candidates of a trained retriever for a batch of requests. Axis legend: B requests, V item ids, N
candidates, T history events, D width."""

from __future__ import annotations

import torch
from torch import Tensor

from training.data.batches import Requests
from training.metrics import ranks
from training.models.retrieval import EXCLUDED, RetrievalModel

SCORED = 256  # requests scored at once in evaluation


def scored(model: RetrievalModel, request: Requests, exclude_seen: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(rank of the target [B], scores [B, V], encoded history [B, T, D])."""
    where = model.bias.device
    history = request.history_BT.to(where)
    exclude = request.exclude(len(model.bias), exclude_seen).to(where)
    encoded = model.encode(history, times=request.time_BT.to(where))
    scores = model.scores(history, encoded, exclude)
    return ranks(scores, request.target_B.to(where), request.number_B), scores, encoded


def candidates(
    retriever: RetrievalModel, request: Requests, count: int, exclude_seen: bool, memory: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rank of the target [B], ids [B, N], scores [B, N], encoded [B, memory, D]) of the retriever, without gradients;
    ``memory`` 0: all T events."""
    with torch.no_grad():
        rank, scores, encoded = scored(retriever, request, exclude_seen)
        ids, top = best(scores, count)
    return rank, ids, top, encoded[:, -memory:]


def best(scores_BV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(ids int64 [B, N], scores [B, N]) of the best ``count`` items, best first; id 0 where only excluded ones are
    left."""
    top, ids = torch.topk(scores_BV, count, dim=1)
    return torch.where(top > EXCLUDED / 2, ids, torch.zeros_like(ids)), top
