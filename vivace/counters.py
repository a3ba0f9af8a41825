"""Live counts of items: decayed by half-lives, or of a sliding window.

The same code counts offline, where a log is replayed, and beside a server. What is answered for a moment holds the
events strictly before it: those that say they are later wait, in whatever order events come. Sums are of integers, so
any order and any cut into batches leads to the same bits, and so does a rebuild from the log.

    counts = LiveCounts(items=1000, half_lives_ms=(600_000, 86_400_000))
    counts.add(np.array([17, 4]), np.array([1_000, 2_000]))
    counts.at(np.array([4, 17]), now_ms=602_000)   # float64 [2, 2]: items by half-lives

Axis legend: V item ids, L half-lives.
"""

from __future__ import annotations

import numpy as np

from vivace.contract import FIRST_ID

BLOCK = 20  # half-lives; an event counts at least as long after its own, then less than 1e-6
FRACTION_BITS = 16  # of a weight: 1 event is right to 1e-5; an item may have 2^27 events within a block
BLOCKS = 2  # that are kept: the newest and the one before it
AT_ONCE = 1 << 16  # events that are weighed at once


class _Waiting:
    """Events by time, until a moment passes them."""

    def __init__(self) -> None:
        self._ids, self._times = np.empty(0, np.int64), np.empty(0, np.int64)
        self._new: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, ids: np.ndarray, times_ms: np.ndarray) -> None:
        self._new.append((ids, times_ms))

    def before(self, now_ms: int) -> tuple[np.ndarray, np.ndarray]:
        """Takes out the (ids, times) of all events strictly before ``now_ms``, in order of time."""
        if self._new:
            ids = np.concatenate([self._ids, *(ids for ids, _ in self._new)])
            times = np.concatenate([self._times, *(times for _, times in self._new)])
            if (times[1:] < times[:-1]).any():
                order = np.argsort(times, kind="stable")
                ids, times = ids[order], times[order]
            self._ids, self._times, self._new = ids, times, []
        if not len(self._times) or self._times[0] >= now_ms:
            return self._ids[:0], self._times[:0]
        stop = int(np.searchsorted(self._times, now_ms, side="left"))
        taken = self._ids[:stop], self._times[:stop]
        self._ids, self._times = self._ids[stop:], self._times[stop:]
        return taken


class _Counts:
    """Events come in any order; moments that are asked for never go back."""

    def __init__(self, items: int) -> None:
        if items <= FIRST_ID:
            raise ValueError(f"items: expected more than the {FIRST_ID} special ids, got {items}")
        self.items = items
        self.clock_ms: int | None = None  # the newest moment asked for
        self._waiting = _Waiting()

    def add(self, item_ids: np.ndarray, times_ms: np.ndarray) -> None:
        """Events of items int64 [n] at Unix times in ms int64 [n]. Special ids are not counted. Raises ValueError for
        an id outside the catalogue."""
        ids, times = np.asarray(item_ids, np.int64).ravel(), np.asarray(times_ms, np.int64).ravel()
        if ids.shape != times.shape:
            raise ValueError(f"add: expected a time for every item, got {len(ids)} items and {len(times)} times")
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.items):
            raise ValueError(f"add: expected item ids of 0..{self.items - 1}, got {ids.min()}..{ids.max()}")
        known = ids >= FIRST_ID
        self._waiting.add(ids[known], times[known])

    def _pass(self, now_ms: int) -> tuple[np.ndarray, np.ndarray]:
        """Sets the clock and takes the (ids, times) that it passes."""
        if self.clock_ms is not None and now_ms < self.clock_ms:
            raise ValueError(f"counts: moments must not go back, got {now_ms} ms after {self.clock_ms} ms")
        self.clock_ms = now_ms
        return self._waiting.before(now_ms)


def largest(counts_V: np.ndarray, n: int) -> np.ndarray:
    """Ids int64 [<= n] of the largest counts above 0, largest first; equal ones by id."""
    counted = np.flatnonzero(counts_V > 0)
    if 0 < n < len(counted):  # all that equal the n-th stay, for the smaller ids among them to be found
        least = np.partition(counts_V[counted], len(counted) - n)[len(counted) - n]
        counted = counted[counts_V[counted] >= least]
    order = np.argsort(-counts_V[counted], kind="stable")
    return counted[order][:n]


def _decayed(sums: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float64 [L, ...] of sums of blocks int64 [L, BLOCKS, ...] and what they are worth, float64 [L, BLOCKS]."""
    scales = scales.reshape(*scales.shape, *(1,) * (sums.ndim - 2))
    decayed: np.ndarray = sums[:, 0] * scales[:, 0] + sums[:, 1] * scales[:, 1]
    return decayed


class LiveCounts(_Counts):
    """Counts in which an event weighs 1/2 after a half-life, 1/4 after two.

    An event of time t adds 2^(t / half-life - 20 b), a fixed-point integer, to its item's sum of block b, the 20
    half-lives that t lies in; the moment's answer is the sums of the newest two blocks times a power of two. Nothing
    is ever rescaled, so nothing rounds twice or overflows, however long the log.
    """

    def __init__(self, items: int, half_lives_ms: tuple[int, ...]) -> None:
        super().__init__(items)
        if not half_lives_ms or min(half_lives_ms) < 1:
            raise ValueError(f"half_lives_ms: expected positive numbers of ms, got {half_lives_ms}")
        self.half_lives_ms = tuple(int(h) for h in half_lives_ms)
        self._half_lives_L = np.array(self.half_lives_ms, np.int64)
        self._sums = np.zeros((len(half_lives_ms), BLOCKS, items), np.int64)  # block b at b modulo BLOCKS
        self._all = [[0] * BLOCKS for _ in half_lives_ms]  # the same of all items, of any size
        self._newest: list[int | None] = [None] * len(half_lives_ms)  # block
        self._scaled: tuple[tuple[int | None, ...], np.ndarray] = ((), np.empty(0))  # the scales of a moment

    def _count(self, now_ms: int) -> None:
        ids, times = self._pass(now_ms)
        for start in range(0, len(ids), AT_ONCE):
            self._weigh(ids[start : start + AT_ONCE], times[start : start + AT_ONCE])

    def _weigh(self, ids_n: np.ndarray, times_n: np.ndarray) -> None:
        """Adds events in order of time, for all half-lives at once."""
        half_lives_L1, levels_L1 = self._half_lives_L[:, None], np.arange(len(self.half_lives_ms))[:, None]
        block_Ln, rest_Ln = np.divmod(times_n, half_lives_L1 * BLOCK)
        for number, block in enumerate(block_Ln[:, -1].tolist()):
            self._turn(number, block)
        weight_Ln = np.rint(np.exp2(rest_Ln / half_lives_L1 + FRACTION_BITS)).astype(np.int64)
        weight_Ln *= block_Ln > np.array(self._newest, np.int64)[:, None] - BLOCKS
        row_Ln = levels_L1 * BLOCKS + block_Ln % BLOCKS
        np.add.at(self._sums.reshape(-1), (row_Ln * self.items + ids_n).ravel(), weight_Ln.ravel())
        added = np.zeros(len(self._all) * BLOCKS, np.int64)
        np.add.at(added, row_Ln.ravel(), weight_Ln.ravel())
        for row, count in enumerate(added.tolist()):
            self._all[row // BLOCKS][row % BLOCKS] += count

    def _turn(self, number: int, block: int) -> None:
        """Makes ``block`` the newest, if it is newer, and forgets those it leaves behind."""
        newest = self._newest[number]
        if newest is not None and block <= newest:
            return
        first = block - BLOCKS + 1 if newest is None else max(newest + 1, block - BLOCKS + 1)
        for gone in range(first, block + 1):
            self._sums[number, gone % BLOCKS] = 0
            self._all[number][gone % BLOCKS] = 0
        self._newest[number] = block

    def _scales(self, now_ms: int) -> np.ndarray:
        """What the sums of each block are worth at a moment, float64 [L, BLOCKS]."""
        of, (known, of_known) = (now_ms, *self._newest), self._scaled  # read once: another thread may replace it
        if known == of:
            return of_known
        scales = np.full((len(self.half_lives_ms), BLOCKS), -np.inf)  # nothing
        for number, (half_life, newest) in enumerate(zip(self.half_lives_ms, self._newest, strict=True)):
            for block in () if newest is None else range(newest - BLOCKS + 1, newest + 1):
                scales[number, block % BLOCKS] = -(now_ms - block * BLOCK * half_life) / half_life - FRACTION_BITS
        worth: np.ndarray = np.exp2(scales)
        self._scaled = of, worth
        return worth

    def totals(self, now_ms: int) -> np.ndarray:
        """Decayed counts float64 [L] of all items together."""
        self._count(now_ms)
        levels = zip(self._all, self._scales(now_ms).tolist(), strict=True)
        return np.array([sum(n * scale for n, scale in zip(sums, of, strict=True)) for sums, of in levels])

    def forget(self, ids: np.ndarray) -> None:
        """Sets what was counted of items int64 [n] to nothing."""
        ids = np.unique(ids)
        for number, place in np.ndindex(len(self._all), BLOCKS):
            self._all[number][place] -= int(self._sums[number, place, ids].sum())
        self._sums[:, :, ids] = 0

    def at(self, ids: np.ndarray, now_ms: int) -> np.ndarray:
        """Decayed counts float64 [..., L] of items [...] by the events before ``now_ms``."""
        self._count(now_ms)
        return self.counted(ids, now_ms)

    def counted(self, ids: np.ndarray, now_ms: int) -> np.ndarray:
        """The same by the events that were counted so far: it counts none itself, so that another thread may ask."""
        ids = np.asarray(ids)
        counts = _decayed(self._sums.take(ids, axis=2), self._scales(now_ms))
        moved: np.ndarray = np.moveaxis(counts, 0, -1)
        return moved

    def every(self, now_ms: int, half_life_ms: int) -> np.ndarray:
        """Decayed count float64 [V] of every item; the special ids have 0."""
        self._count(now_ms)
        number = self.half_lives_ms.index(half_life_ms)
        of_level = slice(number, number + 1)
        counts: np.ndarray = _decayed(self._sums[of_level], self._scales(now_ms)[of_level])[0]
        return counts

    def top(self, n: int, now_ms: int, half_life_ms: int) -> np.ndarray:
        """Ids int64 [<= n] of what is clicked most, best first; equal ones by id."""
        return largest(self.every(now_ms, half_life_ms), n)


class WindowCounts(_Counts):
    """Counts of the events in the ``window_ms`` before a moment: [now - window, now)."""

    def __init__(self, items: int, window_ms: int) -> None:
        super().__init__(items)
        if window_ms < 1:
            raise ValueError(f"window_ms: expected a positive number of ms, got {window_ms}")
        self.window_ms = window_ms
        self._inside = _Waiting()  # to leave the window
        self._counts = np.zeros(items, np.int64)

    def every(self, now_ms: int) -> np.ndarray:
        """Count int64 [V] of every item, a copy; the special ids have 0."""
        entered = self._pass(now_ms)
        if len(entered[0]):
            np.add.at(self._counts, entered[0], 1)
            self._inside.add(*entered)
        gone, _ = self._inside.before(now_ms - self.window_ms)
        np.subtract.at(self._counts, gone, 1)
        return self._counts.copy()

    def top(self, n: int, now_ms: int) -> np.ndarray:
        """Ids int64 [<= n] of what is clicked most, best first; equal ones by id."""
        return largest(self.every(now_ms), n)
