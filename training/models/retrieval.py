"""The retrieval model: an encoder of the user's events, scored against every item.

Source: SASRec (Kang & McAuley 2018) with pre-normalised blocks, tied item embeddings and a softmax over the whole
catalogue (Klenitskiy & Vasilev, "Turning Dross Into Gold Loss", RecSys 2023); other encoders in ``encoders``.
Axis legend: B requests, T history events, V item ids, D width, N candidates; of the step (``EncoderStep``) P earlier
events (padded on the left), S new events (padded on the right), A attention heads, C states of an event.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models.context import CONTEXT_WIDTH, Context, ContextTower, exportable, moment_of
from training.models.encoders import (
    MASKED,
    Adapter,
    AttentionBlock,
    EncoderConfig,
    GatedBlock,
    RelativeBias,
    TimeBias,
    build_encoder,
    dropout,
    time_buckets,
)
from training.models.int8_table import Int8Rows, Int8Table
from training.models.item_table import ItemAttributes, ItemTable
from training.models.session_memory import LinearMemory, SessionMemory
from vivace.context import ContextColumns
from vivace.contract import FIRST_ID, PADDING_ID

__all__ = ["EXCLUDED", "MASKED", "Context", "EncoderConfig", "RetrievalGraph", "RetrievalModel", "propose"]

EXCLUDED = -1e30


class RetrievalModel(nn.Module):
    """Encoder with tied item embeddings.

    Args:
        config: shape of the encoder.
        items: V, the number of item ids including the special ids 0..2.
        popularity: float [V], events of each item in the training data; orders the answer to an empty history.
        attributes: what the catalogue says of the items, where ``config`` asks for it.
        columns: event types and context of the data set, which ``config`` may leave unread.
    """

    popularity: Tensor

    def __init__(
        self,
        config: EncoderConfig,
        items: int,
        popularity: Tensor,
        attributes: ItemAttributes | None = None,
        columns: ContextColumns | None = None,
    ) -> None:
        super().__init__()
        if popularity.shape != (items,):
            raise ValueError(f"popularity: expected shape [{items}], got {list(popularity.shape)}")
        self.config = config
        self.masked = config.family == "bert4rec"
        length = config.span + self.masked  # the place that asks for the next item comes last
        self.items = ItemTable(items, config.width, attributes, config.id_dropout)
        placeless = config.family in ("gru", "lstm") or config.positions == "none"
        self.position = None if placeless else nn.Embedding(length, config.width)  # the last row is the newest event's
        self.encoder = build_encoder(config, length)
        self.norm = nn.LayerNorm(config.width)
        self.columns = ContextColumns() if columns is None or self.masked else columns
        self.types = self.columns.types if config.types else 0
        self.type_embedding = nn.Embedding(self.types, config.width) if self.types else None
        reads = config.context and bool(self.columns.names)
        self.context = ContextTower(self.columns, CONTEXT_WIDTH) if reads else None
        self.of_context = nn.Linear(CONTEXT_WIDTH, config.width) if reads else None
        self.bias = nn.Parameter(torch.zeros(items))
        self.register_buffer("popularity", popularity.float())
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Adapter):
                module.reset()
        with torch.no_grad():
            self.items.id.weight[PADDING_ID].zero_()
            if self.type_embedding is not None:
                self.type_embedding.weight.zero_()
            if self.of_context is not None:
                self.of_context.weight.zero_()
        memory = LinearMemory if config.neighbours_by == "linear" else SessionMemory
        self.memory = memory(items, config.neighbours, config.history) if config.neighbours else None
        self.remembers = True  # False while the encoder is trained: the memory's table holds the targets of training
        self.mask_token = nn.Parameter(torch.zeros(config.width).normal_(std=0.02)) if self.masked else None

    def table(self) -> Tensor:
        """Embeddings of all items float32 [V, D]; training asks once a step, an exported graph holds them."""
        table: Tensor = self.items()
        return table

    @property
    def read_context(self) -> ContextColumns:
        """The context's columns that the model reads."""
        return self.columns if self.context is not None else ContextColumns()

    def state(self, encoded: Tensor, context: Context | None = None) -> Tensor:
        """The user's state [..., D] that items are scored against, of an encoding [..., D] and the context [..., C] and
        [..., F] of the request; all of it null where there is none."""
        if self.context is None or self.of_context is None:
            return encoded
        state: Tensor = encoded + self.of_context(self.context(context or (None, None), encoded))
        return state

    def _run(self, x_BTD: Tensor, known_BT: Tensor, times: Tensor | None, newest: int = 0) -> Tensor:
        if self.position is not None:
            x_BTD = x_BTD + self.position.weight[self.position.num_embeddings - x_BTD.shape[1] :]
        x_BTD = dropout(x_BTD, self.config.dropout, self.training)
        if not self.config.time_bias:
            times = None
        elif times is None:
            times = torch.zeros_like(known_BT, dtype=torch.long)
        h = self.norm(self.encoder(x_BTD, known_BT, times, newest))
        return h * known_BT[:, -newest:, None].to(x_BTD.dtype)

    def embedded(self, history_BT: Tensor, table: Tensor | Int8Table | Int8Rows, types: Tensor | None = None) -> Tensor:
        """What the encoder reads of events before it knows their order, [B, T, D]."""
        rows = table(history_BT) if isinstance(table, Int8Table | Int8Rows) else F.embedding(history_BT, table)
        x_BTD = rows * self.config.width**0.5
        return x_BTD if self.type_embedding is None or types is None else x_BTD + self.type_embedding(types)

    def encode(
        self,
        history_BT: Tensor,
        table_VD: Tensor | Int8Table | Int8Rows | None = None,
        times: Tensor | None = None,
        newest: int = 0,
        types: Tensor | None = None,
    ) -> Tensor:
        """Encoded history float32 [B, T, D] of ids int64 [B, T], padded on the left; T <= config.history; with
        ``config.reads`` only those newest ones are read, [B, reads, D]. ``times`` in ms, int64 [B, T], 0 where unknown:
        read by a configuration with ``time_bias``. ``newest``: only the last so many rows are worked out,
        [B, newest, D] (0: all). ``types``: ids of the events' types int64 [B, T], None where they are not known.

        The newest row is the user's state, which is scored against the items; rows of padding are zero."""
        table_VD = self.table() if table_VD is None else table_VD
        if reads := self.config.reads:
            history_BT = history_BT[:, -reads:]
            times, types = (None if x is None else x[:, -reads:] for x in (times, types))
        known_BT = history_BT != PADDING_ID
        x_BTD = self.embedded(history_BT, table_VD, types)
        if self.mask_token is None:
            return self._run(x_BTD, known_BT, times, newest)
        mask_B1D = self.mask_token + torch.zeros_like(x_BTD[:, :1])
        if times is not None:  # the place that asks stands beside the newest event
            times = torch.cat([times, times[:, -1:]], 1)
        h = self._run(
            torch.cat([x_BTD, mask_B1D], 1), torch.cat([known_BT, torch.ones_like(known_BT[:, :1])], 1), times
        )
        return torch.cat([h[:, : history_BT.shape[1] - 1], h[:, -1:]], 1)[:, -newest:]

    def encode_masked(
        self, window_BT: Tensor, hidden_BT: Tensor, table_VD: Tensor, times: Tensor | None = None
    ) -> Tensor:
        """Encodings [B, T, D] of a window whose ``hidden_BT`` items are replaced by the mask (Sun et al. 2019)."""
        if self.mask_token is None:
            raise ValueError("encode_masked: only the bert4rec family has a mask token")
        x_BTD = torch.where(hidden_BT[:, :, None], self.mask_token, self.embedded(window_BT, table_VD))
        return self._run(x_BTD, window_BT != PADDING_ID, times)

    def logits(self, encoded: Tensor, table_VD: Tensor | Int8Table | None = None) -> Tensor:
        """Score of every item, float32 [..., V], of encodings [..., D]."""
        if isinstance(table_VD, Int8Table):
            return table_VD.scores(encoded) + self.bias
        return F.linear(encoded, self.table() if table_VD is None else table_VD, self.bias)

    def scores(
        self,
        history_BT: Tensor,
        encoded_BTD: Tensor,
        exclude_BV: Tensor,
        table_VD: Tensor | Int8Table | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """Retrieval score float32 [B, V]: the newest encoding, in the request's context, against every item, with what
        the session memory adds; where the history holds no known item, log popularity. Excluded items and the special
        ids get EXCLUDED."""
        scores_BV = self.logits(self.state(encoded_BTD[:, -1], context), table_VD)
        if self.memory is not None and self.remembers:
            scores_BV = self.memory(scores_BV, history_BT)
        if scores_BV.dtype != torch.float32:  # a graph cast to 16 bits: EXCLUDED is beyond half precision
            scores_BV = scores_BV.float()
        empty_B1 = (history_BT < FIRST_ID).all(dim=1, keepdim=True)
        scores_BV = torch.where(empty_B1, torch.log1p(self.popularity.float())[None], scores_BV)
        special_V = torch.arange(scores_BV.shape[1], device=scores_BV.device) < FIRST_ID
        return torch.where(exclude_BV | special_V, torch.full_like(scores_BV, EXCLUDED), scores_BV)


class RetrievalGraph(nn.Module):
    """What is exported as ``retrieval.onnx``: ids and exclusions (and times, if the encoder reads them) in, top-N
    candidates and the encoded history out."""

    table_VD: Tensor | Int8Table

    def __init__(
        self, model: RetrievalModel, candidates: int, memory: int = 0, int8_table: bool = False, rising: int = 0
    ) -> None:
        """``memory``: newest encoded events that are handed to the ranker (0: all); ``rising``: items that join the
        candidates (0: none)."""
        super().__init__()
        self.model, self.candidates, self.memory, self.rising = exportable(model), candidates, memory, rising
        with torch.no_grad():
            table = model.table().detach().clone()
        if int8_table:
            self.table_VD = Int8Table(table)
        else:
            self.register_buffer("table_VD", table)

    def forward(self, history_ids: Tensor, exclude: Tensor, *more: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs are those of ``contract.retrieval_inputs``."""
        times, types, context, rest = read_inputs(self.model, more)
        encoded = self.model.encode(history_ids, self.table_VD, times, self.memory, types)
        scores = self.model.scores(history_ids, encoded, exclude, self.table_VD, context)
        return *propose(scores, self.candidates, rest[0] if self.rising else None), encoded


def read_inputs(
    model: RetrievalModel, more: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None, Context, list[Tensor]]:
    """(times, types, context, what comes behind) of the inputs of a retrieval stage after the exclusions: each is there
    if the model reads it."""
    left = list(more)
    times = left.pop(0) if model.config.time_bias and left else None
    return times, *moment_of(model.types, model.read_context, left)


def score_parts(scores_BN: Tensor, among_BL: Tensor | None) -> tuple[Tensor, Tensor]:
    """How far scores float32 [B, N] are below the list's best (-20 to 0), and their shares of its softmax.
    ``among_BL``: the list, where it is more than these."""
    whole_BL = scores_BN if among_BL is None else among_BL
    top_B1 = whole_BL.amax(1, keepdim=True)

    def gap(of_BN: Tensor) -> Tensor:
        none = torch.full_like(of_BN, -20.0)
        return torch.where(of_BN > EXCLUDED / 2, of_BN - top_B1, none).clamp(-20.0, 0.0)

    gap_BN = gap(scores_BN)
    if among_BL is None:
        return gap_BN, torch.softmax(gap_BN, dim=1)
    return gap_BN, torch.exp(gap_BN) / torch.exp(gap(whole_BL)).sum(1, keepdim=True)


def propose(scores_BV: Tensor, count: int, rising_BM: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(ids int64 [B, N], scores [B, N]) of the best ``count`` items, best first; id 0 where only excluded ones are
    left. With ``rising_BM`` int64 [B, M] those come before them, each item once, in [B, M + N]."""
    if rising_BM is None:
        top, ids = torch.topk(scores_BV, count, dim=1)
        return torch.where(top > EXCLUDED / 2, ids, torch.full_like(ids, PADDING_ID)), top
    of_rising_BM = scores_BV.gather(1, rising_BM)
    others_BV = scores_BV.scatter(1, rising_BM, torch.full_like(of_rising_BM, EXCLUDED))
    top, ids = torch.topk(others_BV, count, dim=1)
    ids_BN, scores_BN = torch.cat([rising_BM, ids], 1), torch.cat([of_rising_BM, top], 1)
    there_BN = scores_BN > EXCLUDED / 2
    # in their order, what is left out to the end: topk of distinct integers is a stable sort
    place = torch.arange(ids_BN.shape[1], 0, -1, device=ids_BN.device, dtype=scores_BN.dtype)
    _, order = torch.topk(there_BN.to(scores_BN.dtype) * 65536.0 + place, ids_BN.shape[1], dim=1)
    ids_BN = torch.where(there_BN, ids_BN, torch.full_like(ids_BN, PADDING_ID))
    return ids_BN.gather(1, order), scores_BN.gather(1, order)


def states_of_event(config: EncoderConfig) -> int:
    """C, numbers that are kept of an event beside its encoding."""
    inner = config.width if config.family == "hstu" else config.heads * config.of_head
    return config.layers * 2 * inner


def _bias(relative: RelativeBias | None, time: TimeBias | None, distance_SK: Tensor, buckets: Tensor | None) -> Tensor:
    """What is added to the attention of new events to all, float32, to be broadcast to [B, A, S, P + S]."""
    bias = torch.zeros(1, 1, 1, 1, device=distance_SK.device)
    if relative is not None:
        by_distance_TA = relative.by_distance()
        longest = by_distance_TA.shape[0] - 1
        bias = F.embedding(distance_SK.clamp(0, longest), by_distance_TA).permute(2, 0, 1)[None]
    if time is not None:
        bias = bias + time(buckets)
    return bias


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, A x H] as [B, A, S, H]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


class EncoderStep(nn.Module):
    """The history encoder of a trained retriever one step at a time: new events beside what was worked out of those
    before them; shares its weights. An event's states are the keys and values of each layer that later events look at:
    with them the new events' encodings are those of the whole history, but for rounding. Without earlier events it
    encodes a whole history.

    Raises ValueError for an encoder whose states do not stay.
    """

    def __init__(self, model: RetrievalModel) -> None:
        super().__init__()
        if not model.config.grows:
            raise ValueError(
                f"EncoderStep: expected an encoder with positions 'none', got {model.config.positions!r}; train with "
                "encoder.positions none"
            )
        self.model = model

    def forward(
        self, x_BSD: Tensor, known_BP: Tensor, states_BPC: Tensor, times_BS: Tensor | None, times_BP: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(encodings [B, S, D], states [B, S, C]) of embedded new events. ``known_BP``: False where padded."""
        p, s = states_BPC.shape[1], x_BSD.shape[1]
        place_K = torch.arange(p + s, device=x_BSD.device)
        distance_SK = place_K[p:, None] - place_K[None]
        seen_B1SK = (distance_SK >= 0)[None, None] & F.pad(known_BP, (0, s), value=True)[:, None, None]
        buckets = None
        if self.model.config.time_bias:
            assert times_BS is not None and times_BP is not None
            buckets = time_buckets(torch.cat([times_BP, times_BS], 1), times_BS)
        blocks = list(self.model.encoder.blocks)  # type: ignore[arg-type]
        earlier = states_BPC.chunk(2 * len(blocks), dim=2)
        out: list[Tensor] = []
        for i, block in enumerate(blocks):
            step = self._gated if isinstance(block, GatedBlock) else self._attention
            bias = _bias(block.relative, block.time, distance_SK, buckets)
            x_BSD, k, v = step(block, x_BSD, earlier[2 * i], earlier[2 * i + 1], seen_B1SK, bias)
            out += [k, v]
        return self.model.norm(x_BSD), torch.cat(out, 2)

    @staticmethod
    def _attention(
        block: AttentionBlock, x: Tensor, keys: Tensor, values: Tensor, seen: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = block.qkv(block.norm_attention(x)).chunk(3, dim=2)
        all_k, all_v = (_heads(torch.cat(z, 1), block.heads) for z in ((keys, k), (values, v)))
        mask = (bias + torch.where(seen, 0.0, MASKED)).to(q.dtype)
        scale = block.of_head**-0.5
        a = F.scaled_dot_product_attention(_heads(q, block.heads), all_k, all_v, attn_mask=mask, scale=scale)
        x = x + block.out(a.transpose(1, 2).flatten(2))
        x = x + block.down(F.gelu(block.up(block.norm_ffn(x))))
        return x if block.adapter is None else block.adapter(x), k, v

    @staticmethod
    def _gated(
        block: GatedBlock, x: Tensor, keys: Tensor, values: Tensor, seen: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        u, v, q, k = F.silu(block.uvqk(block.norm(x))).chunk(4, dim=2)
        all_k, all_v = (_heads(torch.cat(z, 1), block.heads) for z in ((keys, k), (values, v)))
        weight = F.silu(_heads(q, block.heads) @ all_k.transpose(2, 3) + bias) * seen.to(x.dtype) / block.length
        attended = (weight @ all_v).transpose(1, 2).flatten(2)
        return x + block.out(block.norm_out(attended) * u), k, v


class EncoderStepGraph(nn.Module):
    """What is exported as ``encoder_step.onnx``; its inputs are those of ``contract.step_inputs``."""

    table_VD: Tensor

    def __init__(self, model: RetrievalModel) -> None:
        super().__init__()
        self.step = EncoderStep(exportable(model))
        with torch.no_grad():
            self.register_buffer("table_VD", model.table().detach().clone())

    def forward(self, ids_BS: Tensor, known_BP: Tensor, states_BPC: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        """(encodings float32 [B, S, D], zero where padded; states float32 [B, S, C])."""
        model, left = self.step.model, list(more)
        times = (left.pop(0), left.pop(0)) if model.config.time_bias else (None, None)
        types = left.pop(0) if model.types else None
        x_BSD = model.embedded(ids_BS, self.table_VD, types)
        encoded, states = self.step(x_BSD, known_BP, states_BPC, *times)
        return encoded * (ids_BS != PADDING_ID)[:, :, None].to(encoded.dtype), states


class ScoringGraph(nn.Module):
    """What is exported as ``scoring.onnx``: retrieval after its encoder. Its inputs are those of
    ``contract.scoring_inputs``."""

    table_VD: Tensor

    def __init__(self, model: RetrievalModel, candidates: int, rising: int = 0) -> None:
        super().__init__()
        self.model, self.candidates, self.rising = exportable(model), candidates, rising
        with torch.no_grad():
            self.register_buffer("table_VD", model.table().detach().clone())

    def forward(self, history_ids: Tensor, exclude: Tensor, newest_BD: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        """(ids int64 [B, N], scores float32 [B, N]), as retrieval gives them."""
        _, context, rest = moment_of(0, self.model.read_context, more)
        scores = self.model.scores(history_ids, newest_BD[:, None], exclude, self.table_VD, context)
        return propose(scores, self.candidates, rest[0] if self.rising else None)
