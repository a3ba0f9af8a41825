"""The live counters of a server: what the feature store's log says since the run was prepared, counted as it comes."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from serving.runtime.moment import Moment
from vivace.contract import FIRST_ID, PADDING_ID, StageTensors
from vivace.limits import CountLimits, Limiter
from vivace.live import KEPT_MS, LiveTable, Stream, Visits, recent_number
from vivace.live_shown import RECENT_SHOWN, ShownStream, shown_limits
from vivace.store.interface import Event, ServingStore, StoreError

EVERY_S = 0.2
STALE_S = 5.0
USERS = 5_000  # whose histories are read at once


class LiveFeed:
    """Rising items and what the counters say of them, read by every process for itself from the store.

    Counting begins with the events that came along with the models, and goes on with those of the store's log that are
    later than the last of them, at the start the newest 500,000. A thread looks for new ones every ``EVERY_S``.
    """

    def __init__(
        self,
        recent: Path,
        store: ServingStore,
        item_ids: Callable[[Sequence[str]], np.ndarray],
        shapes: StageTensors,
        moment: Moment | None = None,
        start: bool = True,
    ) -> None:
        if not recent.exists():
            raise FileNotFoundError(f"live counters: nothing at {recent}; run 'vivace compile' again")
        stream = Stream.load(recent)
        shown = ShownStream.load(recent.with_name(RECENT_SHOWN)) if shapes.shown else ShownStream.none()
        self._store, self._item_ids, self._moment, self._counted = store, item_ids, moment, shapes.counted
        self._table = LiveTable(shapes.items, shapes.rising, shapes.counted, shapes.rising_fresh, shapes.shown)
        limits = CountLimits.of(shapes)
        self._visits, self._limiter, self._items = Visits(), Limiter(limits), shapes.items
        self._shown_limiter = Limiter(shown_limits(limits))
        self._slots: dict[str, int] | None = {} if shapes.rising_fresh else None  # by raw id of items put in since
        self._changes = 0  # number of the newest change among them
        stream.into(self._table)
        self._table.add_shown(shown.ids, shown.times_ms)
        newest_ms = max((int(s.times_ms[-1]) for s in (stream, shown) if len(s)), default=0)
        self._after_ms = min(newest_ms, int(time.time() * 1000))  # a log may hold the future
        self._number, self._now_ms, self.error = recent_number(recent), 0, ""
        self._process, self._turns = uuid.uuid4().hex, 0
        self.still = threading.Lock()
        """Who holds it sees one state of the counters."""
        if self._number:
            self._after_ms = 0  # which events of the log came along is known by their number
        try:
            self.refresh()
        except StoreError as error:  # it may answer later
            self._rows, self._at, self.error = self._table.moment(self._now_ms), time.monotonic() - STALE_S, str(error)
        if start:
            threading.Thread(target=self._follow, name="live counters", daemon=True).start()

    def refresh(self, now_ms: int | None = None) -> None:
        """Counts what came since, and works out what is rising at ``now_ms`` (Unix ms; None: now)."""
        with self.still:
            self._turns += 1
            try:
                self._count(int(time.time() * 1000) if now_ms is None else now_ms)
            finally:
                self._turns += 1

    @property
    def epoch(self) -> str:
        """Another one whenever the counts change, and while they do; of this process alone, as no two count at the same
        moment."""
        return f"{self._process} {self._turns}"

    def _count(self, now_ms: int) -> None:
        now_ms = self._now_ms = max(now_ms, self._now_ms)  # a clock that is set back stands still for the counters
        self._number, events = self._store.live_events(self._number, now_ms - KEPT_MS)
        self._meet(events, now_ms)
        events = [event for event in events if event.timestamp_ms > self._after_ms]
        self._count_shown([event for event in events if event.shown])
        if events := [event for event in events if not event.shown]:
            ids = self._ids([event.item_id for event in events])
            times = np.array([event.timestamp_ms for event in events], np.int64)
            visits = [
                self._visits.entry(event.user_id, event.timestamp_ms, int(item))
                for event, item in zip(events, ids, strict=True)
            ]
            entry, previous = (np.array(part) for part in zip(*visits, strict=True))
            counted = ids >= FIRST_ID
            known = np.flatnonzero(counted)
            users, came = [events[at].user_id for at in known], [events[at].came_ms for at in known]
            counted[known] = self._limiter.mask(users, ids[known].tolist(), times[known].tolist(), came)
            Stream(ids, times, entry, self._context(events), previous)[counted].into(self._table)
        self._rows = self._table.moment(now_ms)
        self._at = time.monotonic()

    def _count_shown(self, events: Sequence[Event]) -> None:
        if not events or self._table.shown is None:
            return
        ids, times = self._ids([e.item_id for e in events]), np.array([e.timestamp_ms for e in events], np.int64)
        known = np.flatnonzero(ids >= FIRST_ID)
        users, came = [events[at].user_id for at in known], [events[at].came_ms for at in known]
        counted = known[self._shown_limiter.mask(users, ids[known].tolist(), times[known].tolist(), came)]
        self._table.add_shown(ids[counted], times[counted])

    def _meet(self, events: Sequence[Event], now_ms: int) -> None:
        """Tells the limiter when those came first of whom it has no event: before all of these, if their history begins
        with none of them. ``events``: all of the log, as one of any item and time may be a user's first."""
        unmet = self._limiter.unmet(event.user_id for event in events)
        new = {(event.user_id, event.item_id, event.timestamp_ms) for event in events} if unmet else set()
        came = {event.user_id: event.came_ms or event.timestamp_ms for event in reversed(events)} if unmet else {}
        for start in range(0, len(unmet), USERS):
            users = unmet[start : start + USERS]
            for user, history in zip(users, self._store.typed_histories(users), strict=True):
                if history is not None and history[0] and (user, history[0][0], history[2][0]) not in new:
                    came[user] = 0
        self._limiter.meet({user: came[user] for user in unmet}, now_ms)

    def _ids(self, items: list[str]) -> np.ndarray:
        """Ids int64 [n], of items that were put in since the run was compiled too: V and their slots. Called after the
        events were read, so that no change that came before one of them is missed."""
        ids = self._item_ids(items)
        unknown = np.flatnonzero(ids < FIRST_ID)
        if self._slots is None or not len(unknown):
            return ids
        for change in self._store.catalogue_changes(self._changes):
            self._changes, self._slots[change.item_id] = change.number, change.slot
        ids = ids.copy()
        for at in unknown.tolist():
            if slot := self._slots.get(items[at], 0):
                ids[at] = self._items + slot
        return ids

    def _context(self, events: Sequence[Event]) -> np.ndarray:
        """Ids int64 [n, C] of the columns that are counted by; what an event sent that is none of them, or cannot be
        read, is null."""
        if self._moment is None or not self._counted:
            return np.empty((len(events), 0), np.int64)
        sent = [self._moment.sent(event.context) for event in events]
        ids = self._moment.context([event.user_id for event in events], sent)[0]
        return ids[:, self._moment.columns.counted]

    def rows(self, context_BC: np.ndarray | None, newest_B: np.ndarray) -> list[np.ndarray]:
        """Rising ids int64 [B, M] and features float32 [B, M, F] of requests in a context, ids [B, all columns], whose
        newest events are ``newest_B``; then, where fresh items are counted, slots int64 [B, M'] and features of those
        that are rising."""
        if context_BC is None or self._moment is None or not self._counted:
            context_BC = np.empty((len(newest_B), 0), np.int64)
        else:
            context_BC = context_BC[:, self._moment.columns.counted]
        known, fresh = self._rows
        if self._slots is None:
            return list(known.of(context_BC, newest_B))
        ids, features = fresh.of(context_BC, newest_B)
        return [*known.of(context_BC, newest_B), np.where(ids == PADDING_ID, 0, ids - self._items), features]

    def status(self) -> str:
        """Why the counts are old, as a reason of STATUS; "" where they are not."""
        age = time.monotonic() - self._at
        return f"live counts are {age:.0f} s old ({self.error})" if self.error and age > STALE_S else ""

    def _follow(self) -> None:
        while True:
            time.sleep(EVERY_S)
            try:
                self.refresh()
                self.error = ""
            except StoreError as error:
                self.error = str(error)
            except Exception as error:  # such as a store that is being exchanged: the next look may see it
                self.error = f"{type(error).__name__}: {error}"
