"""The history encoder one step at a time: new events beside what was worked out of those before them.

For encoders whose earlier states stay when a history grows (``EncoderConfig.grows``). An event's states are the keys
and values that later events look at, of each layer; with them the new events' encodings are those of the whole
history, but for rounding. Without earlier events the graph encodes a whole history.
Axis legend: B requests, P earlier events (padded on the left), S new events (padded on the right), D width, L layers,
A attention heads, H width of a head, C states of an event (L x 2 x A x H), V item ids, N candidates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models.context import exportable, moment_of
from training.models.encoders import (
    MASKED,
    AttentionBlock,
    EncoderConfig,
    GatedBlock,
    RelativeBias,
    TimeBias,
    time_buckets,
)
from training.models.retrieval import RetrievalModel, propose
from vivace.contract import PADDING_ID


def states_of_event(config: EncoderConfig) -> int:
    """C, numbers that are kept of an event beside its encoding."""
    inner = config.width if config.family == "hstu" else config.heads * config.of_head
    return config.layers * 2 * inner


def _bias(relative: RelativeBias | None, time: TimeBias | None, distance_SK: Tensor, buckets: Tensor | None) -> Tensor:
    """What is added to the attention of new events to all, float32, to be broadcast to [B, A, S, P + S]."""
    bias = torch.zeros(1, 1, 1, 1)
    if relative is not None:
        by_distance_TA = relative.bias_RA[relative.buckets_TT[0]]
        longest = by_distance_TA.shape[0] - 1
        bias = F.embedding(distance_SK.clamp(0, longest), by_distance_TA).permute(2, 0, 1)[None]
    if time is not None:
        bias = bias + time(buckets)
    return bias


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, A x H] as [B, A, S, H]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


class EncoderStep(nn.Module):
    """The step of a trained retriever; shares its weights.

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
        distance_SK = (p + torch.arange(s))[:, None] - torch.arange(p + s)[None]
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
        mask = bias + torch.where(seen, 0.0, MASKED)
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
