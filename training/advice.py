"""Which preset suits a data set, from its sizes alone: what ``vivace train`` takes where none is named."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from preprocessing.features import Features
from preprocessing.splits import YEAR_MS
from vivace.contract import FIRST_ID, ITEM, TEXT, TIME

LONG = 40  # training events of the median user from which a history of 200 is worth its cost
SPARSE = 25.0  # training events an item below which items say little by their id alone
MANY_ITEMS = 20_000  # from which the softmax over all items is drawn from a sample
SHORT = 10  # training events of the median user up to which a log may be one of sessions
AGAIN = 0.05  # share of the events on an item the user had before from which such a log, without text, counts as one
GAPS = 0.05  # share of different gaps between events below which times are made up


@dataclass(frozen=True)
class LogSizes:
    """What the choice goes by. ``events``: training events of the median user; ``times``: whether the log's times are
    real ones; ``sessions``: whether its users are sessions, as it says or as its items come again."""

    users: int
    items: int
    total: int
    events: float
    times: bool
    sessions: bool = False

    @property
    def events_per_item(self) -> float:
        return self.total / max(self.items, 1)


def sizes_of(features: Features) -> LogSizes:
    """Reads the training sequences. Raises ValueError where another version wrote them."""
    lengths, gaps, distinct, newest, once = [], 0, 0, 0, 0
    for file in features.files("train"):
        table = pq.read_table(file, columns=[ITEM, TIME])
        lengths.append(pc.list_value_length(table[ITEM]).to_numpy())
        owner = np.repeat(np.arange(len(lengths[-1])), lengths[-1])
        once += len(np.unique(owner * features.item_count() + pc.list_flatten(table[ITEM]).to_numpy()))
        times = pc.list_flatten(table[TIME]).to_numpy()
        steps = np.diff(times[:100_000])
        gaps, distinct = gaps + len(steps), distinct + len(np.unique(steps))
        newest = max(newest, int(times.max(initial=0)))
    every, schema = np.concatenate([*lengths, np.empty(0, np.int64)]), features.schema
    total, events = int(every.sum()), float(np.median(every)) if len(every) else 0.0
    repeats = not schema.exclude_seen and events <= SHORT and total - once > AGAIN * total
    repeats = repeats and not pc.any(pc.not_equal(pq.read_table(features.items_file, columns=[TEXT])[TEXT], "")).as_py()
    return LogSizes(
        users=len(every), items=features.item_count() - FIRST_ID, total=total, events=events,
        times=newest > YEAR_MS and distinct > GAPS * gaps, sessions=schema.sessions or repeats,
    )  # fmt: skip


def suited(log: LogSizes) -> tuple[str, str]:
    """(preset, why in one line) for a log."""
    size = (
        f"{log.items:,} items with {log.events_per_item:.0f} events each, {log.events:.0f} events for half of the users"
    )
    if log.sessions:
        return "session", f"{size}: sessions, whose items come again"
    if log.events_per_item < SPARSE:
        return "beauty", f"{size}: a sparse log"
    if log.events >= LONG:
        return "cpu", f"{size}: long histories"
    if log.items >= MANY_ITEMS:
        name = "news-time" if log.times else "news"
        more = "; where a server is told of events, 'news-live' reads what is clicked most now" if log.times else ""
        return name, f"{size}: short histories of many items, {'with' if log.times else 'without'} real times{more}"
    return "shop", f"{size}: short histories"
