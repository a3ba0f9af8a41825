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

    def _places(self, kinds: np.ndarray, values: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Places int64 [DEPTH, ...] of pairs of values, of a kind each, and items: int64 that broadcast to [...]."""
        with np.errstate(over="ignore"):
            of_kind = (kinds + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            key = _mixed(_mixed(values.astype(np.uint64) + of_kind) ^ items.astype(np.uint64))
        halves = np.stack([key, key >> np.uint64(32)]) & np.uint64(SLOTS - 1)
        starts = FIRST_ID + SLOTS * np.arange(DEPTH).reshape(-1, *(1,) * key.ndim)
        return halves.astype(np.int64) + starts

    def add(self, ids: np.ndarray, times_ms: np.ndarray, context_NC: np.ndarray, previous_N: np.ndarray) -> None:
        """Events of items int64 [N] at Unix times in ms int64 [N], in a context of ids [N, C], after the items
        ``previous_N`` (a special id: after none)."""
        values_NK = np.concatenate([context_NC, previous_N[:, None]], 1)
        counted_NK = np.ones(values_NK.shape, bool)
        counted_NK[:, self.columns] = previous_N >= FIRST_ID
        event, kind = np.nonzero(counted_NK)
        for items in (ids[event], TOTAL):  # of all kinds at once: a server counts a few events at a time
            places = self._places(kind, values_NK[event, kind], items)
            self._counts.add(places.T.ravel(), np.repeat(times_ms[event], DEPTH))

    def count(self, now_ms: int) -> None:
        """Counts all events before ``now_ms``."""
        self._counts.at(TOTAL + FIRST_ID, now_ms)

    def features(self, kinds_P: np.ndarray, values_P: np.ndarray, ids_M: np.ndarray, now_ms: int) -> np.ndarray:
        """float32 [P, M, 2] of values int64 [P], of a kind each: log1p of the count of each item with the value, and
        the logarithm of its share of all counts with it, by the events that ``count`` took."""
        items = np.concatenate([ids_M, TOTAL])
        places = self._places(kinds_P[:, None], values_P[:, None], items)
        counts_PM = self._counts.counted(places, now_ms)[..., 0].min(0)
        count_PM, total_P1 = counts_PM[:, :-1], counts_PM[:, -1:]
        share_PM = np.log((count_PM + FLOOR) / (total_P1 + 1))
        return np.stack([np.log1p(count_PM), share_PM], -1).astype(np.float32)


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
        self._of: dict[tuple[int, int], np.ndarray] = {}  # float32 [M, 2] by kind and value
        self._nothing = np.zeros((len(ids_M), 2), np.float32)

    def _features(self, pairs: list[tuple[int, int]]) -> np.ndarray:
        """float32 [n, M, 2] of (kind, value); 0 after no item."""
        after = self._pairs.columns
        missing = [p for p in dict.fromkeys(pairs) if p not in self._of and (p[0] < after or p[1] >= FIRST_ID)]
        if missing:
            kinds_P, values_P = np.array(missing, np.int64).T
            features = self._pairs.features(kinds_P, values_P, self.ids, self._now_ms)
            self._of.update(zip(missing, np.where(self._known[:, None], features, np.float32(0)), strict=True))
        return np.array([self._of.get(pair, self._nothing) for pair in pairs])

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
        rows, items, base, kinds = len(newest_B), len(self.ids), self.base.shape[1], columns + 1
        values_BK = np.concatenate([context_BC, newest_B[:, None]], 1).tolist()
        pairs = self._features([pair for values in values_BK for pair in enumerate(values)])
        pairs_BKM2 = pairs.reshape(rows, kinds, items, 2)
        out = np.empty((rows, items, base + 2 * kinds + shown_MS.shape[1]), np.float32)
        out[..., :base], out[..., base + 2 * kinds :] = self.base, shown_MS
        out[..., base : base + 2 * kinds] = pairs_BKM2.transpose(0, 2, 1, 3).reshape(rows, items, 2 * kinds)
        ids = np.repeat(self.ids[None], rows, 0)
        if not columns:
            return ids, out
        score_BM = np.repeat(self._score[None], rows, 0)
        for kind in range(columns):
            score_BM += pairs_BKM2[:, kind, :, 0]
        order_BM = np.argsort(-score_BM, axis=1, kind="stable")
        return np.take_along_axis(ids, order_BM, 1), np.take_along_axis(out, order_BM[..., None], 1)
