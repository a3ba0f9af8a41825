"""Which preset suits a data set, from its sizes alone: what ``vivace train`` takes where none is named."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from preprocessing.features import Features
from vivace.contract import FIRST_ID, ITEM, TIME

LONG = 40  # training events of the median user from which a history of 200 is worth its cost
SPARSE = 25.0  # training events an item below which items say little by their id alone
MANY_ITEMS = 20_000  # from which the softmax over all items is drawn from a sample
YEAR_MS = 31_536_000_000
GAPS = 0.05  # share of different gaps between events below which times are made up


@dataclass(frozen=True)
class LogSizes:
    """What the choice goes by. ``events``: training events of the median user; ``times``: whether the log's times are
    real ones."""

    users: int
    items: int
    total: int
    events: float
    times: bool

    @property
    def events_per_item(self) -> float:
        return self.total / max(self.items, 1)


def sizes_of(features: Features) -> LogSizes:
    """Reads the training sequences. Raises ValueError where another version wrote them."""
    lengths, gaps, distinct, newest = [], 0, 0, 0
    for file in features.files("train"):
        table = pq.read_table(file, columns=[ITEM, TIME])
        lengths.append(pc.list_value_length(table[ITEM]).to_numpy())
        times = pc.list_flatten(table[TIME]).to_numpy()
        steps = np.diff(times[:100_000])
        gaps, distinct = gaps + len(steps), distinct + len(np.unique(steps))
        newest = max(newest, int(times.max(initial=0)))
    every = np.concatenate([*lengths, np.empty(0, np.int64)])
    return LogSizes(
        users=len(every), items=features.item_count() - FIRST_ID, total=int(every.sum()),
        events=float(np.median(every)) if len(every) else 0.0,
        times=newest > YEAR_MS and distinct > GAPS * gaps,
    )  # fmt: skip


def suited(log: LogSizes) -> tuple[str, str]:
    """(preset, why in one line) for a log."""
    size = (
        f"{log.items:,} items with {log.events_per_item:.0f} events each, {log.events:.0f} events for half of the users"
    )
    if log.events_per_item < SPARSE:
        return "beauty", f"{size}: a sparse log"
    if log.events >= LONG:
        return "cpu", f"{size}: long histories"
    if log.items >= MANY_ITEMS:
        name = "news-time" if log.times else "news"
        more = "; where a server is told of events, 'news-live' reads what is clicked most now" if log.times else ""
        return name, f"{size}: short histories of many items, {'with' if log.times else 'without'} real times{more}"
    return "shop", f"{size}: short histories"
