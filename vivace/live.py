"""What is rising at a moment: the items that are clicked most just now, and what counters say of each.

Training replays a log through this class, and a server feeds it what is appended, so both read the same numbers. An
*entry* is an event that begins a visit: its user's first, or the first for 30 minutes. What people click when they come
differs from what they click on from there.

``LiveTable.rows`` adds what the context of a request and its newest event make of them (``live_moment``).

Axis legend: V item ids, M rising items, L half-lives, F features = 4 L + 1, C columns of the context.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from vivace.contract import FIRST_ID, LIVE_FEATURES, LIVE_HALF_LIVES_MS, PADDING_ID
from vivace.counters import BLOCK, LiveCounts
from vivace.live_moment import MomentRows, PairCounts

VISIT_GAP_MS = 30 * 60_000
KEPT_MS = BLOCK * LIVE_HALF_LIVES_MS[-1]  # of a log, events that may still count
FIRST_LEVEL = 1  # of the half-lives: 10 minutes orders what is rising
PRUNE = 100_000  # users beyond which those whose visit is over are forgotten
SHARE_FLOOR = 0.1  # events
RECENT = "recent.npz"  # of a published version: see ``Stream.save``


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


def previous_items(users: np.ndarray, ids: np.ndarray, entry: np.ndarray) -> np.ndarray:
    """int64 [n]: the item of the user's event before, PADDING_ID where the event begins a visit; of events in order of
    time, as for ``entries``."""
    order = np.lexsort((np.arange(len(users)), users))
    before = np.full(len(users), PADDING_ID, np.int64)
    before[order[1:]] = ids[order[:-1]]
    return np.where(entry, PADDING_ID, before)


class LiveTable:
    """Counts of all events and of entries, and when an item was first clicked.

    Args:
        items: V.
        rising: M, rows that ``at`` gives.
        columns: C.
    """

    def __init__(self, items: int, rising: int, columns: int = 0) -> None:
        self.pairs = PairCounts(columns)
        self.items, self.rising = items, min(rising, items - FIRST_ID)
        self.every, self.entry = LiveCounts(items, LIVE_HALF_LIVES_MS), LiveCounts(items, LIVE_HALF_LIVES_MS)
        self.first_ms = np.full(items, np.iinfo(np.int64).max)
        self._width = rising

    def add(
        self,
        ids: np.ndarray,
        times_ms: np.ndarray,
        entry: np.ndarray,
        context_NC: np.ndarray | None = None,
        previous_N: np.ndarray | None = None,
    ) -> None:
        """Events of items int64 [n] at Unix times in ms int64 [n]; ``entry`` bool [n]: those that begin a visit;
        ``context_NC`` and ``previous_N``: as for ``PairCounts.add``."""
        if context_NC is not None and previous_N is not None:
            known = ids >= FIRST_ID
            self.pairs.add(ids[known], times_ms[known], context_NC[known], previous_N[known])
        self.every.add(ids, times_ms)
        self.entry.add(ids[entry], times_ms[entry])
        np.minimum.at(self.first_ms, ids, times_ms)

    def at(self, now_ms: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int64 [M], features float32 [M, F]) by the events before ``now_ms``, most clicked first; PADDING_ID and
        zeros where fewer were clicked. Features: log1p of the decayed counts and the logarithms of their shares of all
        counts, [all | entries] by half-life, then log1p of the item's age in minutes since its first click."""
        rows = self.rows(now_ms)
        return rows.ids, rows.base

    def rows(self, now_ms: int) -> MomentRows:
        """The same, to be seen in the context of requests."""
        self.pairs.count(now_ms)
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
        order_M = np.full(self._width, -np.inf)
        order_M[: len(chosen)] = score_V[chosen]
        return MomentRows(self.pairs, ids, features, order_M, now_ms)


class Visits:
    """Which of a stream's events begin a visit, and what came before the others, as they come."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, int]] = {}  # time in ms and item id of a user's newest event

    def entry(self, user_id: str, time_ms: int, item_id: int = PADDING_ID) -> tuple[bool, int]:
        """(whether the event begins a visit, the item of the event before it in the visit, PADDING_ID for none)."""
        last_ms, last_item = self._last.get(user_id, (None, PADDING_ID))
        self._last[user_id] = (max(time_ms, last_ms or 0), item_id)
        if len(self._last) > PRUNE:
            over = time_ms - VISIT_GAP_MS
            self._last = {user: last for user, last in self._last.items() if last[0] >= over}
        begins = last_ms is None or time_ms - last_ms > VISIT_GAP_MS
        return begins, PADDING_ID if begins else last_item


@dataclass(frozen=True)
class Stream:
    """Events in order of time, int64 [n] and context int64 [n, C]; ``entry`` bool [n]: those that begin a visit."""

    ids: np.ndarray
    times_ms: np.ndarray
    entry: np.ndarray
    context: np.ndarray
    previous: np.ndarray

    @classmethod
    def of(cls, users: np.ndarray, ids: np.ndarray, times_ms: np.ndarray, context: np.ndarray) -> Stream:
        begins = entries(users, times_ms)
        return cls(ids, times_ms, begins, context, previous_items(users, ids, begins))

    def __getitem__(self, rows: slice | np.ndarray) -> Stream:
        return Stream(*(getattr(self, f.name)[rows] for f in fields(self)))

    def __len__(self) -> int:
        return len(self.ids)

    def into(self, table: LiveTable) -> None:
        """Adds all events to a table."""
        table.add(self.ids, self.times_ms, self.entry, self.context, self.previous)

    def save(self, path: Path, number: int = 0) -> None:
        """What a server begins with: the newest events of a log, as long as any may count (``KEPT_MS``). Times of the
        future do not make the others old. ``number``: of the newest event of the store's log among them (0: none)."""
        newest_ms = min(int(self.times_ms[-1]), int(time.time() * 1000)) if len(self) else 0
        kept = self[self.times_ms > newest_ms - KEPT_MS]
        narrow = {n: getattr(kept, n).astype(np.int32) for n in ("ids", "context", "previous")}
        np.savez_compressed(path, times_ms=kept.times_ms, entry=kept.entry, number=np.int64(number), **narrow)

    @classmethod
    def load(cls, path: Path) -> Stream:
        """What ``save`` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            return cls(*(stored[f.name].astype(stored[f.name].dtype if f.name == "entry" else np.int64)
                         for f in fields(cls)))  # fmt: skip


def recent_number(path: Path) -> int:
    """Number of the newest event of the store's log that ``Stream.save`` wrote; 0 for none."""
    with np.load(path, allow_pickle=False) as stored:
        return int(stored["number"]) if "number" in stored else 0
