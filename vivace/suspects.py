"""Events that no person sends: too many within a minute, or of the future.

What a minute of a person holds is learned from the log when it is prepared (``most_a_minute``) and kept in the run's
manifest. Beside a server it is held to when an event came, by the server's own clock; where a log is replayed, to its
time.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

MINUTE_MS = 60_000
AHEAD_MS = 300_000  # clocks of callers may be ahead of a server's by so much
SUSPECT_MS = 600_000  # an account stays suspect for so long after the last event that was too many
FLOOR, TIMES, QUANTILE = 30, 3, 0.9999
PRUNE = 100_000  # users beyond which those that are no longer looked at are forgotten


def most_a_minute(users: np.ndarray, times_ms: np.ndarray) -> int:
    """What an account may send within a minute and be a person: TIMES the QUANTILE over users of their busiest minute,
    at least FLOOR. ``users``, ``times_ms``: of the log's events, int64 [n] in any order."""
    if not len(users):
        return FLOOR
    order = np.lexsort((times_ms, users))
    _, user = np.unique(users[order], return_inverse=True)
    times = times_ms[order] - times_ms.min()
    key = user * (int(times.max()) + 2 * MINUTE_MS) + times  # rises, and users lie more than a minute apart
    within = np.arange(len(key)) - np.searchsorted(key, key - MINUTE_MS, side="right") + 1
    busiest = np.zeros(int(user[-1]) + 1, np.int64)
    np.maximum.at(busiest, user, within)
    return max(FLOOR, int(np.ceil(TIMES * np.quantile(busiest, QUANTILE))))


@dataclass
class _Account:
    came: list[int] = field(default_factory=list)  # ms, the events of the newest minute
    until_ms: int = 0  # suspect so long


class Suspects:
    """Tells of one event after another whether it is suspect. ``most``: of an account's events within a minute (0: no
    limit)."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._accounts: dict[Hashable, _Account] = {}
        self._newest_ms, self._most = 0, PRUNE

    def why(self, user: Hashable, time_ms: int, came_ms: int = 0) -> str:
        """Why a user's event of a Unix time in ms, that came at ``came_ms`` (0: at its own time), is suspect; "" where
        it is not."""
        came_ms = came_ms or time_ms
        if time_ms > came_ms + AHEAD_MS:
            return f"its time is {(time_ms - came_ms) // 1000:,} s ahead of the server's clock"
        if not self.most:
            return ""
        if len(self._accounts) > self._most:
            self._prune()
        self._newest_ms = max(self._newest_ms, came_ms)
        account = self._accounts.setdefault(user, _Account())
        account.came = [at for at in account.came if abs(came_ms - at) < MINUTE_MS][-self.most :] + [came_ms]
        if len(account.came) > self.most:
            account.until_ms = max(account.until_ms, came_ms + SUSPECT_MS)
        if came_ms < account.until_ms:
            return f"more than {self.most} events of the user within a minute, which people do not send"
        return ""

    def _prune(self) -> None:
        since = self._newest_ms - MINUTE_MS
        self._accounts = {
            user: account
            for user, account in self._accounts.items()
            if account.until_ms > self._newest_ms or account.came[-1] > since
        }
        self._most = max(PRUNE, 2 * len(self._accounts))
