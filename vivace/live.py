"""What is rising at a moment: the items that are clicked most just now, and what counters say of each.

Training replays a log through this class, and a server feeds it what is appended, so both read the same numbers. An
*entry* is an event that begins a visit: its user's first, or the first for 30 minutes. What people click when they come
differs from what they click on from there.

``LiveTable.rows`` adds what the context of a request and its newest event make of them (``live_moment``).

A *fresh* item is one that the trained tables lack; its id is V and its slot (``vivace.contract``).

Axis legend: V item ids, M rising items, L half-lives, F features = 4 L + 1, C columns of the context.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from vivace.contract import FIRST_ID, LIVE_FEATURES, LIVE_HALF_LIVES_MS, MAX_FRESH, PADDING_ID
from vivace.counters import LiveCounts, largest
from vivace.limits import CountLimits, Limiter
from vivace.live_moment import MomentRows, PairCounts
from vivace.live_shown import KEPT_MS as KEPT_MS, ShownMoment

VISIT_GAP_MS = 30 * 60_000
FIRST_LEVEL = 1  # of the half-lives: 10 minutes orders what is rising
PRUNE = 100_000  # users beyond which those whose visit is over are forgotten
SHARE_FLOOR = 0.1  # events
NEVER_MS = np.iinfo(np.int64).max
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


def first_times(users: np.ndarray, times_ms: np.ndarray) -> dict[int, int]:
    """When the first event of each user came, in ms; of events int64 [n] in any order."""
    order = np.argsort(times_ms, kind="stable")
    whose, first = np.unique(users[order], return_index=True)
    return dict(zip(whose.tolist(), times_ms[order][first].tolist(), strict=True))


class FreshPlaces:
    """Where fresh items are counted: in the ``room`` last places of a table of ``items`` others. Once they are taken,
    the item that was counted first gives up its place."""

    def __init__(self, items: int, room: int) -> None:
        self._items, self._room = items, room
        self._place: dict[int, int] = {}  # by id, in the order they came
        self.ids = np.full(room, PADDING_ID, np.int64)

    def of(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(place int64 [n] of each of ``ids``, places that another item had). Ids below V are their own places; without
        room fresh ones have PADDING_ID."""
        fresh = np.flatnonzero(ids >= self._items)
        if not len(fresh):
            return ids, ids[:0]
        places, taken = ids.copy(), list[int]()
        for at in fresh.tolist():
            places[at] = self._take(int(ids[at]), taken) if self._room else PADDING_ID
        return places, np.array(taken, np.int64)

    def _take(self, id_: int, taken: list[int]) -> int:
        if id_ not in self._place:
            number = len(self._place)
            if number == self._room:
                number = self._place.pop(next(iter(self._place))) - self._items
                taken.append(self._items + number)
            self._place[id_], self.ids[number] = self._items + number, id_
        return self._place[id_]


class LiveTable:
    """Counts of all events and of entries, and when an item was first clicked.

    Args:
        items: V.
        rising: M, rows that ``at`` gives.
        columns: C.
        fresh: rising fresh items that ``moment`` gives (0: they are not counted).
        shown: whether it says how often items were shown too (``add_shown``).
    """

    def __init__(self, items: int, rising: int, columns: int = 0, fresh: int = 0, shown: bool = False) -> None:
        self.pairs, self.items = PairCounts(columns), items
        self._widths, places = (rising, fresh), items + (MAX_FRESH if fresh else 0)
        self._fresh = FreshPlaces(items, places - items)
        self.every, self.entry = LiveCounts(places, LIVE_HALF_LIVES_MS), LiveCounts(places, LIVE_HALF_LIVES_MS)
        self.shown = LiveCounts(places, LIVE_HALF_LIVES_MS) if shown else None
        self.first_ms = np.full(places, NEVER_MS)

    def _places(self, ids: np.ndarray) -> np.ndarray:
        """Where items are counted, int64 [n]; what was counted in a place of another is forgotten."""
        places, taken = self._fresh.of(ids)
        if len(taken):
            for counts in (self.every, self.entry, self.shown):
                if counts is not None:
                    counts.forget(taken)
            self.first_ms[taken] = NEVER_MS
        return places

    def add_shown(self, ids: np.ndarray, times_ms: np.ndarray) -> None:
        """Impressions of items int64 [n], fresh ones too, at Unix times in ms int64 [n]. They say nothing of what is
        rising."""
        if self.shown is not None:
            self.shown.add(self._places(ids), times_ms)

    def add(
        self,
        ids: np.ndarray,
        times_ms: np.ndarray,
        entry: np.ndarray,
        context_NC: np.ndarray | None = None,
        previous_N: np.ndarray | None = None,
    ) -> None:
        """Events of items int64 [n], fresh ones too, at Unix times in ms int64 [n]; ``entry`` bool [n]: those that
        begin a visit; ``context_NC`` and ``previous_N``: as for ``PairCounts.add``."""
        if context_NC is not None and previous_N is not None:
            known = ids >= FIRST_ID
            self.pairs.add(ids[known], times_ms[known], context_NC[known], previous_N[known])
        places = self._places(ids)
        self.every.add(places, times_ms)
        self.entry.add(places[entry], times_ms[entry])
        np.minimum.at(self.first_ms, places, times_ms)

    def at(self, now_ms: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int64 [M], features float32 [M, F]) by the events before ``now_ms``, most clicked first; PADDING_ID and
        zeros where fewer were clicked. Features: log1p of the decayed counts and the logarithms of their shares of all
        counts, [all | entries] by half-life, then log1p of the item's age in minutes since its first click."""
        rows = self.rows(now_ms)
        return rows.ids, rows.base

    def rows(self, now_ms: int) -> MomentRows:
        """The same, to be seen in the context of requests."""
        return self._of_known(*self._scores(now_ms), now_ms)

    def moment(self, now_ms: int) -> tuple[MomentRows, MomentRows]:
        """The same of the items that the tables know, and of fresh ones."""
        (_, fresh), v = self._widths, self.items
        score_V, total_C = self._scores(now_ms)
        of_fresh = self._rows(v + largest(score_V[v:], fresh), fresh, total_C, score_V, now_ms)
        return self._of_known(score_V, total_C, now_ms), of_fresh

    def _of_known(self, score_V: np.ndarray, total_C: np.ndarray, now_ms: int) -> MomentRows:
        known = self._widths[0]
        return self._rows(largest(score_V[: self.items], known), known, total_C, score_V, now_ms)

    def _scores(self, now_ms: int) -> tuple[np.ndarray, np.ndarray]:
        """(what orders all items, float64 [V], counts of all together, [all | entries] by half-life)."""
        self.pairs.count(now_ms)
        level_ms, counters = LIVE_HALF_LIVES_MS[FIRST_LEVEL], (self.every, self.entry)
        every_V, entry_V = (c.every(now_ms, level_ms) for c in counters)
        counted, score_V = np.flatnonzero(every_V > 0), np.zeros(len(every_V))  # an entry is an event too
        score_V[counted] = np.log1p(every_V[counted]) + np.log1p(entry_V[counted])
        return score_V, np.concatenate([c.totals(now_ms) for c in counters])

    def _rows(
        self, places: np.ndarray, width: int, total_C: np.ndarray, score_V: np.ndarray, now_ms: int
    ) -> MomentRows:
        """Of the items in ``places`` int64 [<= width]; ``total_C``: counts of all items, [all | entries] by
        half-life."""
        counts_CM = np.concatenate([c.at(places, now_ms) for c in (self.every, self.entry)], 1).T
        total_C1 = total_C[:, None]
        share_CM = np.log((counts_CM + SHARE_FLOOR) / (total_C1 + 1))
        age_M = np.log1p(np.maximum(now_ms - self.first_ms[places], 0) / 60_000)
        ids, features = np.full(width, PADDING_ID, np.int64), np.zeros((width, LIVE_FEATURES), np.float32)
        of_fresh = places >= self.items
        ids[: len(places)] = places
        ids[: len(places)][of_fresh] = self._fresh.ids[places[of_fresh] - self.items]
        features[: len(places)] = np.concatenate([np.log1p(counts_CM), share_CM, age_M[None]]).T
        order_M = np.full(width, -np.inf)
        order_M[: len(places)] = score_V[places]
        return MomentRows(
            self.pairs, ids, features, order_M, now_ms, self._shown(places, ids, counts_CM, total_C, now_ms)
        )

    def _shown(
        self, places: np.ndarray, ids: np.ndarray, counts_CM: np.ndarray, total_C: np.ndarray, now_ms: int
    ) -> ShownMoment | None:
        """How often the items ``ids`` int64 [width] in ``places`` were shown and, of the first half of the counts,
        clicked; None where that is not counted."""
        if self.shown is None:
            return None
        levels = len(LIVE_HALF_LIVES_MS)
        clicks_ML, shown_ML = (np.zeros((len(ids), levels)) for _ in range(2))
        clicks_ML[: len(places)] = counts_CM[:levels].T
        shown_ML[: len(places)] = self.shown.at(places, now_ms)
        return ShownMoment(ids, clicks_ML, shown_ML, total_C[:levels], self.shown.totals(now_ms), now_ms)


def order_of(features: np.ndarray, columns: int) -> np.ndarray:
    """What orders rising items, float [...], of their features [..., base + 2 C + 2] in a request's context; 0 where
    nothing was counted."""
    entries = len(LIVE_HALF_LIVES_MS) + FIRST_LEVEL
    by_context = features[..., LIVE_FEATURES : LIVE_FEATURES + 2 * columns : 2].sum(-1)
    order: np.ndarray = features[..., FIRST_LEVEL] + features[..., entries] + by_context
    return order


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
    def of(
        cls,
        users: np.ndarray,
        ids: np.ndarray,
        times_ms: np.ndarray,
        context: np.ndarray,
        limits: CountLimits | None = None,
        seen: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Stream:
        """``limits``: what does not count by them is left out, after it has said whether others begin a visit.
        ``seen``: other events of users, (numbers int64 [m], times in ms int64 [m]) in any order, that say when a user
        came first and nothing else, such as impressions."""
        begins = entries(users, times_ms)
        stream = cls(ids, times_ms, begins, context, previous_items(users, ids, begins))
        if limits is None or limits.none:
            return stream
        limiter = Limiter(limits)
        if limits.newcomers:  # by every event, as beside a server: those of unknown items and suspect ones too
            more = seen or (users[:0], times_ms[:0])
            came = first_times(np.concatenate([users, more[0]]), np.concatenate([times_ms, more[1]]))
            limiter.meet(came, 0)
        known = np.flatnonzero(ids >= FIRST_ID)
        rows = (x[known].tolist() for x in (users, ids, times_ms))
        return stream[known[limiter.mask(*rows)]]

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
