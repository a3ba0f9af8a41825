"""How a user's history lies in the store: msgpack ``[items, event types, times in ms]``, the newest events of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import msgpack

from vivace.store.interface import Event
from vivace.store.retention import MAX_STORED_EVENTS

FILL_ROWS = 5_000  # users or titles that a fill writes in one transaction, between which events can be appended


def batches(rows: Iterable, size: int = FILL_ROWS) -> Iterator[list]:
    """``rows`` in lists of ``size``."""
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


def packed(item_ids: Sequence[str], types: Sequence[str], times: Sequence[int]) -> bytes:
    keep = slice(-MAX_STORED_EVENTS, None)
    value: bytes = msgpack.packb([list(item_ids[keep]), list(types[keep]), list(times[keep])])
    return value


def packed_events(events: Sequence[Event]) -> bytes:
    return packed(
        [e.item_id for e in events], [e.event_type for e in events], [e.timestamp_ms for e in events]
    )  # fmt: skip


def unpacked(user_id: str, value: bytes) -> list[Event]:
    return [Event(user_id, *columns) for columns in zip(*msgpack.unpackb(value), strict=True)]
