"""Full-ranking evaluation: every item of the vocabulary is ranked, no sampled negatives.

A target that is excluded or out of vocabulary counts as a miss. Ties go to the smaller id (stable).
Axis legend: B requests, V item ids, N candidates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from training.models.retrieval import EXCLUDED
from vivace.contract import FIRST_ID

BINS = 15  # of a reliability curve
CUTS = (1, 5, 10, 50)
MISS = 1 << 30  # the rank of a target that cannot be answered


def ranks(scores_BV: Tensor, target_B: Tensor) -> Tensor:
    """Rank of each target from 0, int64 [B]: items that score higher, or equal with a smaller id; MISS if excluded."""
    own_B1 = scores_BV.gather(1, target_B[:, None])
    higher = (scores_BV > own_B1).sum(1)
    ids = torch.arange(scores_BV.shape[1], device=scores_BV.device)
    ties = ((scores_BV == own_B1) & (ids[None] < target_B[:, None])).sum(1)
    dead = (own_B1[:, 0] <= EXCLUDED / 2) | (target_B < FIRST_ID)
    return torch.where(dead, MISS, higher + ties)


def ranks_after(logits_BN: Tensor, candidates_BN: Tensor, target_B: Tensor, before_B: Tensor) -> Tensor:
    """Rank of each target when the candidates are re-ordered by ``logits_BN`` and the rest keeps its place."""
    hit_BN = candidates_BN == target_B[:, None]
    own = torch.where(hit_BN, logits_BN, torch.full_like(logits_BN, EXCLUDED)).amax(1, keepdim=True)
    higher = (logits_BN > own).sum(1)
    place = hit_BN.to(torch.int64).argmax(1, keepdim=True)
    index = torch.arange(logits_BN.shape[1], device=logits_BN.device)
    ties = ((logits_BN == own) & (index[None] < place)).sum(1)
    return torch.where(hit_BN.any(1), higher + ties, before_B)


def ndcg_of(rank: np.ndarray, k: int = 10) -> np.ndarray:
    """NDCG@k of each request, float64, of ranks from 0 with one relevant item a request."""
    rank = np.asarray(rank, np.float64)
    return np.where(rank < k, 1.0 / np.log2(rank + 2.0), 0.0)


def bootstrap(values: np.ndarray, draws: int = 2000, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean of ``values`` over users (Efron 1979), drawn with replacement."""
    rng = np.random.default_rng(seed)
    means = np.array([values[rng.integers(0, len(values), len(values))].mean() for _ in range(draws)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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


def list_auc(scores_BN: Tensor, positive_BN: Tensor) -> Tensor:
    """AUC within each list that has both classes, float [<= B]; ties count one half. Their mean is the GAUC
    (Zhou et al. 2018) for lists of equal length."""
    both = positive_BN.any(1) & (~positive_BN).any(1)
    s, p = scores_BN[both], positive_BN[both]
    wins = (s[:, :, None] > s[:, None, :]).float() + 0.5 * (s[:, :, None] == s[:, None, :]).float()
    pairs = (p[:, :, None] & ~p[:, None, :]).float()
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
        """Mean AUC of each head, None where no list has both classes, and the number of lists that have."""
        out = {}
        for head, parts in self.auc.items():
            values = np.concatenate(parts)
            out[head] = {"GAUC": float(values.mean()) if len(values) else None, "lists": len(values)}
        return out


def mean_ndcg(values: Iterable[Tensor], k: int = 10) -> float:
    return float(ndcg_of(np.concatenate([v.cpu().numpy() for v in values]), k).mean())
