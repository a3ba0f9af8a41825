"""Losses over the catalogue. Axis legend: P positions to predict, V item ids, D width, S sampled negatives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

LEFT_OUT = -1e8
CHUNK = 1024  # positions scored at once: bounds memory at CHUNK x V and stays in cache (2 to 3x faster on 2 cores)
CUDA_CHUNK = 16_384  # the same on a GPU, which small pieces keep waiting


@contextlib.contextmanager
def _in_tf32(where: torch.device) -> Iterator[None]:
    """Products of float32 in TF32 on a GPU, whatever autocast says: bfloat16 has too few digits for logits of a whole
    catalogue. No change on a CPU."""
    if where.type != "cuda":
        yield
        return
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    try:
        with torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class _ChunkedLoss(torch.autograd.Function):
    """Saves the gradients of states, table and biases, the first three of six arguments, in its forward pass."""

    @staticmethod
    def backward(ctx, scale):  # noqa: ANN001, ANN205 - torch signature
        grad_h, grad_w, grad_b = ctx.saved_tensors
        return grad_h * scale, grad_w * scale, grad_b * scale, None, None, None


class _FullSoftmax(_ChunkedLoss):
    """Cross-entropy over all items, chunk by chunk; gradients are formed with the loss, so no logits are kept."""

    @staticmethod
    def forward(ctx, h_PD, w_VD, b_V, target_P, first, smoothing):  # noqa: ANN001, ANN205 - torch signature
        total = h_PD.new_zeros(())
        grad_h, grad_w, grad_b = torch.empty_like(h_PD), torch.zeros_like(w_VD), torch.zeros_like(b_V)
        w, w_t, b = w_VD[first:], w_VD[first:].t().contiguous(), b_V[first:]
        n = max(len(target_P), 1)
        tiny = torch.finfo(h_PD.dtype).tiny
        spread_V = (b > LEFT_OUT).to(b.dtype)
        spread_V *= smoothing / spread_V.sum()
        chunk = CUDA_CHUNK if h_PD.is_cuda else CHUNK
        for h, t, g in zip(h_PD.split(chunk), target_P.split(chunk), grad_h.split(chunk), strict=True):
            logits = torch.addmm(b, h, w_t)
            rows, column = torch.arange(len(t), device=t.device), t - first
            if smoothing:
                total += (smoothing * logits[rows, column] - logits @ spread_V).sum()
            p = torch.softmax(logits, 1)
            log_p = p[rows, column].clamp_min(tiny).log()
            total -= log_p.sum()
            if smoothing:
                p -= spread_V
            p[rows, column] -= 1 - smoothing
            torch.mm(p, w, out=g)
            grad_w[first:].addmm_(p.t(), h)
            grad_b[first:] += p.sum(0)
        ctx.save_for_backward(grad_h.div_(n), grad_w.div_(n), grad_b.div_(n))
        return total / n


def full_softmax(
    h_PD: Tensor, weight_VD: Tensor, bias_V: Tensor, target_P: Tensor, first_id: int, smoothing: float = 0.0
) -> Tensor:
    """Mean cross-entropy of ``target_P`` (ids >= first_id) over all ids from ``first_id`` on; memory O(CHUNK x V).

    ``smoothing``: share of the target's probability that is spread over all ids (Szegedy et al. 2016). Ids with a bias
    below LEFT_OUT take no part."""
    with _in_tf32(h_PD.device):
        loss: Tensor = _FullSoftmax.apply(
            h_PD, weight_VD.to(h_PD.dtype), bias_V.to(h_PD.dtype), target_P, first_id, smoothing
        )
    return loss


class _SampledSoftmax(_ChunkedLoss):
    """Softmax of the target against shared negatives, chunk by chunk, gradients formed with the loss."""

    @staticmethod
    def forward(ctx, h_PD, w_VD, b_V, target_P, sample_S, log_expected_V):  # noqa: ANN001, ANN205 - torch signature
        total = h_PD.new_zeros(())
        grad_h, grad_w, grad_b = torch.empty_like(h_PD), torch.zeros_like(w_VD), torch.zeros_like(b_V)
        corrected_V = b_V - log_expected_V
        w_S, b_S = w_VD[sample_S], corrected_V[sample_S]
        w_t, grad_w_S, grad_b_S = w_S.t().contiguous(), torch.zeros_like(w_S), torch.zeros_like(b_S)
        n, low = max(len(target_P), 1), torch.finfo(h_PD.dtype).min / 2
        chunk = CUDA_CHUNK if h_PD.is_cuda else CHUNK
        for h, t, g in zip(h_PD.split(chunk), target_P.split(chunk), grad_h.split(chunk), strict=True):
            logits = torch.addmm(b_S, h, w_t).masked_fill_(t[:, None] == sample_S[None], low)  # accidental hits
            positive, top = (h * w_VD[t]).sum(1) + corrected_V[t], logits.amax(1)
            p = torch.softmax(logits, 1)
            others = top - p.amax(1).log()  # logsumexp of the negatives
            total += F.softplus(others - positive).sum()
            share = torch.sigmoid(others - positive)  # what the negatives hold of the probability
            p *= share[:, None]
            torch.addmm(-share[:, None] * w_VD[t], p, w_S, out=g)
            grad_w_S.addmm_(p.t(), h)
            grad_b_S += p.sum(0)
            grad_w.index_add_(0, t, -share[:, None] * h)
            grad_b.index_add_(0, t, -share)
        grad_w.index_add_(0, sample_S, grad_w_S)
        grad_b.index_add_(0, sample_S, grad_b_S)
        ctx.save_for_backward(grad_h.div_(n), grad_w.div_(n), grad_b.div_(n))
        return total / n


def sampled_softmax(
    h_PD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    target_P: Tensor,
    sample_S: Tensor,
    log_expected_V: Tensor,
) -> Tensor:
    """Mean cross-entropy against shared negatives with the logQ correction; memory O(CHUNK x S).

    ``sample_S`` ids drawn with replacement; ``log_expected_V`` log of each id's expected count in the sample.
    Accidental hits are masked. Source: Bengio & Senecal 2008; Yi et al. 2019, eq. 4.
    """
    with _in_tf32(h_PD.device):
        loss: Tensor = _SampledSoftmax.apply(
            h_PD, weight_VD.to(h_PD.dtype), bias_V.to(h_PD.dtype), target_P, sample_S, log_expected_V
        )
    return loss


def gbce(
    h_PD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    target_P: Tensor,
    negative_S: Tensor,
    items: int,
    calibration: float,
) -> Tensor:
    """Generalised binary cross-entropy of gSASRec (Petrov & Macdonald 2023, eq. 11 to 13), with the negatives shared by
    all positions of a batch (the paper draws them for each position).

    ``negative_S`` uniform item ids; ``items`` number of items; ``calibration`` t in [0, 1]: 0 is plain binary
    cross-entropy, 1 undoes the over-confidence of sampling.
    """
    positive_P = (h_PD * weight_VD[target_P]).sum(1) + bias_V[target_P]
    negative_PS = torch.addmm(bias_V[negative_S], h_PD, weight_VD[negative_S].t())
    rate = len(negative_S) / (items - 1)
    beta = rate * (calibration * (1 - 1 / rate) + 1 / rate)
    hit_PS = target_P[:, None] == negative_S[None]
    loss_P = -beta * F.logsigmoid(positive_P) + F.softplus(negative_PS).masked_fill(hit_PS, 0.0).sum(1)
    return loss_P.mean()
