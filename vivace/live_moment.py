"""What is clicked just now in a context, and after an item: decayed counts of pairs, in a table of fixed size.

A count-min sketch (Cormode & Muthukrishnan 2005) of the exact decayed counts of ``counters``: two hashes a pair, the
smaller count is taken, so a count is never too small and seldom too large. Axis legend: B requests, M rising items,
C columns of the context, F features = 2 C + 2, S features of what was shown.
"""

from __future__ import annotations

import numpy as np

from vivace.contract import FIRST_ID
from vivace.counters import LiveCounts
from vivace.live_shown import ShownMoment, ShownStream

HALF_LIFE_MS = 30 * 60_000
DEPTH, SLOTS = 2, 1 << 20
FLOOR = 0.1  # events
TOTAL = np.zeros(1, np.int64)  # in an item's place: no item has this id
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of splitmix64 (Steele et al. 2014)


def _mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * _MIX[0]
    x = (x ^ (x >> np.uint64(27))) * _MIX[1]
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


class PairCounts:
    """Counts of events by (kind, value, item); ``columns`` of the context are the kinds 0 to C - 1, and kind C is what
    came after an item of the same visit."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self._counts = LiveCounts(FIRST_ID + DEPTH * SLOTS, (HALF_LIFE_MS,))

    def _places(self, kind: int | np.ndarray, values: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Places int64 [..., DEPTH] of pairs of values, of a kind each, and items int64 [...]."""
        values, items = np.broadcast_arrays(values, items)
        with np.errstate(over="ignore"):
            of_kind = (np.asarray(kind) + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            key = _mixed(values.astype(np.uint64) + of_kind)
            key = _mixed(key ^ items.astype(np.uint64))
        halves = np.stack([key & np.uint64(SLOTS - 1), (key >> np.uint64(32)) & np.uint64(SLOTS - 1)], -1)
        return halves.astype(np.int64) + np.arange(DEPTH) * SLOTS + FIRST_ID

    def add(self, ids: np.ndarray, times_ms: np.ndarray, context_NC: np.ndarray, previous_N: np.ndarray) -> None:
        """Events of items int64 [N] at Unix times in ms int64 [N], in a context of ids [N, C], after the items
        ``previous_N`` (a special id: after none)."""
        values_NK = np.concatenate([context_NC, previous_N[:, None]], 1)
        counted_NK = np.ones(values_NK.shape, bool)
        counted_NK[:, self.columns] = previous_N >= FIRST_ID
        event, kind = np.nonzero(counted_NK)
        for items in (ids[event], TOTAL):  # of all kinds at once: a server counts a few events at a time
            places = self._places(kind, values_NK[event, kind], items)
            self._counts.add(places.ravel(), np.repeat(times_ms[event], DEPTH))

    def count(self, now_ms: int) -> None:
        """Counts all events before ``now_ms``."""
        self._counts.at(TOTAL + FIRST_ID, now_ms)

    def features(self, kind: int, value: int, ids_M: np.ndarray, now_ms: int) -> np.ndarray:
        """float32 [M, 2]: log1p of the count of each item with the value, and the logarithm of its share of all counts
        with it, by the events that ``count`` took."""
        of = np.array([value], np.int64)
        count_M = self._counts.counted(self._places(kind, of, ids_M), now_ms)[..., 0].min(-1)
        total = self._counts.counted(self._places(kind, of, TOTAL), now_ms)[..., 0].min()
        share_M = np.log((count_M + FLOOR) / (total + 1))
        return np.stack([np.log1p(count_M), share_M], 1).astype(np.float32)


class MomentRows:
    """The rising items of one moment, as each request's context sees them.

    Args:
        pairs: counts, which may go on to count.
        ids_M: rising items, PADDING_ID at the end where there are fewer.
        base_MF: what ``LiveTable.at`` says of them.
        score_M: what orders them.
        shown: how often they were shown, where that is read.
    """

    def __init__(
        self, pairs: PairCounts, ids_M: np.ndarray, base_MF: np.ndarray, score_M: np.ndarray, now_ms: int,
        shown: ShownMoment | None = None,
    ) -> None:  # fmt: skip
        self._pairs, self.ids, self.base, self._score, self._now_ms = pairs, ids_M, base_MF, score_M, now_ms
        self._known, self._shown = ids_M >= FIRST_ID, shown
        self._shown_MS = self._of_shown(None)
        self._of: dict[tuple[int, int], np.ndarray] = {}

    def _features(self, kind: int, value: int) -> np.ndarray:
        if (kind, value) not in self._of:
            features = self._pairs.features(kind, value, self.ids, self._now_ms)
            self._of[kind, value] = np.where(self._known[:, None], features, np.float32(0))
        return self._of[kind, value]

    def _of_shown(self, without: ShownStream | None) -> np.ndarray:
        if self._shown is None:
            return np.empty((len(self.ids), 0), np.float32)
        return np.where(self._known[:, None], self._shown.features(without), np.float32(0))

    def of(
        self, context_BC: np.ndarray, newest_B: np.ndarray, without: ShownStream | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids int64 [B, M], features float32 [B, M, base + 2 C + 2 + S]) of requests in a context of ids, whose newest
        event is ``newest_B`` (PADDING_ID: none); most clicked first, in the request's context. ``without``: impressions
        that do not count for these requests."""
        columns, shown_MS = self._pairs.columns, self._shown_MS if without is None else self._of_shown(without)
        rows, base = len(newest_B), self.base.shape[1]
        after = base + 2 * columns
        out = np.empty((rows, len(self.ids), after + 2 + shown_MS.shape[1]), np.float32)
        out[..., :base], out[..., after + 2 :] = self.base, shown_MS
        ids = np.repeat(self.ids[None], rows, 0)
        for row in range(rows):
            score_M = self._score.copy()
            for kind in range(columns):
                features = self._features(kind, int(context_BC[row, kind]))
                out[row, :, base + 2 * kind : base + 2 * kind + 2] = features
                score_M += features[:, 0]
            newest = int(newest_B[row])
            out[row, :, after : after + 2] = self._features(columns, newest) if newest >= FIRST_ID else 0
            if columns:
                order = np.argsort(-score_M, kind="stable")
                ids[row], out[row] = ids[row][order], out[row][order]
        return ids, out
