"""Which events count for others, so that no single account can push an item far, nor many that were made for it.

The same class decides where a log is replayed and beside a server: one event after another, in the order they come. A
limit holds for what counts alone; the store keeps every event, and a user's history has it.

A *newcomer* is an account in its first NEWCOMER_MS. An item that hardly anyone but newcomers comes to may be pushed by
accounts that were made for it. *Suspect* events are those that no person sends (``vivace.suspects``).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from vivace.checks import check_fields, check_minimum
from vivace.contract import StageTensors
from vivace.suspects import Suspects

User = TypeVar("User", bound=Hashable)
WINDOW_MS = 600_000  # in which ``user_events`` and ``newcomers`` count
NEWCOMER_MS = 1_800_000  # since an account's first event: it is a newcomer so long
FREE = 5  # events of newcomers on an item count whoever else comes to it
PRUNE = 100_000  # users beyond which those are forgotten whose events no longer bound anything


@dataclass(frozen=True)
class CountLimits:
    """``same_item_ms``: an event counts if none of the user's on that item counted within so long (0: no limit);
    ``user_events``: the most of a user's events that count within WINDOW_MS (0: no limit); ``minute_events``: more
    than so many of a user's within a minute are suspect (0: no limit); ``newcomers``: events of newcomers on an item
    that count for each one of others within WINDOW_MS, beside FREE (0: no limit)."""

    same_item_ms: int = 0
    user_events: int = 0
    minute_events: int = 0
    newcomers: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_minimum(self, 0, "same_item_ms", "user_events", "minute_events", "newcomers")

    @classmethod
    def of(cls, tensors: StageTensors) -> CountLimits:
        """Those of a run."""
        return cls(1000 * tensors.same_item_s, tensors.user_events, tensors.minute_events, tensors.newcomers)

    @property
    def none(self) -> bool:
        """Whether all events count, but those of the future."""
        return not (self.same_item_ms or self.user_events or self.minute_events or self.newcomers)

    @property
    def reach_ms(self) -> int:
        """How long an event may bound another of its user."""
        return max(self.same_item_ms, WINDOW_MS if self.user_events else 0)


class Limiter:
    """Tells of one event after another whether it counts. Times may come in any order: what an event says of its own
    time buys it nothing, as it is held to those before and after it."""

    def __init__(self, limits: CountLimits) -> None:
        self.limits = limits
        self.suspects = Suspects(limits.minute_events)
        self._counted: dict[Hashable, list[tuple[int, int]]] = {}  # (time in ms, item) by user
        self._first: dict[Hashable, int] = {}  # when a user's first event came, in ms
        self._crowds: dict[int, _Crowd] = {}  # by item
        self._newest_ms, self._most = 0, [PRUNE, PRUNE]  # users beyond which some are forgotten

    def counts(self, user: Hashable, item: int, time_ms: int, came_ms: int = 0) -> bool:
        """Whether a user's event on an item at a Unix time in ms counts. ``came_ms``: when it came (0: at that
        time)."""
        if self.suspects.why(user, time_ms, came_ms):
            return False
        limits = self.limits
        if not limits.reach_ms and not limits.newcomers:
            return True
        of_user = self._counted.get(user, [])
        near = [event for event in of_user if abs(event[0] - time_ms) < limits.reach_ms]
        same = any(i == item and abs(t - time_ms) < limits.same_item_ms for t, i in near)
        full = limits.user_events and sum(abs(t - time_ms) < WINDOW_MS for t, _ in near) >= limits.user_events
        if same or full or (limits.newcomers and not self._crowd(user, item, came_ms or time_ms)):
            return False
        kept = [event for event in of_user if event[0] > max(self._newest_ms, time_ms) - 2 * limits.reach_ms]
        self._counted[user] = [*kept, (time_ms, item)]
        self._newest_ms = max(self._newest_ms, time_ms)
        if len(self._counted) > self._most[0]:
            self._prune()
        return True

    def _crowd(self, user: Hashable, item: int, came_ms: int) -> bool:
        new = came_ms - self._first.setdefault(user, came_ms) < NEWCOMER_MS
        return self._crowds.setdefault(item, _Crowd()).takes(new, came_ms, self.limits.newcomers)

    def unmet(self, users: Iterable[User]) -> list[User]:
        """Those, each once, of whom it does not know when their first event came."""
        return [user for user in dict.fromkeys(users) if user not in self._first] if self.limits.newcomers else []

    def meet(self, first_ms: Mapping[Any, int], now_ms: int) -> None:
        """When the first event of users came, 0 for long ago. Forgets those who are no newcomers, if there are many:
        ``unmet`` names them again."""
        if len(self._first) > self._most[1]:
            self._first = {user: first for user, first in self._first.items() if now_ms - first < NEWCOMER_MS}
            self._crowds = {i: crowd for i, crowd in self._crowds.items() if now_ms - crowd.time_ms < NEWCOMER_MS}
            self._most[1] = max(PRUNE, 2 * len(self._first))
        self._first.update(first_ms)

    def _prune(self) -> None:
        since = self._newest_ms - 2 * self.limits.reach_ms
        self._counted = {u: events for u, events in self._counted.items() if max(events)[0] > since}
        self._most[0] = max(PRUNE, 2 * len(self._counted))

    def mask(
        self, users: Iterable[Hashable], items: Iterable[int], times_ms: Iterable[int],
        came_ms: Iterable[int] | None = None,
    ) -> np.ndarray:  # fmt: skip
        """bool [n]: which of n events count, in their order."""
        times = [int(time) for time in times_ms]
        rows = zip(users, items, times, times if came_ms is None else came_ms, strict=True)
        return np.array([self.counts(user, int(item), time, int(came)) for user, item, time, came in rows], bool)


class _Crowd:
    """Who came to an item lately: events of newcomers and of others, each with the weight 1/e after WINDOW_MS."""

    __slots__ = ("newcomers", "others", "time_ms")

    def __init__(self) -> None:
        self.newcomers = self.others = 0.0
        self.time_ms = 0

    def takes(self, new: bool, time_ms: int, ratio: float) -> bool:
        if time_ms > self.time_ms:
            decay = math.exp((self.time_ms - time_ms) / WINDOW_MS)
            self.newcomers, self.others, self.time_ms = self.newcomers * decay, self.others * decay, time_ms
        if not new:
            self.others += 1
            return True
        if self.newcomers + 1 > ratio * self.others + FREE:
            return False
        self.newcomers += 1
        return True
