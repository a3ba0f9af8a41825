"""When requests are due and whose they are: timetables made before a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ARRIVALS = ("poisson", "constant", "burst", "diurnal")
BURST, PERIOD_S = 4.0, 5.0  # a fifth of each period comes at four times the rate of the rest
REPEAT = 0.7  # exponent of the users' power law


def due_times(kind: str, qps: float, seconds: float, seed: int, recorded_ms: Sequence[int] = ()) -> np.ndarray:
    """Seconds from the start at which requests are due, float64, rising. "diurnal": recorded times, squeezed into
    ``seconds`` and thinned or repeated to ``qps``. Raises ValueError for another kind."""
    rng, count = np.random.default_rng(seed), max(1, round(qps * seconds))
    if kind == "constant":
        return np.arange(count) / qps
    if kind == "poisson":
        return np.sort(rng.uniform(0, seconds, rng.poisson(qps * seconds) or 1))
    if kind == "burst":
        inside = rng.random(count) < BURST / (BURST + 4)
        offset = np.where(inside, rng.uniform(0, 0.2, count), rng.uniform(0.2, 1, count)) * PERIOD_S
        return np.sort((rng.integers(0, max(1, round(seconds / PERIOD_S)), count) * PERIOD_S + offset) % seconds)
    if kind == "diurnal":
        if len(recorded_ms) < 2:
            raise ValueError("--arrivals diurnal: expected recorded times of at least two events, got fewer")
        times = rng.choice(np.asarray(recorded_ms, float), count)
        low, high = times.min(), max(times.max(), times.min() + 1)
        return np.sort((times - low) / (high - low) * seconds)
    raise ValueError(f"--arrivals: expected one of {ARRIVALS}, got {kind!r}")


def picks(count: int, users: int, repeat: float, seed: int) -> np.ndarray:
    """Which recorded request each due one is, int64 [count]: by a power law of exponent ``repeat`` over the users (0:
    all alike), as a few users make most of the traffic."""
    weights = np.arange(1, users + 1, dtype=float) ** -repeat
    return np.random.default_rng(seed).choice(users, count, p=weights / weights.sum())
