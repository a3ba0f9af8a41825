"""The ranking Transformer: every candidate attends to the history that the retrieval stage encoded.

Target attention as in DIN (Zhou et al. 2018, eq. 3) in multi-head form, with counters as features (retrieval score,
popularity, directed co-occurrence with the newest events) and a multi-gate mixture of experts over the task heads
(MMoE, Ma et al. 2018; see ``blocks``).
Axis legend: B requests, T history events, N candidates, V item ids, D width, L newest events, K followers kept an item,
F features, P = B x N.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models import blocks
from training.models.context import CONTEXT_WIDTH, Context, ContextTower, LiveFeatures, exportable, moment_of
from training.models.encoders import dropout
from training.models.int8_table import Int8Table
from training.models.item_table import ItemTables, list_mean
from training.models.long.nearest import NearestEvents, attend_both
from training.models.retrieval import EXCLUDED, MASKED, RetrievalModel, score_parts
from training.models.task_heads import TaskWeights
from vivace.checks import Amount, Share, Size, SizeOrNone, Whole, check_fields
from vivace.contract import FIRST_ID, PADDING_ID, live_features

LIVE_RETRIEVAL_SCALE = 0.1  # of the retriever's score at first, where counts of now are at hand
COLD_STEP = 0.01  # between the scores of two rising items of a cold user, which are above all log popularities

Mixture = Literal["mmoe", "ple", "shared"]
MIXTURES: tuple[Mixture, ...] = get_args(Mixture)


@dataclass(frozen=True, kw_only=True)
class RankerConfig:
    """Shape of the ranker."""

    candidates: Size = 100
    """N, items of the retriever that are ordered anew."""
    memory: SizeOrNone = 0
    """Newest encoded events that the candidates attend to (0: all)."""
    nearest: SizeOrNone = 0
    """K, of the events before those, that the candidates attend to as well: the nearest by item vectors (0: none)."""
    nearest_to: Literal["candidate", "request"] = "candidate"
    """Each "candidate" has K of its own (TransAct V2, Xia et al. 2025), or the "request" has K, nearest to any."""
    heads: Size = 4
    """Attention heads from candidates to events."""
    experts: Size = 3
    """Experts of the mixture, all or those in common ("ple")."""
    expert_width: Size = 64
    """Width of an expert."""
    dropout: Share = 0.2
    """Probability, 0 <= p < 1."""
    lags: Size = 10
    """L, newest events whose co-occurrence with a candidate is a feature each."""
    followers: Size = 64
    """K, items of the co-occurrence table kept for each item."""
    mixture: Mixture = "mmoe"
    """How the task heads share: "mmoe" a gate each over common experts (Ma et al. 2018), "ple" experts of their own
    beside common ones in two layers (Tang et al. 2020), "shared" one common layer."""

    rising: SizeOrNone = 0
    """M, items that are clicked most at the moment of the request: they join the candidates, and the ranker reads their
    live counts (0: no live counters)."""
    by_context: bool = True
    """Live counts by the categorical columns of the context too, where the log has any."""
    rising_same_item_s: Whole = 0
    """A user's events on one item within so many seconds count once (0: each; ``vivace.limits``)."""
    rising_user_events: Whole = 0
    """The most of a user's events that count within ten minutes (0: all)."""
    rising_newcomers: Amount = 0.0
    """Events of newcomers on an item that count for each one of others, beside five (0: all)."""
    shown_rates: bool = False
    """Beside the live counts, how often an item was shown and which share took it (``vivace.live_shown``)."""
    category_counts: bool = False
    """How many events of the whole history are of the candidate's first categorical attribute, two features."""

    def __post_init__(self) -> None:
        check_fields(self)


class RankingModel(nn.Module):
    """Logits of every task head for every candidate.

    The first head adds to the retrieval score, so that an untrained ranker keeps the retriever's order.
    """

    def __init__(
        self, config: RankerConfig, tables: ItemTables, retriever: RetrievalModel, head_names: tuple[str, ...],
        weighting: str = "static",
    ) -> None:  # fmt: skip
        super().__init__()
        d = retriever.config.width
        self.config, self.head_names, self.width = config, head_names, d
        self.item: nn.Module = nn.Embedding.from_pretrained(retriever.table().detach().clone(), freeze=True)
        self.popularity: Tensor
        self.follower_ids: Tensor
        self.follower_weights: Tensor
        self.categories: Tensor
        self.numbers: Tensor
        self.calibration: Tensor
        pop = torch.log1p(tables.popularity.float())
        known = pop[FIRST_ID:]
        spread = known.std() if len(known) > 1 else known.new_ones(())
        self.register_buffer("popularity", (pop - known.mean()) / spread.clamp_min(1e-6))
        self.register_buffer("follower_ids", tables.follower_ids[:, : config.followers].to(torch.int32).contiguous())
        self.register_buffer("follower_weights", tables.follower_weights[:, : config.followers].float().contiguous())
        self.register_buffer("categories", tables.categories)
        self.register_buffer("numbers", tables.numbers.float())
        self.register_buffer("calibration", torch.tensor([[1.0, 0.0]]).repeat(len(head_names), 1))
        self.attribute = nn.ModuleList(nn.Embedding(size, 8) for size in tables.category_sizes)
        self.lists: Tensor
        self.listed = nn.ModuleList(nn.Embedding(size, 8) for size in (tables.lists.sizes if tables.lists else ()))
        if tables.lists is not None:
            self.register_buffer("lists", tables.lists.ids)
        attributes = 8 * (len(self.attribute) + len(self.listed)) + tables.numbers.shape[1]
        self.own = nn.Linear(d + attributes, d)  # the candidate as the attention sees it; named so in saved weights
        self.key, self.value = nn.Linear(2 * d, d), nn.Linear(2 * d, d)
        self.types = retriever.types
        self.type_embedding = nn.Embedding(self.types, 2 * d) if self.types else None  # adds to keys and values
        columns = self.columns = retriever.read_context
        self.context = ContextTower(columns, CONTEXT_WIDTH) if columns.names else None
        self.of_context = nn.Linear(CONTEXT_WIDTH, d) if columns.names else None
        self.nearest = NearestEvents(d, config.nearest, config.nearest_to == "candidate") if config.nearest else None
        self.query, self.out = nn.Linear(d, d), nn.Linear(d, d)
        self.norm_own, self.norm_out = nn.LayerNorm(d), nn.LayerNorm(d)
        counted = len(retriever.columns.counted) if config.by_context else 0
        live = live_features(counted, config.shown_rates) if config.rising else 0
        counters = 5 + 2 * config.lags + 2 * config.category_counts + 2 * bool(config.nearest) + live
        self.counter = nn.Sequential(nn.Linear(counters, 64), nn.GELU(), nn.Linear(64, 32))
        towers = blocks.towers(head_names)
        self.experts = blocks.mixture(config.mixture, config.experts, config.expert_width, config.dropout, towers)
        self.towers = towers
        linears = [nn.Linear(blocks.TOWER, 1) for _ in head_names]
        self.score = nn.ModuleDict(dict(zip(head_names, linears, strict=True)))
        self.task_weights = TaskWeights(len(head_names), weighting)
        self.retrieval_scale = nn.Parameter(torch.full((), LIVE_RETRIEVAL_SCALE if config.rising else 1.0))
        self.live = LiveFeatures(live) if config.rising else None
        self.folded: FoldedItems | None = None  # what ``fold`` worked out of each item
        self.merged: blocks.MergedHeads | None = None
        for i, linear in enumerate(linears):
            nn.init.zeros_(linear.weight)
            nn.init.constant_(linear.bias, -4.5 if i else 0.0)  # about one positive among the candidates
        if self.type_embedding is not None:
            nn.init.zeros_(self.type_embedding.weight)
        with torch.no_grad():  # the mixture's layers take their input width from the first batch
            self.head_logits(torch.zeros(2, self.mixed_width))

    @property
    def mixed_width(self) -> int:
        """F, of what the mixture reads of a candidate."""
        return 3 * self.width + 32 + (self.width + CONTEXT_WIDTH) * bool(self.columns.names)

    # -- parts ---------------------------------------------------------------------------------------
    def counters(
        self, history_BT: Tensor, candidates_BN: Tensor, scores_BN: Tensor, popularity_BN: Tensor, category_BN: Tensor,
        among_BL: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Counter features float32 [B, N, 5 + 2L], with ``category_counts`` 7 + 2L: score, rank, popularity,
        co-occurrence by lag and summed, the user's own counts. Popularity and category are the candidates'.
        ``among_BL``: scores of the whole list, where the candidates are a part of it."""
        config = self.config
        gap_BN, share_BN = score_parts(scores_BN, among_BL)
        among_BL = scores_BN if among_BL is None else among_BL
        # summed as floats: in ONNX Runtime a sum of integers took a tenth of the graph's time
        rank_BN = torch.log1p((among_BL[:, None, :] > scores_BN[:, :, None]).to(scores_BN.dtype).sum(2))
        recent_BL = F.pad(history_BT, (config.lags, 0), value=PADDING_ID)[:, -config.lags :]  # of any length, exported
        followers_BLK = self.follower_ids[recent_BL]
        weights_BLK = self.follower_weights[recent_BL]
        hit_BLNK = followers_BLK[:, :, None] == candidates_BN.to(followers_BLK.dtype)[:, None, :, None]
        follow_BLN = (hit_BLNK.to(weights_BLK.dtype) @ weights_BLK[:, :, :, None]).squeeze(3)
        follow_BNL = follow_BLN.transpose(1, 2)
        same_BNL = self._same_category(recent_BL, category_BN)
        parts = [gap_BN, share_BN.log().clamp_min(-20.0), rank_BN, popularity_BN]
        log_follow_BNL = torch.log1p(follow_BNL * 1000.0)
        more = [torch.stack([*parts, torch.log1p(follow_BNL.sum(2) * 1000.0)], 2), log_follow_BNL, same_BNL]
        if config.category_counts:
            same_BNT = self._same_category(history_BT, category_BN)
            more.append(blocks.own_counts(same_BNT, history_BT))
        return torch.cat(more, dim=2)

    def _category(self, ids: Tensor) -> Tensor:
        """First categorical attribute of items, int64; the item itself where the catalogue has none, so that an item
        that comes again is told from the others."""
        return self.categories[:, 0][ids] if len(self.attribute) else ids

    def _same_category(self, recent_BL: Tensor, category_BN: Tensor) -> Tensor:
        """1 where candidate and event share their first categorical attribute, float32 [B, N, L]."""
        same = category_BN[:, :, None] == self._category(recent_BL)[:, None, :]
        return (same & (recent_BL >= FIRST_ID)[:, None, :]).to(self.numbers.dtype)

    def describe(self, ids: Tensor) -> Tensor:
        """Embedding, attributes and numbers of items, float32 [..., D + attributes]."""
        parts = [self.item(ids), *(e(self.categories[ids][..., i]) for i, e in enumerate(self.attribute))]
        if len(self.listed):
            parts += self.list_means(self.lists[ids])
        return torch.cat([*parts, self.numbers[ids]], dim=-1)

    def list_means(self, ids: Tensor) -> list[Tensor]:
        """Of each list attribute the mean of its values' embeddings, float32 [..., 8]; ``ids`` [..., A, K]."""
        return [list_mean(values, ids[..., i, :]) for i, values in enumerate(self.listed)]  # type: ignore[arg-type]

    def keys_and_values(
        self, encoded_BTD: Tensor, history_BT: Tensor, types_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the attention reads of each encoded event, float32 [B, T, D] twice, of its encoding, its item and its
        type; the history and the types may be longer."""
        t = encoded_BTD.shape[1]
        history_BT, types_BT = history_BT[:, -t:], None if types_BT is None else types_BT[:, -t:]
        if self.folded is not None:
            key, value = self.folded.keys_and_values(encoded_BTD, history_BT)
        else:
            memory = torch.cat([encoded_BTD, self.item(history_BT)], dim=2)
            key, value = self.key(memory), self.value(memory)
        if self.type_embedding is None or types_BT is None:
            return key, value
        of_key, of_value = self.type_embedding(types_BT).split(self.width, -1)
        return key + of_key, value + of_value

    def candidate_parts(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All that depends on a candidate alone: its own vector, its query and its embedding float32 [..., D], its
        popularity float32 [...] and its category int64 [...]."""
        if self.folded is not None:
            return *self.folded.candidate_parts(ids), self._category(ids)
        vector = self.norm_own(self.own(self.describe(ids)))
        vector = dropout(vector, self.config.dropout, self.training)
        return vector, self.query(vector), self.item(ids), self.popularity[ids], self._category(ids)

    def attend(
        self, candidate_BND: Tensor, query_BND: Tensor, item_BND: Tensor, ids_BN: Tensor, history_BT: Tensor,
        types_BT: Tensor | None, key: Tensor, value: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """(what each candidate finds in the history, float32 [B, N, D]: its encoded part, whose ``keys_and_values``
        these are, and what is chosen of the older events; features of these, float32 [B, N, 2], if they are read).
        ``ids_BN``: of the candidates."""
        n, d, t, h = candidate_BND.shape[1], self.width, key.shape[1], self.config.heads
        older_BO, history_BT = history_BT[:, : history_BT.shape[1] - t], history_BT[:, -t:]
        of_older = None if types_BT is None else types_BT[:, : types_BT.shape[1] - t]
        q = query_BND.view(-1, n, h, d // h).transpose(1, 2)
        k = key.view(-1, t, h, d // h).transpose(1, 2)
        v = value.view(-1, t, h, d // h).transpose(1, 2)
        mask = (history_BT == PADDING_ID)[:, None, None, :].to(q.dtype) * MASKED
        if self.nearest is None:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=(d // h) ** -0.5)
            return self.norm_out(candidate_BND + self.out(attended.transpose(1, 2).reshape(-1, n, d))), []
        typed = None if of_older is None or self.type_embedding is None else self.type_embedding(of_older)
        chosen = self.nearest(older_BO, item_BND, ids_BN, self.item, typed, MASKED)
        attended = self.out(attend_both(q, k, v, mask, chosen))
        return self.norm_out(candidate_BND + attended), [chosen.features]

    def head_logits(self, x_PF: Tensor) -> Tensor:
        """Of features of candidates float32 [P, F]: float32 [P, heads], without the retrieval score."""
        if self.merged is not None:
            merged: Tensor = self.merged(x_PF)
            return merged
        mixed = self.towers(self.experts(x_PF))  # one tensor for all towers, or one each
        return torch.cat([self.score[h](mixed[h]) for h in self.head_names], 1)

    def context_parts(self, context: Context, candidate_BND: Tensor) -> list[Tensor]:
        """What the context says, alone and of each candidate: float32 [B, N, W] and [B, N, D]; none without one."""
        if self.context is None or self.of_context is None:
            return []
        vector_BW = self.context(context, candidate_BND[:, 0])
        alone = vector_BW[:, None, :] + torch.zeros_like(candidate_BND[:, :, :1])
        return [alone, self.of_context(vector_BW)[:, None, :] * candidate_BND]

    def forward(
        self, history_BT: Tensor, candidates_BN: Tensor, scores_BN: Tensor, encoded_BTD: Tensor, *more: Tensor
    ) -> Tensor:
        """Logits float32 [B, N, heads]. The inputs are those of ``contract.ranking_inputs``."""
        types_BT, context, live = moment_of(self.types, self.columns, more)
        read = self.keys_and_values(encoded_BTD, history_BT, types_BT)
        of_history = (history_BT, types_BT, *read, encoded_BTD[:, -1:])
        return self.logits(candidates_BN, scores_BN, None, *of_history, context, live)

    def logits(
        self, candidates_BN: Tensor, scores_BN: Tensor, among_BL: Tensor | None, history_BT: Tensor,
        types_BT: Tensor | None, key: Tensor, value: Tensor, newest_B1D: Tensor, context: Context,
        live: Sequence[Tensor],
    ) -> Tensor:  # fmt: skip
        """The same of candidates that may be a part of the list whose scores are ``among_BL``."""
        n, f = candidates_BN.shape[1], len(self.head_names)  # without int(): free axes of the exported graph
        candidate, query, item, popularity, category = self.candidate_parts(candidates_BN)
        attended, of_older = self.attend(candidate, query, item, candidates_BN, history_BT, types_BT, key, value)
        counted = self.counters(history_BT, candidates_BN, scores_BN, popularity, category, among_BL)
        counted = torch.cat([counted, *of_older], 2) if of_older else counted
        if self.live is not None:
            live_BNF = self.live(candidates_BN, *live)
            counted = torch.cat([counted, live_BNF], 2)
        features = self.counter(counted)
        user = newest_B1D * item
        parts = [attended, candidate, user, features, *self.context_parts(context, candidate)]
        x = torch.cat(parts, dim=2).flatten(0, 1)
        logits = self.head_logits(x).view(-1, n, f)
        best_B1 = (scores_BN if among_BL is None else among_BL).amax(1, keepdim=True)
        residual = self.retrieval_scale * (scores_BN - best_B1).clamp_min(-20.0)
        if self.nearest is not None:
            residual = residual + self.nearest.direct(of_older[0]).squeeze(2)
        if self.live is not None:
            residual = residual + self.live.direct(live_BNF).squeeze(2)
        return torch.cat([logits[..., :1] + residual[..., None], logits[..., 1:]], dim=2)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Calibrated probabilities [..., heads] of logits of the same shape (Platt scaling)."""
        return torch.sigmoid(logits * self.calibration[:, 0] + self.calibration[:, 1])


class FoldedItems(nn.Module):
    """What a trained ranker needs of an item alone, worked out for the whole catalogue: one row to read instead of
    layers to run. The answers are the same but for rounding; the table has five numbers where the item embedding has
    one."""

    candidate_VF: Tensor
    history_VE: Tensor
    key_value_ED: Tensor

    def __init__(self, model: RankingModel) -> None:
        super().__init__()
        self.width = d = model.width
        all_ids = torch.arange(len(model.popularity), device=model.popularity.device)
        with torch.no_grad():
            *vectors, popularity, _ = model.eval().candidate_parts(all_ids)
            layers = (model.key, model.value)
            of_item = [F.linear(model.item(all_ids), layer.weight[:, d:], layer.bias) for layer in layers]
            self.register_buffer("candidate_VF", torch.cat([*vectors, popularity[:, None]], 1))
            self.register_buffer("history_VE", torch.cat(of_item, 1))
            self.register_buffer("key_value_ED", torch.cat([layer.weight[:, :d] for layer in layers]).clone())

    def candidate_parts(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Vector, query, embedding and popularity of candidates: see ``RankingModel.candidate_parts``."""
        d = self.width
        vector, query, item, popularity = F.embedding(ids, self.candidate_VF).split([d, d, d, 1], -1)
        return vector, query, item, popularity.squeeze(-1)

    def keys_and_values(self, encoded_BTD: Tensor, history_BT: Tensor) -> tuple[Tensor, Tensor]:
        """See ``RankingModel.keys_and_values``."""
        both = F.linear(encoded_BTD, self.key_value_ED) + F.embedding(history_BT, self.history_VE)
        key, value = both.split(self.width, -1)
        return key, value


def fold(model: RankingModel) -> RankingModel:
    """A copy of a trained ranker that reads ``FoldedItems``."""
    folded = copy.deepcopy(model.eval())
    folded.folded = FoldedItems(folded)
    if folded.nearest is not None:
        folded.nearest.fold(folded.item(torch.arange(len(folded.popularity), device=folded.popularity.device)))
    return folded


class RankingGraph(nn.Module):
    """What is exported as ``ranking.onnx``: candidates sorted by the first head, with calibrated probabilities.

    For a history without a known item the retriever's order (popularity) stays. ``folded``: see ``FoldedItems``.
    """

    def __init__(self, model: Any, int8_table: bool = False, folded: bool = False) -> None:
        """``model``: a ``RankingModel``, or what stands in for one (``ranking_gpu.GpuRanking``)."""
        super().__init__()
        self.model = exportable(fold(model) if folded else model)
        if int8_table:
            assert isinstance(model.item, nn.Embedding)
            self.model = exportable(copy.deepcopy(model))
            self.model.item = Int8Table(model.item.weight.detach())

    def forward(
        self, history_ids: Tensor, candidate_ids: Tensor, candidate_scores: Tensor, encoded_history: Tensor,
        *more: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        logits = self.model(history_ids, candidate_ids, candidate_scores, encoded_history, *more)
        return self.ordered(logits, history_ids, candidate_ids, candidate_scores, *more)

    def ordered(
        self, logits: Tensor, history_ids: Tensor, candidate_ids: Tensor, candidate_scores: Tensor, *more: Tensor
    ) -> tuple[Tensor, ...]:
        """What is answered of the logits."""
        live = more[-2:] if self.model.config.rising else ()
        empty_B1 = (history_ids < FIRST_ID).all(dim=1, keepdim=True)
        if live:  # of a cold user, what is clicked most now comes before what was popular in training
            place = torch.arange(candidate_ids.shape[1], 0, -1, device=logits.device, dtype=logits.dtype)
            is_rising = (candidate_ids[:, :, None] == live[0][:, None, :]).any(2)
            above = candidate_scores.amax(1, keepdim=True) + COLD_STEP * place
            candidate_scores = torch.where(is_rising, above, candidate_scores)
        score = torch.where(empty_B1, candidate_scores, logits[..., 0])
        score = torch.where(candidate_ids == PADDING_ID, torch.full_like(score, EXCLUDED), score)
        ranked, order = torch.topk(score, score.shape[1], dim=1)
        ids = candidate_ids.gather(1, order)
        probabilities = self.model.probabilities(logits)
        heads = [probabilities[..., i].gather(1, order) for i in range(probabilities.shape[2])]
        return ids, torch.stack([ranked, *heads], dim=1)
