"""What is rising at a moment: the items that are clicked most just now, and what counters say of each.

Training replays a log through this class, and a server feeds it what is appended, so both read the same numbers. An
*entry* is an event that begins a visit: its user's first, or the first for 30 minutes. What people click when they come
differs from what they click on from there.

Axis legend: V item ids, M rising items, L half-lives, F features = 4 L + 1.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from vivace.contract import FIRST_ID, LIVE_FEATURES, LIVE_HALF_LIVES_MS, PADDING_ID
from vivace.counters import BLOCK, LiveCounts

VISIT_GAP_MS = 30 * 60_000
KEPT_MS = BLOCK * LIVE_HALF_LIVES_MS[-1]  # of a log, events that may still count
FIRST_LEVEL = 1  # of the half-lives: 10 minutes orders what is rising
PRUNE = 100_000  # users beyond which those whose visit is over are forgotten
SHARE_FLOOR = 0.1  # events
RECENT = "recent.npz"  # of a published version: see ``save_recent``


def entries(users: np.ndarray, times_ms: np.ndarray) -> np.ndarray:
    """bool [n]: which events begin a visit, of events in order of time. ``users``: int64 [n]."""
    order = np.lexsort((np.arange(len(users)), users))  # by user, then by time
    same = np.zeros(len(users), bool)
    same[1:] = users[order][1:] == users[order][:-1]
    gap = np.zeros(len(users), np.int64)
    gap[1:] = np.diff(times_ms[order])
    first = np.empty(len(users), bool)
    first[order] = ~(same & (gap <= VISIT_GAP_MS))
    return first


class LiveTable:
    """Counts of all events and of entries, and when an item was first clicked.

    Args:
        items: V.
        rising: M, rows that ``at`` gives.
    """

    def __init__(self, items: int, rising: int) -> None:
        self.items, self.rising = items, min(rising, items - FIRST_ID)
        self.every, self.entry = LiveCounts(items, LIVE_HALF_LIVES_MS), LiveCounts(items, LIVE_HALF_LIVES_MS)
        self.first_ms = np.full(items, np.iinfo(np.int64).max)
        self._width = rising

    def add(self, ids: np.ndarray, times_ms: np.ndarray, entry: np.ndarray) -> None:
        """Events of items int64 [n] at Unix times in ms int64 [n]; ``entry`` bool [n]: those that begin a visit."""
        self.every.add(ids, times_ms)
        self.entry.add(ids[entry], times_ms[entry])
        np.minimum.at(self.first_ms, ids, times_ms)

    def at(self, now_ms: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int64 [M], features float32 [M, F]) by the events before ``now_ms``, most clicked first; PADDING_ID and
        zeros where fewer were clicked. Features: log1p of the decayed counts and the logarithms of their shares of all
        counts, [all | entries] by half-life, then log1p of the item's age in minutes since its first click."""
        counts_CV = np.stack([c.every(now_ms, h) for c in (self.every, self.entry) for h in LIVE_HALF_LIVES_MS])
        levels = len(LIVE_HALF_LIVES_MS)
        score_V = np.log1p(counts_CV[FIRST_LEVEL]) + np.log1p(counts_CV[levels + FIRST_LEVEL])
        chosen = np.argpartition(-score_V, self.rising - 1)[: self.rising]
        chosen = chosen[score_V[chosen] > 0]
        chosen = chosen[np.lexsort((chosen, -score_V[chosen]))]
        counts_CM, total_C1 = counts_CV[:, chosen], counts_CV.sum(1, keepdims=True)
        share_CM = np.log((counts_CM + SHARE_FLOOR) / (total_C1 + 1))
        age_M = np.log1p(np.maximum(now_ms - self.first_ms[chosen], 0) / 60_000)
        ids, features = np.full(self._width, PADDING_ID, np.int64), np.zeros((self._width, LIVE_FEATURES), np.float32)
        ids[: len(chosen)] = chosen
        features[: len(chosen)] = np.concatenate([np.log1p(counts_CM), share_CM, age_M[None]]).T
        return ids, features


class Visits:
    """Which of a stream's events begin a visit, as they come."""

    def __init__(self) -> None:
        self._last_ms: dict[str, int] = {}

    def entry(self, user_id: str, time_ms: int) -> bool:
        last = self._last_ms.get(user_id)
        self._last_ms[user_id] = max(time_ms, last or 0)
        if len(self._last_ms) > PRUNE:
            over = time_ms - VISIT_GAP_MS
            self._last_ms = {user: at for user, at in self._last_ms.items() if at >= over}
        return last is None or time_ms - last > VISIT_GAP_MS


def save_recent(path: Path, ids: np.ndarray, times_ms: np.ndarray, entry: np.ndarray) -> None:
    """What a server begins with: the newest events of a log, as long as any may count (``KEPT_MS``). Times of the
    future do not make the others old."""
    newest_ms = min(int(times_ms[-1]), int(time.time() * 1000)) if len(times_ms) else 0
    kept = times_ms > newest_ms - KEPT_MS
    np.savez_compressed(path, ids=ids[kept].astype(np.int32), times_ms=times_ms[kept], entry=entry[kept])


def load_recent(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, times in ms, entries) that ``save_recent`` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        return stored["ids"].astype(np.int64), stored["times_ms"], stored["entry"]
