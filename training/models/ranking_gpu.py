"""The ranker in the form that a GPU likes: the same answers from fewer, larger kernels, in a number format of choice.

What differs from ``RankingModel``: experts and gates are one matrix product, so that their input, the widest tensor of
the graph, is read once and not five times; keys and values are one; the co-occurrence is either a masked sum, which a
compiler turns into one kernel without writing [B, L, N, K] (``"sum"``), or looked up in the sorted candidates, for
kernels run one by one (``"sorted"``); ranks likewise. Weights and tables are cast; counters and scores stay float32.
Axis legend: B requests, T history events, N candidates, V item ids, D width, L newest events, K followers kept an item,
F features, P = B x N, X experts, W their width, H heads.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models.blocks import MergedHeads, merged, own_counts
from training.models.context import Context, moment_of
from training.models.encoders import mask_value
from training.models.ranking import RankingGraph, RankingModel
from training.models.retrieval import EXCLUDED
from vivace.contract import FIRST_ID, PADDING_ID

Lookup = Literal["sum", "sorted"]
ALIGNED = 16  # channels: what eight-bit matrix products on GPUs ask for


class GpuRanking(nn.Module):
    """Stands in for a trained ``RankingModel`` of the "mmoe" mixture. ``folded``: what depends on an item alone is read
    from tables, as in ``FoldedItems``."""

    popularity: Tensor
    follower_ids: Tensor
    follower_weights: Tensor
    category_V: Tensor
    calibration: Tensor
    retrieval_scale: Tensor
    described_VE: Tensor
    candidate_VF: Tensor
    history_VE: Tensor

    def __init__(self, model: RankingModel, dtype: torch.dtype, folded: bool = False, lookup: Lookup = "sum") -> None:
        super().__init__()
        if model.nearest is not None:
            raise ValueError("GpuRanking: ranker.nearest is not in this form yet; export the ranker as it was trained")
        if model.live is not None:
            raise ValueError("GpuRanking: ranker.rising is not in this form yet; export the ranker as it was trained")
        model = copy.deepcopy(model).eval().requires_grad_(False)
        self.config, self.width, self.names, self.dtype = model.config, model.width, model.head_names, dtype
        self.folded, self.lookup = folded, lookup
        d, items = model.width, torch.arange(len(model.popularity), device=model.popularity.device)
        for name in ("popularity", "follower_ids", "follower_weights", "calibration"):
            self.register_buffer(name, getattr(model, name))
        self.register_buffer("category_V", model._category(items))
        self.register_buffer("retrieval_scale", model.retrieval_scale.detach().clone())
        self.key_value = merged([model.key, model.value])
        self.out, self.norm_out = model.out, model.norm_out
        self.counter, self.of_context, self.context = model.counter, model.of_context, model.context
        self.types, self.columns, self.type_embedding = model.types, model.columns, model.type_embedding
        if folded:
            vector, query, item, *_ = model.candidate_parts(items)
            self.register_buffer("candidate_VF", torch.cat([vector, query, item], 1).to(dtype))
            of_item = F.linear(model.item(items), self.key_value.weight[:, d:], self.key_value.bias)
            self.register_buffer("history_VE", of_item.to(dtype))
            encoded = self.key_value.weight[:, :d]
            self.key_value = merged([(encoded, torch.zeros(2 * d, device=encoded.device))])
        else:
            self.register_buffer("described_VE", model.describe(items).to(dtype))
            self.own, self.norm_own, self.query = model.own, model.norm_own, model.query
        self.heads = MergedHeads(model, ALIGNED)
        for part in self.children():
            part.to(dtype)

    # -- parts ---------------------------------------------------------------------------------------
    def _follow(self, recent_BL: Tensor, candidates_BN: Tensor) -> Tensor:
        """Weight of each candidate among the followers of each of the newest events, float32 [B, N, L]."""
        followers_BLK, weights_BLK = self.follower_ids[recent_BL], self.follower_weights[recent_BL]
        candidates_BN = candidates_BN.to(followers_BLK.dtype)
        if self.lookup == "sum":
            hit_BNLK = followers_BLK[:, None] == candidates_BN[:, :, None, None]
            return torch.where(hit_BNLK, weights_BLK[:, None], 0.0).sum(3)
        (b, n), (lags, k) = candidates_BN.shape, followers_BLK.shape[1:]
        sorted_BN, place_BN = candidates_BN.sort(1)  # an id twice is padding, which follows nothing
        flat_BM = followers_BLK.flatten(1)
        at_BM = torch.searchsorted(sorted_BN, flat_BM).clamp_max(n - 1)
        weights_BM = torch.where(sorted_BN.gather(1, at_BM) == flat_BM, weights_BLK.flatten(1), 0.0)
        lag_M = torch.arange(lags, device=flat_BM.device)[:, None].expand(lags, k).flatten()
        into_BM = place_BN.gather(1, at_BM) * lags + lag_M
        return weights_BM.new_zeros(b, n * lags).scatter_add_(1, into_BM, weights_BM).view(b, n, lags)

    def _rank(self, scores_BN: Tensor) -> Tensor:
        """How many candidates score higher, float32 [B, N]."""
        if self.lookup == "sum":
            return (scores_BN[:, None, :] > scores_BN[:, :, None]).float().sum(2)
        ascending_BN = scores_BN.sort(1).values
        return (scores_BN.shape[1] - torch.searchsorted(ascending_BN, scores_BN.contiguous(), right=True)).float()

    def counters(self, history_BT: Tensor, candidates_BN: Tensor, scores_BN: Tensor) -> Tensor:
        """See ``RankingModel.counters``."""
        lags = self.config.lags
        top_B1 = scores_BN.amax(1, keepdim=True)
        gap_BN = torch.where(scores_BN > EXCLUDED / 2, scores_BN - top_B1, -20.0).clamp(-20.0, 0.0)
        share_BN = torch.log_softmax(gap_BN, dim=1).clamp_min(-20.0)
        recent_BL = F.pad(history_BT, (lags, 0), value=PADDING_ID)[:, -lags:]
        follow_BNL = self._follow(recent_BL, candidates_BN)
        parts = [gap_BN, share_BN, torch.log1p(self._rank(scores_BN)), self.popularity[candidates_BN]]
        parts.append(torch.log1p(follow_BNL.sum(2) * 1000.0))
        more = [torch.stack(parts, 2), torch.log1p(follow_BNL * 1000.0), self._same(recent_BL, candidates_BN)]
        if self.config.category_counts:
            more.append(own_counts(self._same(history_BT, candidates_BN), history_BT))
        return torch.cat(more, 2)

    def _same(self, events_BL: Tensor, candidates_BN: Tensor) -> Tensor:
        """See ``RankingModel._same_category``."""
        same = self.category_V[candidates_BN][:, :, None] == self.category_V[events_BL][:, None, :]
        return (same & (events_BL >= FIRST_ID)[:, None, :]).float()

    def _candidates(self, ids_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The vector, the query and the embedding of candidates [B, N, D]."""
        d = self.width
        if self.folded:
            vector, query, item = F.embedding(ids_BN, self.candidate_VF).split(d, -1)
            return vector, query, item
        described = F.embedding(ids_BN, self.described_VE)
        vector = self.norm_own(self.own(described))
        return vector, self.query(vector), described[..., :d]

    def _key_value(self, encoded_BTD: Tensor, history_BT: Tensor) -> Tensor:
        if self.folded:
            return self.key_value(encoded_BTD) + F.embedding(history_BT, self.history_VE)  # type: ignore[no-any-return]
        item = F.embedding(history_BT, self.described_VE)[..., : self.width]
        both: Tensor = self.key_value(torch.cat([encoded_BTD, item], 2))
        return both

    def _attend(
        self, vector_BND: Tensor, query_BND: Tensor, history_BT: Tensor, encoded_BTD: Tensor, types_BT: Tensor | None
    ) -> Tensor:
        n, d, t, h = vector_BND.shape[1], self.width, encoded_BTD.shape[1], self.config.heads
        history_BT = history_BT[:, -t:]
        q = query_BND.view(-1, n, h, d // h).transpose(1, 2)
        flat = self._key_value(encoded_BTD, history_BT)
        if self.type_embedding is not None and types_BT is not None:
            flat = flat + self.type_embedding(types_BT[:, -t:])
        key_value = flat.view(-1, t, 2, h, d // h)
        k, v = key_value[:, :, 0].transpose(1, 2), key_value[:, :, 1].transpose(1, 2)
        mask = (history_BT == PADDING_ID)[:, None, None, :].to(q.dtype) * mask_value(q.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=(d // h) ** -0.5)
        out: Tensor = self.norm_out(vector_BND + self.out(attended.transpose(1, 2).reshape(-1, n, d)))
        return out

    def _context(self, context: Context, vector_BND: Tensor) -> list[Tensor]:
        """See ``RankingModel.context_parts``."""
        if self.context is None or self.of_context is None:
            return []
        vector_BW = self.context(context, vector_BND[:, 0])
        alone = vector_BW[:, None, :].expand(-1, vector_BND.shape[1], -1)
        return [alone, self.of_context(vector_BW)[:, None, :] * vector_BND]

    def forward(
        self, history_BT: Tensor, candidates_BN: Tensor, scores_BN: Tensor, encoded_BTD: Tensor, *more: Tensor
    ) -> Tensor:
        """Logits float32 [B, N, heads]: see ``RankingModel``."""
        types_BT, context, _ = moment_of(self.types, self.columns, more)
        scores_BN, encoded_BTD = scores_BN.float(), encoded_BTD.to(self.dtype)
        vector, query, item = self._candidates(candidates_BN)
        attended = self._attend(vector, query, history_BT, encoded_BTD, types_BT)
        features = self.counter(self.counters(history_BT, candidates_BN, scores_BN).to(self.dtype))
        parts = [attended, vector, encoded_BTD[:, -1:] * item, features, *self._context(context, vector)]
        x_PF = torch.cat(parts, 2).flatten(0, 1)
        logits = self.heads(x_PF).float().view(*candidates_BN.shape, -1)
        residual = self.retrieval_scale * (scores_BN - scores_BN.amax(1, keepdim=True)).clamp_min(-20.0)
        return torch.cat([logits[..., :1] + residual[..., None], logits[..., 1:]], 2)

    def probabilities(self, logits: Tensor) -> Tensor:
        """See ``RankingModel.probabilities``."""
        return torch.sigmoid(logits * self.calibration[:, 0] + self.calibration[:, 1])


def gpu_graph(
    model: RankingModel, dtype: torch.dtype = torch.bfloat16, folded: bool = False, lookup: Lookup = "sum"
) -> RankingGraph:
    """The exported graph of a trained ranker with ``GpuRanking`` in the model's place."""
    return RankingGraph(GpuRanking(model, dtype, folded, lookup)).eval()
