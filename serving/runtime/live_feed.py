"""The live counters of a server: what the feature store's log says since the run was prepared, counted as it comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vivace.contract import FIRST_ID, StageTensors
from vivace.live import KEPT_MS, LiveTable, Visits, load_recent
from vivace.store.interface import FeatureStore

EVERY_S = 0.2
STALE_S = 5.0


class LiveFeed:
    """Rising items and what the counters say of them, read by every process for itself from the store.

    Counting begins with the events that came along with the models, and goes on with those of the store's log that are
    later than the last of them, at the start the newest 500,000. A thread looks for new ones every ``EVERY_S``.
    """

    def __init__(
        self,
        recent: Path,
        store: FeatureStore,
        item_ids: Callable[[Sequence[str]], np.ndarray],
        shapes: StageTensors,
        start: bool = True,
    ) -> None:
        if not recent.exists():
            raise FileNotFoundError(f"live counters: nothing at {recent}; run 'vivace compile' again")
        ids, times, entry = load_recent(recent)
        self._store, self._item_ids = store, item_ids
        self._table, self._visits = LiveTable(shapes.items, shapes.rising), Visits()
        self._table.add(ids, times, entry)
        self._after_ms = min(int(times[-1]), int(time.time() * 1000)) if len(times) else 0  # a log may hold the future
        self._number, self._now_ms, self.error = 0, 0, ""
        self.refresh()
        if start:
            threading.Thread(target=self._follow, name="live counters", daemon=True).start()

    def refresh(self, now_ms: int | None = None) -> None:
        """Counts what came since, and works out what is rising at ``now_ms`` (Unix ms; None: now)."""
        now_ms = int(time.time() * 1000) if now_ms is None else now_ms
        now_ms = self._now_ms = max(now_ms, self._now_ms)  # a clock that is set back stands still for the counters
        self._number, events = self._store.live_events(self._number, now_ms - KEPT_MS)
        events = [event for event in events if event.timestamp_ms > self._after_ms]
        if events:
            ids = self._item_ids([event.item_id for event in events])
            times = np.array([event.timestamp_ms for event in events], np.int64)
            entry = np.array([self._visits.entry(event.user_id, event.timestamp_ms) for event in events])
            known = ids >= FIRST_ID
            self._table.add(ids[known], times[known], entry[known])
        self._rows = self._table.at(now_ms)
        self._at = time.monotonic()

    def rows(self, count: int) -> list[np.ndarray]:
        """Rising ids int64 [count, M] and features float32 [count, M, F], the same in every row."""
        return [np.repeat(part[None], count, 0) for part in self._rows]

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
            except Exception as error:  # such as a store that is being exchanged: the next look may see it
                self.error = f"{type(error).__name__}: {error}"
