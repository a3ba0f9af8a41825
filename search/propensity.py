"""What a click in a log is worth: the chance that its position was looked at, and the weight that undoes it.

Clicks are weighted by the inverse of that chance (Joachims et al. 2017), which is estimated from the log by the
position-based model's EM (Wang et al. 2018). Axis legend: R results shown.
"""

from __future__ import annotations

import numpy as np


def propensities(pair: np.ndarray, position: np.ndarray, clicked: np.ndarray, rounds: int = 100) -> np.ndarray:
    """Chance that each position is looked at, relative to the first, float64 [positions], from a log.

    ``pair``: number of the (query, item) shown int64 [R]; ``position`` from 0; ``clicked`` bool. The same pairs must
    have been shown at several positions. P(click) = seen[position] * relevant[pair].
    """
    seen = np.full(int(position.max()) + 1, 0.5)
    relevant = np.full(int(pair.max()) + 1, 0.5)
    shown_at, shown = np.bincount(position), np.bincount(pair)
    for _ in range(rounds):
        s, r = seen[position], relevant[pair]
        rest = 1 - s * r
        looked = np.where(clicked, 1.0, s * (1 - r) / rest)  # P(seen | click or none)
        good = np.where(clicked, 1.0, (1 - s) * r / rest)
        seen = np.clip(np.bincount(position, looked) / np.maximum(shown_at, 1), 1e-4, 1 - 1e-4)
        relevant = np.clip(np.bincount(pair, good) / np.maximum(shown, 1), 1e-4, 1 - 1e-4)
    return seen / seen[0]


def inverse_propensity(clicked: np.ndarray, position: np.ndarray, seen: np.ndarray, most: float = 20.0) -> np.ndarray:
    """Weight of each shown item: 1 / chance where it was clicked (at most ``most``), 0 elsewhere."""
    weight: np.ndarray = np.where(clicked, np.minimum(1 / np.maximum(seen[position], 1e-9), most), 0.0)
    return weight
