"""How often items were shown just now, counted apart from what is done with them: an item that is shown does not rise.

Beside its clicks an item's impressions say what share of those who saw it took it. Both are decayed counts of the same
half-lives (``vivace.counters``), so that the share is of the same minutes.

Axis legend: M rising items, L half-lives, n impressions.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from vivace.counters import BLOCK
from vivace.limits import CountLimits, Limiter
from vivace.live_layout import LIVE_HALF_LIVES_MS

RECENT_SHOWN = "recent_shown.npz"  # of a published version: see ``ShownStream.save``
KEPT_MS = BLOCK * LIVE_HALF_LIVES_MS[-1]  # of a log, events that may still count
PRIOR = 20.0  # impressions at the rate of all items that an item begins with
CLICK_FLOOR = 0.1  # clicks of all items together, where there are none


def shown_limits(limits: CountLimits) -> CountLimits:
    """What of one user's impressions counts: an item once in as long as a click on it does. How many clicks of one user
    count bounds no impressions, as a page shows many items at once."""
    return CountLimits(limits.same_item_ms)


@dataclass(frozen=True)
class ShownStream:
    """Impressions in order of time, int64 [n] each; ``users``: numbers that tell users apart."""

    users: np.ndarray
    ids: np.ndarray
    times_ms: np.ndarray

    @classmethod
    def none(cls) -> ShownStream:
        return cls(*(np.empty(0, np.int64) for _ in fields(cls)))

    def limited(self, limits: CountLimits) -> ShownStream:
        """What of it counts, by the limits of clicks."""
        limits = shown_limits(limits)
        return (
            self if limits.none else self[Limiter(limits).mask(*(getattr(self, f.name).tolist() for f in fields(self)))]
        )

    def __getitem__(self, rows: slice | np.ndarray) -> ShownStream:
        return ShownStream(*(getattr(self, f.name)[rows] for f in fields(self)))

    def __len__(self) -> int:
        return len(self.ids)

    def save(self, path: Path) -> None:
        """What a server begins with: those that may count yet, without users."""
        newest_ms = min(int(self.times_ms[-1]), int(time.time() * 1000)) if len(self) else 0
        kept = self[self.times_ms > newest_ms - KEPT_MS]
        np.savez_compressed(path, ids=kept.ids.astype(np.int32), times_ms=kept.times_ms)

    @classmethod
    def load(cls, path: Path) -> ShownStream:
        """What ``save`` wrote. Raises FileNotFoundError."""
        if not path.exists():
            raise FileNotFoundError(f"live counters: no impressions at {path}; run 'vivace compile' again")
        with np.load(path, allow_pickle=False) as stored:
            ids, times_ms = stored["ids"].astype(np.int64), stored["times_ms"].astype(np.int64)
        return cls(np.zeros(len(ids), np.int64), ids, times_ms)


@dataclass(frozen=True)
class ShownMoment:
    """Counts of rising items and of all items at one moment, float64: of clicks and of impressions [M, L], of both of
    all items [L]; ``ids`` int64 [M]."""

    ids: np.ndarray
    clicks: np.ndarray
    shown: np.ndarray
    all_clicks: np.ndarray
    all_shown: np.ndarray
    now_ms: int

    def features(self, without: ShownStream | None = None) -> np.ndarray:
        """float32 [M, 2 L]: log1p of the impressions, then the logarithm of clicks over impressions, with PRIOR
        impressions at the rate of all items added, over that rate. ``without``: impressions that are taken out, as they
        are of the answer that the request is for."""
        shown_ML = self.shown
        if without is not None and len(without):
            shown_ML = np.maximum(shown_ML - self._weights(without), 0)
        rate_L = (self.all_clicks + CLICK_FLOOR) / (self.all_shown + 1)
        lift_ML = np.log((self.clicks / rate_L + PRIOR) / (shown_ML + PRIOR))
        return np.concatenate([np.log1p(shown_ML), lift_ML], 1).astype(np.float32)

    def _weights(self, stream: ShownStream) -> np.ndarray:
        """What impressions add to the counts, float64 [M, L]."""
        halvings_nL = (self.now_ms - stream.times_ms)[:, None] / np.array(LIVE_HALF_LIVES_MS)
        same_Mn = self.ids[:, None] == stream.ids[None, :]
        weights: np.ndarray = same_Mn.astype(float) @ np.exp2(-halvings_nL)
        return weights
