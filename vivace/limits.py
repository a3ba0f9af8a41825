"""Which of a user's events live counters take, so that no single account can push an item far.

The same class decides where a log is replayed and beside a server: one event after another, in the order they come. A
limit holds for what counts alone; the store keeps every event, and a user's history has it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np

from vivace.checks import check_fields, check_minimum
from vivace.contract import StageTensors

WINDOW_MS = 600_000  # in which ``user_events`` counts
PRUNE = 100_000  # users beyond which those are forgotten whose events no longer bound anything


@dataclass(frozen=True)
class CountLimits:
    """``same_item_ms``: an event counts if none of the user's on that item counted within so long (0: no limit);
    ``user_events``: the most of a user's events that count within WINDOW_MS (0: no limit)."""

    same_item_ms: int = 0
    user_events: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        check_minimum(self, 0, "same_item_ms", "user_events")

    @classmethod
    def of(cls, tensors: StageTensors) -> CountLimits:
        """Those of a run."""
        return cls(1000 * tensors.same_item_s, tensors.user_events)

    @property
    def none(self) -> bool:
        """Whether all events count."""
        return not (self.same_item_ms or self.user_events)

    @property
    def reach_ms(self) -> int:
        """How long an event may bound another."""
        return max(self.same_item_ms, WINDOW_MS if self.user_events else 0)


class Limiter:
    """Tells of one event after another whether it counts. Times may come in any order: what an event says of its own
    time buys it nothing, as it is held to those before and after it."""

    def __init__(self, limits: CountLimits) -> None:
        self.limits = limits
        self._counted: dict[Hashable, list[tuple[int, int]]] = {}  # (time in ms, item) by user
        self._newest_ms = 0

    def counts(self, user: Hashable, item: int, time_ms: int) -> bool:
        """Whether a user's event on an item at a Unix time in ms counts."""
        limits = self.limits
        if limits.none:
            return True
        of_user = self._counted.get(user, [])
        near = [event for event in of_user if abs(event[0] - time_ms) < limits.reach_ms]
        same = any(i == item and abs(t - time_ms) < limits.same_item_ms for t, i in near)
        full = limits.user_events and sum(abs(t - time_ms) < WINDOW_MS for t, _ in near) >= limits.user_events
        if same or full:
            return False
        kept = [event for event in of_user if event[0] > max(self._newest_ms, time_ms) - 2 * limits.reach_ms]
        self._counted[user] = [*kept, (time_ms, item)]
        self._newest_ms = max(self._newest_ms, time_ms)
        if len(self._counted) > PRUNE:
            self._prune()
        return True

    def _prune(self) -> None:
        since = self._newest_ms - 2 * self.limits.reach_ms
        self._counted = {u: events for u, events in self._counted.items() if max(events)[0] > since}

    def mask(self, users: Iterable[Hashable], items: Iterable[int], times_ms: Iterable[int]) -> np.ndarray:
        """bool [n]: which of n events count, in their order."""
        rows = zip(users, items, times_ms, strict=True)
        return np.array([self.counts(user, int(item), int(time)) for user, item, time in rows], bool)
