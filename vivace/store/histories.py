"""Histories of users, and how events that were appended live join those of a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from vivace.store.interface import Event
from vivace.store.retention import MAX_STORED_EVENTS

SECOND_MS = 1000


def merged(history: Sequence[Event], live: Iterable[Event]) -> list[Event]:
    """One user's ``history`` of a data set, oldest first, and ``live`` events in the order they were appended, as one
    history; the newest MAX_STORED_EVENTS of it.

    A live event that the data set has too counts once, and has its place there. The others keep their order; each goes
    behind what the data set has of its time and before.
    """
    known = Counter((event.item_id, event.timestamp_ms) for event in history)
    merged_events: list[Event] = []
    place = 0
    for event in live:
        if _take(known, event):
            continue
        while place < len(history) and history[place].timestamp_ms <= event.timestamp_ms:
            merged_events.append(history[place])
            place += 1
        merged_events.append(event)
    return [*merged_events, *history[place:]][-MAX_STORED_EVENTS:]


def _take(known: Counter[tuple[str, int]], event: Event) -> bool:
    """Whether the data set has ``event``, by its millisecond or, as logs are often exported, by its second; each of
    the data set's events stands for one live event."""
    for timestamp_ms in (event.timestamp_ms, event.timestamp_ms - event.timestamp_ms % SECOND_MS):
        if known[event.item_id, timestamp_ms] > 0:
            known[event.item_id, timestamp_ms] -= 1
            return True
    return False
