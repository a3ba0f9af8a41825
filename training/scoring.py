"""Scores and candidates of a trained retriever for a batch of requests. Axis legend: B requests, V item ids, N
candidates, T history events, D width."""

from __future__ import annotations

import torch
from torch import Tensor

from training.data.batches import Requests
from training.metrics import MISS, ranks
from training.models.retrieval import EXCLUDED, RetrievalModel, propose
from vivace.contract import FIRST_ID, PADDING_ID

SCORED = 256  # requests scored at once in evaluation


def scored(model: RetrievalModel, request: Requests, exclude_seen: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(rank of the target [B], scores [B, V], encoded history [B, T, D])."""
    where = model.bias.device
    history = request.history_BT.to(where)
    exclude = request.exclude(len(model.bias), exclude_seen).to(where)
    request = request.to(where)
    encoded = model.encode(history, times=request.time_BT, types=request.type_BT)
    scores = model.scores(history, encoded, exclude, context=request.context)
    return ranks(scores, request.target_B, request.number_B), scores, encoded


def candidates(
    retriever: RetrievalModel, request: Requests, count: int, exclude_seen: bool, memory: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rank of the target [B], ids [B, N], scores [B, N], encoded [B, memory, D]) of the retriever, without gradients;
    ``memory`` 0: all T events. With live counters their rising items come first, see ``propose``."""
    with torch.no_grad():
        rank, scores, encoded = scored(retriever, request, exclude_seen)
        rising = None if request.rising_BM is None else request.rising_BM.to(scores.device)
        ids, top = propose(scores, count, rising)
    return rank, ids, top, encoded[:, -memory:]


def candidates_with(
    retriever: RetrievalModel, request: Requests, shown_BK: Tensor, count: int, exclude_seen: bool, memory: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same as ``candidates`` where the ids ``shown_BK`` [B, K], padded, are among the ids [B, max(N, K)]: those
    that the retriever does not propose stand in the place of its last ones. Then bool [B, N]: which are of them."""
    with torch.no_grad():
        rank, scores, encoded = scored(retriever, request, exclude_seen)
        shown_BK = shown_BK.to(scores.device)
        is_shown = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, shown_BK, True)
        is_shown[:, :FIRST_ID] = False
        first = scores.masked_fill(is_shown, float("inf"))
        ids = first.topk(max(count, shown_BK.shape[1]), dim=1).indices
        top = scores.gather(1, ids)
        top, order = top.sort(dim=1, descending=True, stable=True)
        ids = torch.where(top > EXCLUDED / 2, ids.gather(1, order), torch.full_like(ids, PADDING_ID))
    return rank, ids, top, encoded[:, -memory:], is_shown.gather(1, ids)


def behind_rising(rank_B: Tensor, request: Requests) -> Tensor:
    """The retriever's ranks int64 [B], of targets that are among the rising items 0 and of others behind those: what
    ``ranks_after`` takes as the ranks before ranking. A target that may not be answered, as it was seen, stays MISS
    however fast it rises: ``propose`` leaves it out."""
    if request.rising_BM is None:
        return rank_B
    rising_BM, target_B = request.rising_BM.to(rank_B.device), request.target_B.to(rank_B.device)
    joined_B = (rising_BM == target_B[:, None]).any(1) & (target_B != PADDING_ID)
    before_B = torch.where(joined_B, torch.zeros_like(rank_B), rank_B + rising_BM.shape[1])
    return torch.where(rank_B == MISS, MISS, before_B)
