"""NDCG of ranks and its interval over users, without torch: whoever shows figures needs no more."""

from __future__ import annotations

import numpy as np


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
