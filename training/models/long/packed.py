"""Rows of different length laid end to end, so that no layer works on padding.

All but attention sees one row of the events alone. Attention runs on groups of rows of like length, each by the causal
kernel without a mask: the longest row of a group decides its width, and what is filled up stands behind its events. A
block mask over the packed row would say the same, but costs the square of all events where no kernel skips its empty
blocks, as on a CPU (FlexAttention has no gradient there).
Axis legend: B rows, T events of the longest, P events of all rows, D width, A attention heads, H width of a head,
G rows of a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PADDED = 0.2  # share of padding from which packing is worth its gathering
LIKE = 0.75  # rows of a group are at least so long, by its longest
SHORT = 64  # events below which rows are alike: there a call costs more than the filling up


class Packed:
    """How the rows of ``known_BT`` (bool, False where padded) lie end to end."""

    def __init__(self, known_BT: Tensor) -> None:
        self.shape = known_BT.shape
        self.event_P = known_BT.flatten().nonzero()[:, 0]
        lengths_B = known_BT.sum(1)
        first_B = lengths_B.cumsum(0) - lengths_B
        groups = [self._group(first_B[rows], lengths_B[rows]) for rows in like_rows(lengths_B)]
        self.places = [place_GT for place_GT, _ in groups]
        there = torch.cat([there_GT.flatten() for _, there_GT in groups])
        of_groups = torch.cat([place_GT.flatten() for place_GT in self.places])
        self.grouped_P = torch.empty_like(self.event_P)  # where each event stands in the groups laid end to end
        self.grouped_P[of_groups[there]] = there.nonzero()[:, 0]

    @staticmethod
    def _group(first_G: Tensor, lengths_G: Tensor) -> tuple[Tensor, Tensor]:
        """(places int64 [G, T] of a group's events in the packed row, bool [G, T]: which are there); the others stand
        behind and show the last one again, at which no event looks."""
        step_T = torch.arange(int(lengths_G.max()), device=first_G.device)
        there_GT = step_T < lengths_G[:, None]
        return first_G[:, None] + torch.minimum(step_T[None], lengths_G[:, None] - 1), there_GT

    def pack(self, x_BTD: Tensor) -> Tensor:
        """[1, P, D] of rows [B, T, D]."""
        return x_BTD.flatten(0, 1).index_select(0, self.event_P)[None]

    def unpack(self, x_1PD: Tensor) -> Tensor:
        """[B, T, D] of [1, P, D], zero where padded."""
        rows = x_1PD.new_zeros(self.shape.numel(), x_1PD.shape[2])
        return rows.index_copy(0, self.event_P, x_1PD[0]).unflatten(0, self.shape)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Causal attention within each row, [1, A, P, H] of q, k, v [1, A, P, H]."""
        x_PSAH = torch.stack([q[0], k[0], v[0]]).permute(2, 0, 1, 3)
        x_PE, answers = x_PSAH.flatten(1), []
        for place_GT in self.places:
            of_group = x_PE.index_select(0, place_GT.flatten()).view(*place_GT.shape, *x_PSAH.shape[1:])
            q_GATH, k_GATH, v_GATH = of_group.permute(2, 0, 3, 1, 4)
            a_GATH = F.scaled_dot_product_attention(q_GATH, k_GATH, v_GATH, is_causal=True, scale=scale)
            answers.append(a_GATH.transpose(1, 2).flatten(0, 1).flatten(1))
        a_PE = torch.cat(answers).index_select(0, self.grouped_P)
        return a_PE.view(1, -1, *q.shape[1::2]).transpose(1, 2)


def like_rows(lengths_B: Tensor) -> list[Tensor]:
    """The rows that have events, int64, in groups of like length, the longest first."""
    order_B = lengths_B.argsort(descending=True, stable=True)[: int((lengths_B > 0).sum())]
    starts, widest = list[int](), 0
    for place, length in enumerate(lengths_B[order_B].tolist()):
        if not starts or (widest > SHORT and length < LIKE * widest):
            starts.append(place)
            widest = length
    return [order_B[a:b] for a, b in zip(starts, [*starts[1:], len(order_B)], strict=True)]


def packed(known_BT: Tensor) -> Packed | None:
    """How to pack rows; None where they have too little padding, or lie on a GPU, where it was not measured."""
    if known_BT.is_cuda or not known_BT.any() or float((~known_BT).float().mean()) < PADDED:
        return None
    return Packed(known_BT)
