"""The ranker for items that are not in its tables: what stands for them comes with the request.

The candidates of the trained tables are ranked as ever, by a graph that knows of no other; so an answer without fresh
items is the same to the last bit, and one with them keeps the order of the others.
Axis legend: B requests, T history events, N candidates, M fresh items, D width, C categorical attributes, A list
attributes of K values, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.models.context import exportable, moment_of
from training.models.ranking import RankingModel
from training.models.retrieval import EXCLUDED, RetrievalModel
from vivace.contract import FIRST_ID, PADDING_ID

INPUTS = ("HISTORY_IDS", "CANDIDATE_SCORES", "ENCODED_HISTORY", "FRESH_SCORES", "FRESH_VECTORS")
# after them, where the catalogue has such attributes
CATEGORIES, LISTS, NUMBERS = "FRESH_CATEGORIES", "FRESH_LISTS", "FRESH_NUMBERS"
LIVE = "FRESH_LIVE"  # then, where their events are counted: what live counters say of them
OUTPUT = "FRESH_VALUES"
NEWEST = "NEWEST"  # input of the graph of states
NO_ITEM = -1  # as an id or a category: equal to none


class StateGraph(nn.Module):
    """What is exported as ``fresh_state.onnx`` where the retriever reads the context: the newest encoded event float32
    [B, D] in the context of its request, which items are scored against."""

    def __init__(self, model: RetrievalModel) -> None:
        super().__init__()
        self.model = exportable(model).eval()

    def forward(self, newest: Tensor, *context: Tensor) -> Tensor:
        _, of_request, _ = moment_of(0, self.model.read_context, context)
        return self.model.state(newest, of_request)


class FreshRankingGraph(nn.Module):
    """What is exported as ``fresh.onnx``: score and calibrated probabilities of fresh items beside the candidates."""

    def __init__(self, model: RankingModel, counted: bool = False) -> None:
        """``counted``: whether live counters count them."""
        super().__init__()
        self.model, self.counted = exportable(model).eval(), counted

    def _describe(
        self, vectors_BMD: Tensor, categories_BMC: Tensor | None, lists_BMAK: Tensor | None, numbers_BMX: Tensor | None
    ) -> Tensor:
        """See ``RankingModel.describe``."""
        parts = [vectors_BMD]
        if categories_BMC is not None:
            embeddings = list(self.model.attribute)
            for i, embedding in enumerate(embeddings):
                assert isinstance(embedding, nn.Embedding)
                ids = categories_BMC[..., i]  # a value that came up after training has no row
                parts.append(embedding(torch.where(ids < embedding.num_embeddings, ids, torch.zeros_like(ids))))
        if lists_BMAK is not None:  # all their values have: the vocabulary is the trained one
            parts += self.model.list_means(lists_BMAK)
        return torch.cat([*parts, *([] if numbers_BMX is None else [numbers_BMX])], dim=-1)

    def _counters(
        self, history_BT: Tensor, scores_BN: Tensor, fresh_BM: Tensor, categories_BMC: Tensor | None,
        of_older: list[Tensor], live_BMF: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """``RankingModel.counters`` of the fresh items among the candidates, and what live counters say of them:
        nothing has followed them in training, and there they are as popular as an item without an event."""
        model, n = self.model, scores_BN.shape[1]
        none_BM = torch.full_like(fresh_BM, NO_ITEM, dtype=torch.int64)
        category_BM = none_BM if categories_BMC is None else categories_BMC[..., 0]
        none_BN = torch.full_like(scores_BN, NO_ITEM, dtype=torch.int64)
        scores = torch.cat([scores_BN, fresh_BM], 1)
        unseen = model.popularity[PADDING_ID] + torch.zeros_like(scores)
        counted = model.counters(
            history_BT, torch.cat([none_BN, none_BM], 1), scores, unseen, torch.cat([none_BN, category_BM], 1)
        )[:, n:]
        counted = torch.cat([counted, *of_older], 2) if of_older else counted
        if model.live is None:
            return counted
        if live_BMF is None:
            live_BMF = torch.zeros_like(model.live.mean) + torch.zeros_like(counted[..., :1])
        return torch.cat([counted, model.live.normalised(live_BMF)], 2)

    def forward(
        self, history_ids: Tensor, candidate_scores: Tensor, encoded_history: Tensor, fresh_scores: Tensor,
        fresh_vectors: Tensor, *more: Tensor,
    ) -> Tensor:  # fmt: skip
        """float32 [B, 1 + heads, M] as ``contract.ranked_values`` has them, not sorted. ``more``: CATEGORIES, LISTS
        and NUMBERS, those that the catalogue has, LIVE if they are counted, then ``contract.StageTensors.moment``."""
        model, f, m = self.model, len(self.model.head_names), fresh_scores.shape[1]
        given = list(more)
        categories = given.pop(0) if len(model.attribute) else None
        lists = given.pop(0) if len(model.listed) else None
        numbers = given.pop(0) if model.numbers.shape[1] else None
        live = given.pop(0) if self.counted else None
        types, context, _ = moment_of(model.types, model.columns, given)
        candidate = model.norm_own(model.own(self._describe(fresh_vectors, categories, lists, numbers)))
        there = torch.where(fresh_scores > EXCLUDED / 2, NO_ITEM, PADDING_ID)  # none is in a history by its id
        read = model.keys_and_values(encoded_history, history_ids, types)
        attended, of_older = model.attend(
            candidate, model.query(candidate), fresh_vectors, there, history_ids, types, *read
        )
        counted = self._counters(history_ids, candidate_scores, fresh_scores, categories, of_older, live)
        user = encoded_history[:, -1:, :] * fresh_vectors
        parts = [attended, candidate, user, model.counter(counted), *model.context_parts(context, candidate)]
        x = torch.cat(parts, dim=2).flatten(0, 1)
        logits = model.head_logits(x).view(-1, m, f)
        gap_BM = (fresh_scores - candidate_scores.amax(1, keepdim=True)).clamp_min(-20.0)
        residual = model.retrieval_scale * gap_BM
        if model.nearest is not None:
            residual = residual + model.nearest.direct(of_older[0]).squeeze(2)
        if model.live is not None:
            residual = residual + model.live.direct(counted[..., -len(model.live.mean) :]).squeeze(2)
        logits = torch.cat([logits[..., :1] + residual[..., None], logits[..., 1:]], dim=2)
        empty_B1 = (history_ids < FIRST_ID).all(dim=1, keepdim=True)
        score = torch.where(empty_B1, fresh_scores, logits[..., 0])
        return torch.cat([score[:, None], model.probabilities(logits).transpose(1, 2)], dim=1)
