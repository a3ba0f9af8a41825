"""The feature store as the request path sees it: what is known of a user, and the titles of items."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class StoreError(RuntimeError):
    """The store cannot keep what it was given just now; the message is for the caller."""


@dataclass(frozen=True, slots=True)
class Event:
    """One interaction. ``timestamp_ms`` is Unix time in milliseconds. ``event_id``: what its sender calls it, the same
    when it is sent again; "" where it has no name. ``context``: JSON of what was known of the moment, or ""."""

    user_id: str
    item_id: str
    event_type: str = ""
    timestamp_ms: int = 0
    event_id: str = field(default="", compare=False)
    context: str = field(default="", compare=False)


class FeatureStore(Protocol):
    """What the request path needs; every method takes many keys at once."""

    def histories(self, user_ids: Sequence[str]) -> list[list[str] | None]:
        """Item ids of each user, oldest first; None for a user who is not known."""

    def typed_histories(self, user_ids: Sequence[str]) -> list[tuple[list[str], list[str], list[int]] | None]:
        """The same with event types and times in ms: (items, types, times)."""

    def attributes(self, user_ids: Sequence[str]) -> list[dict[str, Any] | None]:
        """What the data set's table of users says of each, by column, as prepared; None where it says nothing."""

    def append(self, events: Iterable[Event]) -> dict[str, int]:
        """Adds events at the end of their users' histories; returns each user's new length. Durable on return, and kept
        when the histories are replaced by those of another data set. An event whose id its user has already sent is not
        added again."""

    def live_events(
        self, after: int, since_ms: int = 0, most: int = 500_000, until: int | None = None
    ) -> tuple[int, list[Event]]:
        """(number of the newest event that was appended, or ``until`` if that is older; those of a number above
        ``after`` and up to that one in the order they came: the ``most`` newest of those that came since
        ``since_ms``). Numbers rise; those of forgotten users are missing."""

    def event_types(self) -> set[str]:
        """Event types of the data set; empty if its events have none."""

    def titles(self, item_ids: Sequence[str]) -> list[str | None]:
        """Title of each item; None where there is none."""

    def close(self) -> None: ...
