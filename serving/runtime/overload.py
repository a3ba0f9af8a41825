"""What is left out when the load is too high, and when."""

from __future__ import annotations

import sys
from enum import IntEnum


class Level(IntEnum):
    """Steps of degradation, each cheaper than the one before."""

    FULL = 0
    FEWER = 1
    RETRIEVED = 2
    POPULAR = 3

    def status(self, ranked: int, candidates: int) -> str:
        """What STATUS says of it; "" for FULL."""
        reasons = {
            Level.FEWER: f"load: {ranked} of {candidates} candidates ranked",
            Level.RETRIEVED: "load: retrieval order, not ranked",
            Level.POPULAR: "load: popular items",
        }
        return reasons.get(self, "")


class Overload:
    """Which level to serve at, from the size of the batches that an instance is handed: they are what came while the
    one before was worked on; and from how long batches took.

    ``patience_s`` of nothing but batches of ``rows`` and more is one step down. ``calm_s`` without any is a step up, if
    what came in that time would leave the level above some of the instance's time (``BUSY``). Against that estimate
    a step up is tried after a longer calm, which doubles up to ``longest_s`` with each that does not last. ``rows`` 0:
    always whole.
    """

    BUSY = 0.7

    def __init__(self, rows: int, patience_s: float = 0.1, calm_s: float = 0.5, longest_s: float = 30.0) -> None:
        self.on, self.rows = rows > 0, rows or sys.maxsize
        self.patience_s, self.first_calm_s, self.longest_s = patience_s, calm_s, longest_s
        self.level, self.calm_s = Level.FULL, calm_s
        self.row_s: dict[Level, float] = {}
        self.spread_s: dict[Level, float] = {}
        self._full_since: float | None = None
        self._calm_since: float | None = None
        self._came = 0
        self._raised_at = float("-inf")

    def done(self, level: Level, rows: int, seconds: float) -> None:
        """A batch of ``rows`` took ``seconds``. Small ones are left out: they cost more a row."""
        if rows >= min(self.rows, 8):
            row_s = seconds / rows
            mean_s = self.row_s.get(level, row_s)
            self.spread_s[level] = 0.75 * self.spread_s.get(level, 0.0) + 0.25 * abs(row_s - mean_s)
            self.row_s[level] = 0.8 * mean_s + 0.2 * row_s

    def needs(self, level: Level, rows: int) -> float:
        """Seconds that a batch takes by the mean; 0 if none was seen."""
        return self.row_s.get(level, 0.0) * rows

    def at_worst(self, level: Level, rows: int) -> float:
        """Seconds that few batches exceed: the mean and twice the mean deviation; 0 if none was seen."""
        return (self.row_s.get(level, 0.0) + 2 * self.spread_s.get(level, 0.0)) * rows

    def fitting(self, level: Level, rows: int, left_s: float) -> Level:
        """``level``, or the first below it at which few batches take longer than ``left_s``."""
        return next(
            (Level(n) for n in range(level, Level.POPULAR) if self.at_worst(Level(n), rows) <= left_s), Level.POPULAR
        )

    def __call__(self, rows: int, now: float) -> Level:
        """The level for a batch of ``rows`` that came at ``now`` (seconds of a clock that does not go back)."""
        if rows >= self.rows:
            self._calm_since = None
            if self._full_since is None:
                self._full_since = now
            if now - self._full_since >= self.patience_s and self.level < Level.POPULAR:
                lasted = now - self._raised_at
                self.calm_s = min(2 * self.calm_s, self.longest_s) if lasted < self.calm_s else self.first_calm_s
                self.level, self._full_since = Level(self.level + 1), now
            return self.level
        self._full_since = None
        if self._calm_since is None:
            self._calm_since, self._came = now, 0
        self._came += rows
        if self.level > Level.FULL:
            above, calm = Level(self.level - 1), now - self._calm_since
            fits = 0 < self.needs(above, self._came) <= self.BUSY * calm
            if calm >= (self.first_calm_s if fits else self.calm_s):
                self.level, self._calm_since, self._came, self._raised_at = above, now, 0, now
        return self.level
