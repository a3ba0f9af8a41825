"""Full-ranking evaluation: every item of the vocabulary is ranked, no sampled negatives.

A target that is excluded, out of vocabulary or scored NaN counts as a miss. Ties are broken at random, seeded by the
request: item ids are sorted by frequency, so any rule that goes by ids would give a constant model the quality of
popularity. Axis legend: B requests, V item ids, N candidates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from training.intervals import bootstrap as bootstrap, ndcg_of as ndcg_of
from training.models.retrieval import EXCLUDED
from vivace.contract import FIRST_ID

BINS = 15  # of a reliability curve
CUTS = (1, 5, 10, 20, 50)
MISS = 1 << 30  # the rank of a target that cannot be answered
STREAMS = 2
ALL_ITEMS, CANDIDATES = range(STREAMS)  # streams of random places: a second draw must not repeat the first


def uniform(request_B: Tensor, stream: int) -> Tensor:
    """One number in [0, 1) for each request, float64 [B]: a hash (SplitMix64, Steele et al. 2014) of its number int64
    [B] in the order of the file, which says nothing about items. Numbers of different ``stream``s are independent."""
    with np.errstate(over="ignore"):
        x = request_B.cpu().numpy().astype(np.uint64) * np.uint64(STREAMS) + np.uint64(stream + 1)
        x *= np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) / 2.0**53)


def place(higher_B: Tensor, ties_B: Tensor, request_B: Tensor, stream: int) -> Tensor:
    """Rank from 0, int64 [B], behind ``higher_B`` items and at a random place among ``ties_B`` equal others."""
    before = (uniform(request_B, stream).to(ties_B.device) * (ties_B + 1)).long()
    return higher_B + torch.minimum(before, ties_B)


def ranks(scores_BV: Tensor, target_B: Tensor, request_B: Tensor) -> Tensor:
    """Rank of each target from 0, int64 [B]; MISS if it is excluded, out of vocabulary or scored NaN.

    ``request_B``: number of each request, int64, which seeds the order of items of equal score."""
    target_score_B1 = scores_BV.gather(1, target_B[:, None])
    higher = (~(scores_BV <= target_score_B1)).sum(1)  # NaN counts as higher: a broken model gains nothing
    ties = (scores_BV == target_score_B1).sum(1) - 1
    score_B = target_score_B1[:, 0]
    dead = (score_B <= EXCLUDED / 2) | score_B.isnan() | (target_B < FIRST_ID)
    return torch.where(dead, MISS, place(higher, ties.clamp_min(0), request_B, ALL_ITEMS))


def ranks_after(
    logits_BN: Tensor, candidates_BN: Tensor, target_B: Tensor, before_B: Tensor, request_B: Tensor
) -> Tensor:
    """Rank of each target, int64 [B], when the candidates are re-ordered by ``logits_BN`` and the rest keeps its place.

    ``before_B``: the retriever's ranks. A target that its random place among equals puts behind the candidates is none,
    even if it was picked as one for its smaller id. ``request_B``: as in ``ranks``."""
    hit_BN = candidates_BN == target_B[:, None]
    among_B = hit_BN.any(1) & (before_B < candidates_BN.shape[1])
    target_logit_B1 = torch.where(hit_BN, logits_BN, torch.full_like(logits_BN, EXCLUDED)).amax(1, keepdim=True)
    higher = (~(logits_BN <= target_logit_B1)).sum(1)
    ties = (logits_BN == target_logit_B1).sum(1) - 1
    after_B = place(higher, ties.clamp_min(0), request_B, CANDIDATES)
    after_B = torch.where(target_logit_B1[:, 0].isnan(), MISS, after_B)
    return torch.where(among_B, after_B, before_B)


def metrics(rank: np.ndarray) -> dict[str, float]:
    """HR@k, NDCG@k and MRR@k for CUTS, of ranks from 0 with one relevant item a request."""
    rank = np.asarray(rank, np.float64)
    if rank.size == 0:
        raise ValueError("metrics: expected at least one request, got none; the split left nothing to evaluate")
    out = {}
    for k in CUTS:
        hit = rank < k
        out[f"HR@{k}"] = float(hit.mean())
        out[f"NDCG@{k}"] = float(ndcg_of(rank, k).mean())
        out[f"MRR@{k}"] = float(np.where(hit, 1.0 / (rank + 1.0), 0.0).mean())
    return out


def expected_calibration_error(probability: np.ndarray, label: np.ndarray, bins: int = BINS) -> float:
    """Mean over bins of equal count of |mean probability - share of positives|, weighted by count (Naeini et al. 2015
    with equal-mass bins, as almost all probabilities here are small)."""
    curve = reliability(probability, label, bins)
    return float((np.abs(curve[:, 0] - curve[:, 1]) * curve[:, 2]).sum() / curve[:, 2].sum())


def reliability(probability: np.ndarray, label: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Float [<= bins, 3]: mean probability, share of positives and count of each bin of equal count."""
    order = np.argsort(probability, kind="stable")
    parts = [p for p in np.array_split(order, bins) if len(p)]
    return np.array([[probability[p].mean(), label[p].mean(), len(p)] for p in parts])


def list_auc(scores_BN: Tensor, positive_BN: Tensor, there_BN: Tensor | None = None) -> Tensor:
    """AUC within each list that has both classes, float [<= B]; ties count one half. Their mean is the GAUC
    (Zhou et al. 2018) for lists of equal length. ``there_BN``: False where a shorter list is padded."""
    negative_BN = ~positive_BN if there_BN is None else ~positive_BN & there_BN
    both = positive_BN.any(1) & negative_BN.any(1)
    s, p, n = scores_BN[both], positive_BN[both], negative_BN[both]
    wins = (s[:, :, None] > s[:, None, :]).float() + 0.5 * (s[:, :, None] == s[:, None, :]).float()
    pairs = (p[:, :, None] & n[:, None, :]).float()
    return (wins * pairs).sum((1, 2)) / pairs.sum((1, 2))


@dataclass
class Collected:
    """Ranks and AUCs gathered batch by batch."""

    rank: dict[str, list[np.ndarray]] = field(default_factory=dict)
    auc: dict[str, list[np.ndarray]] = field(default_factory=dict)

    probability: dict[str, list[np.ndarray]] = field(default_factory=dict)
    label: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add_calibration(self, head: str, probability: Tensor, label: Tensor) -> None:
        self.probability.setdefault(head, []).append(probability.cpu().numpy().ravel())
        self.label.setdefault(head, []).append(label.cpu().numpy().ravel())

    def reliability(self) -> dict[str, np.ndarray]:
        """Reliability curve of every head, over all candidates of all requests."""
        return {h: reliability(np.concatenate(p), np.concatenate(self.label[h])) for h, p in self.probability.items()}

    def ece(self) -> dict[str, float]:
        return {
            h: expected_calibration_error(np.concatenate(p), np.concatenate(self.label[h]))
            for h, p in self.probability.items()
        }

    def add_ranks(self, method: str, values: Tensor) -> None:
        self.rank.setdefault(method, []).append(values.cpu().numpy())

    def add_auc(self, head: str, values: Tensor) -> None:
        self.auc.setdefault(head, []).append(values.cpu().numpy())

    def ranks(self) -> dict[str, np.ndarray]:
        """Rank of every request's target by method, int64, in the order of the requests."""
        return {method: np.concatenate(parts) for method, parts in self.rank.items()}

    def table(self) -> dict[str, dict[str, float]]:
        return {method: metrics(rank) for method, rank in self.ranks().items()}

    def gauc(self) -> dict[str, dict[str, float | None]]:
        """Mean AUC over the lists of each head that have both classes, None where there is no such list."""
        out: dict[str, dict[str, float | None]] = {}
        for head, parts in self.auc.items():
            values = np.concatenate(parts)
            out[head] = {"GAUC": float(values.mean()) if len(values) else None, "lists": len(values)}
        return out


def mean_ndcg(values: Iterable[Tensor], k: int = 10) -> float:
    return float(ndcg_of(np.concatenate([v.cpu().numpy() for v in values]), k).mean())
