"""How long the feature store keeps what it is given: the one place for its limits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

MAX_STORED_EVENTS = 4096  # per user; older events fall off
SETTINGS = "retention.json"  # beside the store's data: {"days": 90, "live_events": 1000000}; what it leaves out is
# as below. Read when the store is opened for writing
DAY_MS = 86_400_000


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What ages out of a store. A user whose last live event ages out goes with it, unless the data set has the user;
    so the store holds the data set, at most ``live_events`` more events and their users."""

    days: int = 365
    """Live events that came longer ago go, and so do users of a data set that was filled in longer ago and who did
    nothing since (0: neither does)."""
    live_events: int = 5_000_000
    """The newest events that were appended live and join the next data set. With each goes the id by which a retry of
    it is known."""

    def __post_init__(self) -> None:
        for name, least in (("days", 0), ("live_events", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"retention, {name}: expected a whole number of at least {least}, got {value!r}")

    @classmethod
    def of(cls, folder: Path) -> Retention:
        """That of the store in ``folder``. Raises ValueError that names the file at fault."""
        file = folder / SETTINGS
        if not file.exists():
            return cls()
        try:
            return cls(**json.loads(file.read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from None

    def oldest_ms(self, now_ms: int) -> int:
        """The earliest time, Unix ms, that is kept at ``now_ms``."""
        return now_ms - self.days * DAY_MS if self.days else 0
