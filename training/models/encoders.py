"""Encoders of a user's events behind one interface, chosen by ``EncoderConfig.family``.

Every encoder maps embedded events [B, T, D] and ``known`` [B, T] (False where padded, on the left) to encodings
[B, T, D]; what stands at a padded position is undefined, and padding changes nothing elsewhere. With ``newest`` the
last layer works only that many of the newest events out, and the result is [B, newest, D] (0: all).
Axis legend: B requests, T history events, D width, A attention heads, R buckets of distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models.long.attention import LONG, biased_attention, distance_buckets, eager, earlier, time_bucket, turned
from training.models.long.packed import Packed, packed
from vivace.checks import Positive, Share, Size, SizeOrNone, check_fields
from vivace.windows import Window

MASKED = -1e9  # finite, so that a row whose keys are all padding stays a number
BUCKETS = 32
Family = Literal["sasrec", "hstu", "bert4rec", "gru", "lstm"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape of the history encoder."""

    width: Size = 64
    """D, of item embeddings and states; a multiple of ``heads``."""
    layers: Size = 2
    """Blocks of the encoder."""
    heads: Size = 2
    """Attention heads of a block."""
    history: Size = 200
    """T, the newest events that are read."""
    reads: SizeOrNone = 0
    """Newest events of the ``history`` that the encoder reads (0: all). The older ones are for the ranker to choose
    from (``RankerConfig.nearest``), so a long history costs no attention of its square."""
    dropout: Share = 0.2
    """Probability, 0 <= p < 1."""
    ffn_factor: Size = 4
    """Channels of the feed-forward layer, in widths."""
    family: Family = "sasrec"
    """"sasrec" causal attention (Kang & McAuley 2018), "hstu" pointwise gated attention (Zhai et al. 2024), "bert4rec"
    bidirectional, trained on masked items (Sun et al. 2019), "gru" or "lstm" (Hidasi et al. 2016)."""
    position_bias: Literal["none", "relative"] = "none"
    """"relative": a learned bias by log-bucketed distance in the attention of sasrec and bert4rec; hstu always has
    it."""
    positions: Literal["slots", "none"] = "slots"
    """"slots": a learned embedding by place from the newest event; each new event moves all others. "none": only
    relative distance and time speak of order, so what is worked out of earlier events stays as it is when a history
    grows, and can be kept (``serving.runtime.state_cache``). For hstu, and sasrec with ``position_bias`` "relative"."""
    slide: Size = 1
    """Events of a window's oldest part among which one is chosen to start at, where a history is longer than
    ``history`` (``vivace.windows``): above 1 its start stays while the history grows by about half as many; for
    ``positions`` "none"."""
    time_bias: bool = False
    """A learned bias by log-bucketed seconds between two events (Zhai et al. 2024), for attention families."""
    types: bool = True
    """The types of the history's events, such as view and buy, join their items, where a log has more than one. Not for
    bert4rec."""
    context: bool = True
    """The context of a request, such as device, hour and the user's attributes, joins the user's state and the ranker's
    features, where a log has any. Not for bert4rec."""
    attributes: bool = False
    """Categorical and continuous attributes of an item join its embedding."""
    text_tokens: SizeOrNone = 0
    """Words of an item's text that its embedding sums (0: none)."""
    text_encoder: bool = False
    """The vector that the pretrained text encoder made of an item joins (``training.models.text_encoder``)."""
    adapter: SizeOrNone = 0
    """Width of the bottleneck after each attention block, for fine-tuning a frozen encoder (0: none)."""
    id_dropout: Share = 0.0
    """Share of the items that a training step knows by attributes and text alone, so that those learn to speak for new
    items (DropoutNet, Volkovs et al. 2017); 0 <= p < 1."""
    neighbours: SizeOrNone = 0
    """Items that are kept of each item's co-occurrence in sessions, for a memory beside the encoder
    (``session_memory``; 0: none). For logs whose items may come again."""
    neighbours_by: Literal["sessions", "linear"] = "sessions"
    """"sessions": an item's neighbours are those of the sessions that have it; "linear": those of a linear autoencoder
    of whole histories (EASE, Steck 2019), for small logs of steady taste."""
    neighbours_ridge: Positive = 300.0
    """Penalty of that autoencoder's weights."""
    head_width: SizeOrNone = 0
    """Width of an attention head after pruning (0: width / heads)."""
    ffn_width: SizeOrNone = 0
    """Channels of the feed-forward layer after pruning (0: ffn_factor x width)."""

    @property
    def of_head(self) -> int:
        """Width of one attention head."""
        return self.head_width or self.width // self.heads

    @property
    def of_ffn(self) -> int:
        """Channels of the feed-forward layer."""
        return self.ffn_width or self.ffn_factor * self.width

    def __post_init__(self) -> None:
        check_fields(self)
        if self.time_bias and self.family in ("gru", "lstm"):
            raise ValueError(f"EncoderConfig.time_bias is for attention, got the {self.family!r} family")
        self._check_positions()
        if not self.head_width and self.width % self.heads:
            raise ValueError(f"EncoderConfig: width {self.width} is not a multiple of heads {self.heads}")

    @property
    def window(self) -> Window:
        """What is read of a history."""
        return Window(self.history, self.slide)

    span = property(lambda self: self.reads or self.history, doc="Newest events that the encoder reads.")

    @property
    def grows(self) -> bool:
        """Whether the states of earlier events stay when a history grows."""
        return self.positions == "none"

    def _check_positions(self) -> None:
        if self.reads > self.history:
            raise ValueError(f"EncoderConfig.reads: expected at most history {self.history}, got {self.reads}")
        if self.reads and (self.grows or self.neighbours):
            other = "positions 'none'" if self.grows else f"neighbours {self.neighbours}"
            raise ValueError(f"EncoderConfig.reads {self.reads} does not go with encoder.{other}; leave one out")
        relative = self.family == "hstu" or (self.family == "sasrec" and self.position_bias == "relative")
        if self.grows and not relative:
            raise ValueError(
                "EncoderConfig.positions: 'none' goes with family 'hstu', or 'sasrec' with position_bias 'relative', "
                f"got family {self.family!r} with position_bias {self.position_bias!r}"
            )
        if self.slide > 1 and (not self.grows or self.slide > self.history):
            raise ValueError(
                f"EncoderConfig.slide: expected 1, or with positions 'none' at most history {self.history}, "
                f"got {self.slide} with positions {self.positions!r}"
            )


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout that takes eight decisions from each random number on the CPU, where drawing them is most of its cost;
    ``p`` is rounded to 1/256 there."""
    if not training or not p or x.is_cuda:
        return F.dropout(x, p, training)
    dropped = round(p * 256)
    draws = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(torch.iinfo(torch.int64).min, None)
    keep = draws.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
    return x * (keep.to(x.dtype) * (256 / (256 - dropped)))


def mask_value(dtype: torch.dtype) -> float:
    """What is added where nothing may be seen: MASKED, or what half precision holds even twice."""
    return MASKED if dtype != torch.float16 else -(2.0**14)


class RelativeBias(nn.Module):
    """Learned bias of each head by bucketed distance; zero before training. ``causal``: what stands above the diagonal
    is masked, so it may be anything."""

    buckets_T: Tensor

    def __init__(self, heads: int, length: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.bias_RA = nn.Parameter(torch.zeros(BUCKETS, heads))
        self.register_buffer("buckets_T", distance_buckets(length, BUCKETS), persistent=False)

    def by_distance(self) -> Tensor:
        """The bias of each distance, float32 [length, A]."""
        return self.bias_RA[self.buckets_T]

    def forward(self, t: int) -> Tensor:
        """Between any two of ``t`` events, float32 [A, T, T].

        Each row is the one above it turned by one: the same line of numbers (the diagonal's, what stands after it,
        nothing, what stands before it), laid end to end ``t`` times and cut into rows of one less, turns by itself.
        So no table of T x T buckets is kept or read."""
        of_TA = self.by_distance()[:t]
        after_TA = of_TA[:1] if self.causal else of_TA
        line_AL = torch.cat([after_TA, torch.zeros_like(of_TA[:1]), of_TA[1:].flip(0)]).T
        wide = t if self.causal else 2 * t - 1
        lines = line_AL[:, None].expand(-1, t, -1).flatten(1)
        return lines[:, : t * wide].reshape(-1, t, wide)[:, :, :t]


def time_buckets(times_BT: Tensor, newest_BS: Tensor | None = None) -> Tensor:
    """Bucket of the whole seconds between two events, int64 [B, T, T], from times in ms: powers of two from 1 on, the
    last bucket from 34 years; 0 where either time is unknown (0). ``newest_BS``: the events that look at those, in
    place of all, [B, S, T]."""
    newest_BS = times_BT if newest_BS is None else newest_BS
    return time_bucket(newest_BS[:, :, None], times_BT[:, None, :], BUCKETS)


class TimeBias(nn.Module):
    """Learned bias of each head by bucketed time between events, float32 [B, A, T, T]; zero before training."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.bias_RA = nn.Parameter(torch.zeros(BUCKETS, heads))

    def forward(self, buckets_BTT: Tensor) -> Tensor:
        return F.embedding(buckets_BTT, self.bias_RA).permute(0, 3, 1, 2)


class Adapter(nn.Module):
    """Residual bottleneck (Houlsby et al. 2019), the identity before training."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)

    def reset(self) -> None:
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y: Tensor = self.up(F.gelu(self.down(x_BTD)))
        return x_BTD + y


class AttentionBlock(nn.Module):
    """Pre-norm self-attention and feed-forward; the additive mask says what may be seen (None: causal)."""

    def __init__(self, config: EncoderConfig, length: int) -> None:
        super().__init__()
        d = config.width
        self.heads, self.of_head, self.p = config.heads, config.of_head, config.dropout
        self.norm_attention, self.norm_ffn = nn.LayerNorm(d), nn.LayerNorm(d)
        inner = config.heads * config.of_head
        self.qkv, self.out = nn.Linear(d, 3 * inner), nn.Linear(inner, d)
        self.up, self.down = nn.Linear(d, config.of_ffn), nn.Linear(config.of_ffn, d)
        causal = config.family != "bert4rec"
        self.relative = RelativeBias(config.heads, length, causal) if config.position_bias == "relative" else None
        self.time = TimeBias(config.heads) if config.time_bias else None
        self.adapter = Adapter(d, config.adapter) if config.adapter else None

    def _biased(self, mask: Tensor | None, t: int, buckets_BTT: Tensor | None) -> Tensor | None:
        if mask is not None and self.relative is not None:
            mask = mask + self.relative(t)[None]
        if mask is not None and self.time is not None:
            mask = mask + self.time(buckets_BTT)
        return mask

    def _within_kernel(self, q: Tensor, k: Tensor, v: Tensor, times_BT: Tensor | None) -> Tensor:
        """The same biases, where no mask is written."""
        distance_TA = None if self.relative is None else self.relative.by_distance()
        of_time = None if self.time is None else self.time.bias_RA
        return biased_attention(q, k, v, self.of_head**-0.5, distance_TA, of_time, times_BT)

    def forward(
        self, x_BTD: Tensor, mask: Tensor | None, buckets_BTT: Tensor | None, newest: int = 0,
        times_BT: Tensor | None = None, rows: Packed | None = None,
    ) -> Tensor:  # fmt: skip
        t = x_BTD.shape[1]
        qkv = self.qkv(self.norm_attention(x_BTD)).view(-1, t, 3, self.heads, self.of_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        # no dropout inside attention: slow on CPU
        if rows is not None:
            a = rows.attend(q, k, v, self.of_head**-0.5)
        elif mask is None and (self.relative is not None or self.time is not None):
            a = self._within_kernel(q, k, v, times_BT)
        else:
            mask = self._biased(mask, t, buckets_BTT)
            if newest and mask is not None:
                x_BTD, q, mask = x_BTD[:, -newest:], q[:, :, -newest:], mask[:, :, -newest:]
            scale = self.of_head**-0.5
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
        a = self.out(a.transpose(1, 2).flatten(2))
        x_BTD = x_BTD + dropout(a, self.p, self.training)
        h = self.down(F.gelu(self.up(self.norm_ffn(x_BTD))))
        x_BTD = x_BTD + dropout(h, self.p, self.training)
        return x_BTD if self.adapter is None else self.adapter(x_BTD)


class Attention(nn.Module):
    """A stack of attention blocks, causal or not."""

    def __init__(self, config: EncoderConfig, length: int, causal: bool) -> None:
        super().__init__()
        self.causal, self.biased = causal, config.position_bias != "none" or config.time_bias
        self.packs = not self.biased  # rows end to end, where that is worth it
        self.blocks = nn.ModuleList(AttentionBlock(config, length) for _ in range(config.layers))

    def forward(self, x_BTD: Tensor, known_BT: Tensor, times_BT: Tensor | None = None, newest: int = 0) -> Tensor:
        t = x_BTD.shape[1]  # without int(): a free axis of the exported graph
        mask: Tensor | None = None
        if self.causal and eager() and t > LONG:
            return self._long(x_BTD, known_BT, times_BT)[:, -newest:]
        whole = self.training and bool(known_BT.all())  # nothing padded: one mask for all rows
        if not (whole and self.causal and not self.biased):  # else the faster causal form
            mask = self._later(x_BTD, t)
            if not whole:
                mask = mask + (~known_BT)[:, None, None, :].to(x_BTD.dtype) * mask_value(x_BTD.dtype)
        buckets = None if times_BT is None else time_buckets(times_BT)
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, mask, buckets, newest if i == len(self.blocks) - 1 else 0)
        return x_BTD

    def _long(self, x_BTD: Tensor, known_BT: Tensor, times_BT: Tensor | None) -> Tensor:
        """The same of long histories, by rows that are packed or turned (``long.packed``, ``long.attention``)."""
        if self.packs and (rows := packed(known_BT)) is not None:
            x_1PD = rows.pack(x_BTD)
            for block in self.blocks:
                x_1PD = block(x_1PD, None, None, rows=rows)
            return rows.unpack(x_1PD)
        x_BTD, t = turned(x_BTD, known_BT), x_BTD.shape[1]
        times_BT = None if times_BT is None else turned(times_BT, known_BT)
        flexible = x_BTD.is_cuda and self.biased
        mask = self._later(x_BTD, t) if self.biased and not flexible else None
        buckets = None if times_BT is None or flexible else time_buckets(times_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, mask, buckets, times_BT=times_BT if flexible else None)
        return turned(x_BTD, known_BT, back=True)

    def _later(self, x_BTD: Tensor, t: int) -> Tensor:
        """What is added so that no event looks at later ones, [1, 1, T, T]; worked out, as a table of 4,096 by 4,096
        would be most of the graph."""
        if not self.causal:
            return x_BTD.new_zeros(1, 1, 1, 1)
        return (~earlier(t, x_BTD.device)).to(x_BTD.dtype)[None, None] * mask_value(x_BTD.dtype)


class GatedBlock(nn.Module):
    """Pointwise aggregated attention with a gate (HSTU, Zhai et al. 2024, eq. 1 to 3), causal."""

    def __init__(self, config: EncoderConfig, length: int) -> None:
        super().__init__()
        d = config.width
        self.heads, self.p, self.length = config.heads, config.dropout, length
        self.norm, self.norm_out = nn.LayerNorm(d), nn.LayerNorm(d)
        self.uvqk, self.out = nn.Linear(d, 4 * d), nn.Linear(d, d)
        self.relative = RelativeBias(config.heads, length, causal=True)
        self.time = TimeBias(config.heads) if config.time_bias else None

    def forward(self, x_BTD: Tensor, seen_B1TT: Tensor, buckets_BTT: Tensor | None, newest: int = 0) -> Tensor:
        t, d = x_BTD.shape[1], int(x_BTD.shape[2])
        u, v, q, k = F.silu(self.uvqk(self.norm(x_BTD))).chunk(4, dim=2)
        v, q, k = (z.view(-1, t, self.heads, d // self.heads).transpose(1, 2) for z in (v, q, k))
        bias = self.relative(t)[None]
        if self.time is not None:
            bias = bias + self.time(buckets_BTT)
        if newest:
            x_BTD, u, q = x_BTD[:, -newest:], u[:, -newest:], q[:, :, -newest:]
            bias, seen_B1TT = bias[:, :, -newest:], seen_B1TT[:, :, -newest:]
        weight = F.silu(q @ k.transpose(2, 3) + bias) * seen_B1TT / self.length
        attended = (weight @ v).transpose(1, 2).flatten(2)
        y = self.out(dropout(self.norm_out(attended) * u, self.p, self.training))
        return x_BTD + y


class Gated(nn.Module):
    def __init__(self, config: EncoderConfig, length: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(GatedBlock(config, length) for _ in range(config.layers))

    def forward(self, x_BTD: Tensor, known_BT: Tensor, times_BT: Tensor | None = None, newest: int = 0) -> Tensor:
        t = x_BTD.shape[1]
        seen = (earlier(t, x_BTD.device)[None, None] & known_BT[:, None, None, :]).to(x_BTD.dtype)
        buckets = None if times_BT is None else time_buckets(times_BT)
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, seen, buckets, newest if i == len(self.blocks) - 1 else 0)
        return x_BTD


class Recurrent(nn.Module):
    """GRU or LSTM layers with a residual. Without bias a zero input leaves a zero state at zero, so padding on the
    left changes nothing."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        kind = nn.GRU if config.family == "gru" else nn.LSTM
        self.layers = nn.ModuleList(
            kind(config.width, config.width, batch_first=True, bias=False) for _ in range(config.layers)
        )
        self.p = config.dropout

    def forward(self, x_BTD: Tensor, known_BT: Tensor, times_BT: Tensor | None = None, newest: int = 0) -> Tensor:
        known = known_BT[:, :, None].to(x_BTD.dtype)
        for layer in self.layers:
            y, _ = layer(x_BTD * known)
            x_BTD = x_BTD + dropout(y, self.p, self.training)
        return x_BTD[:, -newest:]


def build_encoder(config: EncoderConfig, length: int) -> nn.Module:
    """The encoder of ``config.family`` for inputs of at most ``length`` events."""
    if config.family in ("gru", "lstm"):
        return Recurrent(config)
    if config.family == "hstu":
        return Gated(config, length)
    return Attention(config, length, causal=config.family != "bert4rec")
