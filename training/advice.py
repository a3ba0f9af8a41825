"""Which preset suits a data set, from its sizes and from what answers its validation requests: what ``vivace train``
takes where none is named."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from preprocessing.features import Features
from preprocessing.splits import YEAR_MS
from training.models.encoders import EncoderConfig
from vivace.contract import FIRST_ID, ITEM, TARGET, TARGET_TIME, TEXT, TIME
from vivace.counters import WindowCounts

LONG = 40  # training events of the median user from which a history of 200 is worth its cost
SPARSE = 25.0  # training events an item below which items say little by their id alone
MANY_ITEMS = 20_000  # from which the softmax over all items is drawn from a sample
SHORT = 10  # training events of the median user up to which a log may be one of sessions
AGAIN = 0.05  # share of the events on an item the user had before from which such a log, without text, counts as one
FRESH = 1.5  # times that the last hour's most clicked must be right as often as those of all time
FRESH_HITS = 0.1  # and the least share of requests that they answer
JUDGED = 2_000  # validation requests that say so
LEAST_JUDGED = 200  # fewer say nothing
HOUR_MS = 3_600_000
TOP = 10
LEAST_EVENTS = 0.1  # training events a weight of the encoder; on ML-1M 1.6 (``base``) did well, .04 (``large``) did not
GAPS = 0.05  # share of different gaps between events below which times are made up


@dataclass(frozen=True)
class LogSizes:
    """What the choice goes by. ``events``: training events of the median user; ``times``: whether the log's times are
    real ones; ``sessions``: whether its users are sessions, as it says or as its items come again; ``hour_hits`` and
    ``ever_hits``: the share of validation requests answered by the ten items clicked most in the hour before, and in
    all the time before; ``listed_again``: short histories whose items come again and have attributes of several
    values."""

    users: int
    items: int
    total: int
    events: float
    times: bool
    sessions: bool = False
    hour_hits: float = 0.0
    ever_hits: float = 0.0
    listed_again: bool = False

    @property
    def fresh(self) -> bool:
        """Whether what is clicked now says far more than what is popular."""
        return self.times and self.hour_hits >= max(FRESH_HITS, FRESH * self.ever_hits)

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
    again = not schema.exclude_seen and events <= SHORT and total - once > AGAIN * total
    repeats = again and not pc.any(pc.not_equal(pq.read_table(features.items_file, columns=[TEXT])[TEXT], "")).as_py()
    real = newest > YEAR_MS and distinct > GAPS * gaps
    hour, ever = hits_of_the_popular(features) if real else (0.0, 0.0)
    return LogSizes(
        users=len(every), items=features.item_count() - FIRST_ID, total=total, events=events, times=real,
        sessions=schema.sessions or repeats, hour_hits=hour, ever_hits=ever,
        listed_again=again and bool(schema.item_lists),
    )  # fmt: skip


def hits_of_the_popular(features: Features) -> tuple[float, float]:
    """HR@10 of what was clicked most in the hour before, and of what was in all the time before, over up to JUDGED
    validation requests, evenly by time: counts of the events strictly before each. Only of requests whose target the
    user had not had before: where few click, the hour's most clicked are that user's own."""
    tables = [pq.read_table(file, columns=[ITEM, TARGET, TARGET_TIME]) for file in features.files("valid")]
    table = pa.concat_tables(tables).combine_chunks()
    targets, moments = (table[name].to_numpy() for name in (TARGET, TARGET_TIME))
    had = [target in history for target, history in zip(targets.tolist(), table[ITEM].to_pylist(), strict=True)]
    targets, moments = targets[~np.array(had, bool)], moments[~np.array(had, bool)]
    if len(targets) < LEAST_JUDGED:
        return 0.0, 0.0
    order = np.argsort(moments, kind="stable")
    order = order[np.unique(np.linspace(0, len(order) - 1, min(JUDGED, len(order))).astype(np.int64))]
    stream, items = features.events(), features.item_count()
    counts = [WindowCounts(items, HOUR_MS), WindowCounts(items, max(int(moments.max(initial=0)), 1))]
    fed, hits = 0, np.zeros(2)
    for request in order:
        until = int(np.searchsorted(stream[TIME], moments[request]))
        for place, count in enumerate(counts):
            count.add(stream[ITEM][fed:until], stream[TIME][fed:until])
            hits[place] += targets[request] in count.top(TOP, int(moments[request]))
        fed = until
    hour, ever = hits / max(len(order), 1)
    return float(hour), float(ever)


def suited(log: LogSizes) -> tuple[str, str]:
    """(preset, why in one line) for a log."""
    size = (
        f"{log.items:,} items with {log.events_per_item:.0f} events each, {log.events:.0f} events for half of the users"
    )
    if log.sessions:
        return "session", f"{size}: sessions, whose items come again"
    if log.listed_again:
        return "music", f"{size}: items with tags come again"
    if log.fresh and log.events < LONG:
        now = (
            f"what was clicked most in the last hour is hit by {log.hour_hits:.0%}, of all time by {log.ever_hits:.0%}"
        )
        return "news-live", f"{size}; {now}: live counters"
    if log.events_per_item < SPARSE:
        return "beauty", f"{size}: a sparse log"
    if log.events >= LONG:
        return "cpu", f"{size}: long histories"
    if log.items >= MANY_ITEMS:
        name = "news-time" if log.times else "news"
        return name, f"{size}: short histories of many items, {'with' if log.times else 'without'} real times"
    return "shop", f"{size}: short histories"


def outsized(encoder: EncoderConfig, events: int) -> str:
    """What to say where an encoder has far more weights than its log has training events; "" elsewhere. Weights are
    those of the blocks' products, without items and biases."""
    inner = encoder.heads * encoder.of_head
    weights = encoder.layers * 2 * encoder.width * (2 * inner + encoder.of_ffn)
    if events >= LEAST_EVENTS * weights:
        return ""
    return (
        f"retriever: {weights / 1e6:.1f} million weights beside the items for {events:,} training events; on ML-1M a "
        "model so large was behind a smaller one: train --preset base beside it and compare"
    )
