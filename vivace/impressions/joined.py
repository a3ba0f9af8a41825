"""What was shown beside what came of it: impressions and the live events that name their requests, a row a shown item.

An event belongs to an item that was shown if request id, user and item are the same.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vivace.columns import CLICKED, EVENT, ITEM, POSITION
from vivace.impressions.files import (
    CONTEXT,
    DRAFTED_FROM,
    ITEMS,
    LATENCY,
    MODEL_VERSION,
    PROPENSITIES,
    QUERY,
    REQUEST_ID,
    SCHEMA,
    SCORES,
    SESSION,
    STATUS,
    TEAM,
    TIME,
    USER,
    VARIANT,
    completed,
    locked,
    parts,
)
from vivace.store.interface import Event, FeatureStore

SCORE, PROPENSITY, EVENT_TIME = "score", "propensity", "event_ms"
OF_REQUEST = (REQUEST_ID, USER, SESSION, TIME, VARIANT, MODEL_VERSION, CONTEXT, QUERY, LATENCY, STATUS)
JOINED = pa.schema(
    [
        *(SCHEMA.field(name) for name in OF_REQUEST),
        (ITEM, pa.string()),
        (POSITION, pa.int32()),  # from 1
        (SCORE, pa.float32()),
        (PROPENSITY, pa.float32()),
        (CLICKED, pa.bool_()),  # whether there is an event of it
        (EVENT, pa.string()),  # type of the first; null where there is none
        (EVENT_TIME, pa.int64()),  # and when it was, Unix ms
        (TEAM, pa.string()),  # version that a click on it speaks for; "" for none
        *(SCHEMA.field(name) for name in DRAFTED_FROM),  # at the first place of a draft; null elsewhere
    ]
)
LOG_EVENTS = 5_000_000  # of the store's log that are looked at, the newest
ROWS = 50_000  # requests at once


@dataclass
class Counts:
    """What was joined. ``strays``: events with a request id that no shown item has."""

    requests: int = 0
    empty: int = 0
    shown: int = 0
    clicked: int = 0
    strays: int = 0


class Events:
    """Events by (request id, user, item), the first of each; ``types``: only those (all if empty). That an item was
    shown is no event of it."""

    def __init__(self, events: Iterable[Event], types: Collection[str] = ()) -> None:
        self.by_key: dict[tuple[str, str, str], Event] = {}
        for event in events:
            if event.request_id and not event.shown and (not types or event.event_type in types):
                self.by_key.setdefault((event.request_id, event.user_id, event.item_id), event)
        self.requests = pa.array(sorted({key[0] for key in self.by_key}), pa.string())
        self.matched: set[tuple[str, str, str]] = set()

    def join(self, table: pa.Table) -> pa.Table:
        """``table`` (``files.SCHEMA``) as ``JOINED``."""
        lists = table[ITEMS].combine_chunks()
        parents = pc.list_parent_indices(lists)
        starts = np.cumsum([0, *pc.list_value_length(lists).to_numpy(zero_copy_only=False)])[:-1].astype(np.int64)
        of_request = table.select(OF_REQUEST).take(parents)
        items = pc.list_flatten(lists)
        position = np.arange(len(items)) - starts[parents.to_numpy()] + 1
        clicked = np.zeros(len(items), bool)
        kinds: list[str | None] = [None] * len(items)
        times: list[int | None] = [None] * len(items)
        maybe = pc.is_in(of_request[REQUEST_ID], value_set=self.requests).combine_chunks()
        places = np.flatnonzero(maybe.to_numpy(zero_copy_only=False))
        columns = (of_request[REQUEST_ID], of_request[USER], items)
        keys = zip(*(column.take(pa.array(places)).to_pylist() for column in columns), strict=True)
        for place, key in zip(places.tolist(), keys, strict=True):
            if (event := self.by_key.get(key)) is not None:
                clicked[place], kinds[place], times[place] = True, event.event_type, event.timestamp_ms
                self.matched.add(key)
        scores, propensities, teams = (
            pc.list_flatten(table[name].combine_chunks()) for name in (SCORES, PROPENSITIES, TEAM)
        )
        drafted = pc.list_value_length(table[DRAFTED_FROM[0]].combine_chunks()).to_numpy(zero_copy_only=False) > 0
        told = pa.array(parents.to_numpy(), mask=(position != 1) | ~drafted[parents.to_numpy()])
        rankings = [table[name].combine_chunks().take(told) for name in DRAFTED_FROM]
        own = [items, position, scores, propensities, clicked, kinds, times, teams, *rankings]
        typed = [
            column if isinstance(column, pa.Array | pa.ChunkedArray) else pa.array(column, field.type)
            for column, field in zip(own, list(JOINED)[len(OF_REQUEST) :], strict=True)
        ]
        return pa.Table.from_arrays([*of_request.columns, *typed], schema=JOINED)


def _tables(folder: Path) -> Iterator[pa.Table]:
    for path in parts(folder):
        for batch in pq.ParquetFile(path).iter_batches(ROWS):
            yield completed(pa.Table.from_batches([batch]))


def join(folder: Path, store: FeatureStore, out: Path, types: Collection[str] = ()) -> Counts:
    """Writes ``out``, a Parquet of ``JOINED``, whole or not at all. Raises FileNotFoundError where nothing was
    logged, ValueError for a type that no event has."""
    if not folder.is_dir() or not parts(folder):
        raise FileNotFoundError(f"{folder}: nothing was logged yet; serve with --impressions, and wait for a minute")
    log = store.live_events(0, most=LOG_EVENTS)[1]
    kinds = {event.event_type for event in log if event.request_id and not event.shown}
    if unknown := sorted(set(types) - kinds):
        there = ", ".join(sorted(kinds)) or "none"
        raise ValueError(f"--event {unknown[0]}: no event that names a request has that type; there are: {there}")
    events, counts = Events(log, types), Counts()
    partial = out.with_name(f"{out.name}.partial")
    handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file, pq.ParquetWriter(file, JOINED, compression="zstd") as writer, locked(folder):
        for table in _tables(folder):
            joined = events.join(table)
            writer.write_table(joined)
            counts.requests += len(table)
            counts.empty += pc.sum(pc.equal(pc.list_value_length(table[ITEMS]), 0)).as_py() or 0
            counts.shown += len(joined)
            counts.clicked += pc.sum(joined[CLICKED]).as_py() or 0
    os.replace(partial, out)
    counts.strays = len(events.by_key) - len(events.matched)
    return counts
