"""Losses over the catalogue. Axis legend: P positions to predict, V item ids, D width, S sampled negatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024  # positions scored at once: bounds memory at CHUNK x V and stays in cache (2 to 3x faster on 2 cores)


class _FullSoftmax(torch.autograd.Function):
    """Cross-entropy over all items, chunk by chunk; gradients are formed with the loss, so no logits are kept."""

    @staticmethod
    def forward(ctx, h_PD, w_VD, b_V, target_P, first):  # noqa: ANN001, ANN205 - torch signature
        total = h_PD.new_zeros(())
        grad_h, grad_w, grad_b = torch.empty_like(h_PD), torch.zeros_like(w_VD), torch.zeros_like(b_V)
        w, w_t, b = w_VD[first:], w_VD[first:].t().contiguous(), b_V[first:]
        n = max(len(target_P), 1)
        tiny = torch.finfo(h_PD.dtype).tiny
        for h, t, g in zip(h_PD.split(CHUNK), target_P.split(CHUNK), grad_h.split(CHUNK), strict=True):
            p = torch.softmax(torch.addmm(b, h, w_t), 1)
            rows, own = torch.arange(len(t), device=t.device), t - first
            total -= p[rows, own].clamp_min(tiny).log().sum()
            p[rows, own] -= 1
            torch.mm(p, w, out=g)
            grad_w[first:].addmm_(p.t(), h)
            grad_b[first:] += p.sum(0)
        ctx.save_for_backward(grad_h.div_(n), grad_w.div_(n), grad_b.div_(n))
        return total / n

    @staticmethod
    def backward(ctx, scale):  # noqa: ANN001, ANN205
        grad_h, grad_w, grad_b = ctx.saved_tensors
        return grad_h * scale, grad_w * scale, grad_b * scale, None, None


def full_softmax(h_PD: Tensor, weight_VD: Tensor, bias_V: Tensor, target_P: Tensor, first_id: int) -> Tensor:
    """Mean cross-entropy of ``target_P`` (ids >= first_id) over all ids from ``first_id`` on; memory O(CHUNK x V)."""
    return _FullSoftmax.apply(h_PD, weight_VD, bias_V, target_P, first_id)


def sampled_softmax(
    h_PD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    target_P: Tensor,
    sample_S: Tensor,
    log_expected_V: Tensor,
) -> Tensor:
    """Cross-entropy against shared negatives with the logQ correction.

    ``sample_S`` ids drawn with replacement; ``log_expected_V`` log of each id's expected count in the sample.
    Accidental hits are masked. Source: Bengio & Senecal 2008; Yi et al. 2019, eq. 4.
    """
    positive_P1 = ((h_PD * weight_VD[target_P]).sum(1) + bias_V[target_P] - log_expected_V[target_P])[:, None]
    negative_PS = torch.addmm(bias_V[sample_S] - log_expected_V[sample_S], h_PD, weight_VD[sample_S].t())
    negative_PS = negative_PS.masked_fill(target_P[:, None] == sample_S[None], float("-inf"))
    logits = torch.cat([positive_P1, negative_PS], 1)
    return F.cross_entropy(logits, torch.zeros(len(target_P), dtype=torch.long, device=logits.device))
