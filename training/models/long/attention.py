"""Causal self-attention over long histories, without a mask of its square.

Rows that are padded on the left are turned, so that padding stands behind the events: none looks at what comes later,
and the causal form of attention needs no mask. Where a bias by distance or time is learned, it is worked out within
the kernel on a GPU (FlexAttention, Dong et al. 2024) instead of being written out for every pair of events.
Axis legend: B requests, T history events, D width, A attention heads, H width of a head, R buckets of distance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

LONG = 256  # events beyond which a mask of their square costs more than turning the rows


def eager() -> bool:
    """Whether no graph is being recorded, which would keep what depends on the rows of an example."""
    recording = torch.onnx.is_in_onnx_export() or torch.jit.is_tracing() or torch.compiler.is_compiling()
    return not recording


def earlier(t: int, device: torch.device) -> Tensor:
    """Whether an event (column) is not after another (row), bool [T, T]."""
    place_T = torch.arange(t, device=device)
    return place_T[:, None] >= place_T[None]


def distance_buckets(length: int, buckets: int) -> Tensor:
    """Bucket of each distance between two events, int64 [length]: exact for the first half of the buckets, then
    logarithmic up to ``length`` (Raffel et al. 2020, T5)."""
    distance = torch.arange(length)
    exact = buckets // 2
    spread = math.log(max(length, exact + 1) / exact)
    far = exact + (torch.log(distance.clamp_min(1) / exact) / spread * (buckets - exact)).long()
    return torch.where(distance < exact, distance, far.clamp_max(buckets - 1))


def time_bucket(newer: Tensor, older: Tensor, buckets: int) -> Tensor:
    """Bucket of the whole seconds between two times in ms, int64: see ``encoders.time_buckets``."""
    seconds = torch.div((newer - older).abs(), 1000, rounding_mode="floor")
    # the half keeps whole seconds off the borders, where rounding could decide
    power = (torch.log(seconds.to(torch.float32) + 1.5) / math.log(2)).floor().to(torch.int64)
    return torch.where((newer > 0) & (older > 0), (power + 1).clamp(1, buckets - 1), 0)


def turned(x: Tensor, known_BT: Tensor, back: bool = False) -> Tensor:
    """[B, T, ...] whose rows, padded on the left where ``known_BT`` is False, begin with their events; ``back``: the
    reverse, of rows that were turned."""
    t = x.shape[1]
    padded_B1 = (~known_BT).sum(1, keepdim=True)
    place_BT = (torch.arange(t, device=x.device) + (-padded_B1 if back else padded_B1)) % t
    shape = (*place_BT.shape, *(1,) * (x.ndim - 2))
    return x.gather(1, place_BT.view(shape).expand_as(x))


@cache
def _attend(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention  # takes seconds to load, and few need it

    attend: Any = flex_attention
    compiled_attend: Any = torch.compile(attend, dynamic=True) if compiled else attend
    return compiled_attend  # type: ignore[no-any-return]


@lru_cache(maxsize=64)
def _causal(t: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: i >= j, None, None, t, t, device=str(device))


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    distance_TA: Tensor | None = None,
    time_RA: Tensor | None = None,
    times_BT: Tensor | None = None,
) -> Tensor:
    """Causal attention [B, A, T, H] with what each head adds by distance, float [T, A], and by bucketed time between
    two events (``encoders.time_buckets``), float [R, A]; rows are turned. On a CPU the same without a kernel of its
    own: a reference to compare with, without gradients."""
    t, buckets = q.shape[2], 0 if time_RA is None else len(time_RA)

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if distance_TA is not None:
            score = score + distance_TA[(i - j).clamp_min(0), h]
        if time_RA is not None and times_BT is not None:
            bucket = time_bucket(times_BT[b, i], times_BT[b, j], buckets)
            score = score + time_RA[bucket, h]
        return score

    out: Tensor = _attend(q.is_cuda)(q, k, v, score_mod=biased, block_mask=_causal(t, q.device), scale=scale)
    return out
