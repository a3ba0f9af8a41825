"""What live counters said at the moment of each request: a replay of the log, exactly the events strictly before it.

Axis legend: R requests of a part, B of a batch, M rising items, F features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from preprocessing.events import user_hash
from preprocessing.features import Features
from preprocessing.splits import YEAR_MS
from training.data.batches import Requests
from vivace.context import ContextColumns
from vivace.contract import (
    ITEM,
    NULL_ID,
    PADDING_ID,
    TARGET_TIME,
    TIME,
    USER,
    StageTensors,
    live_features,
    target_column,
)
from vivace.limits import CountLimits
from vivace.live import VISIT_GAP_MS, LiveTable
from vivace.live_shown import ShownStream

FED_AT_ONCE = 4_096  # events of a log that are put into the table together
REQUESTS = 256  # that are seen together at most
STEP_MS = 5_000  # requests of so long see the same counts, those at its beginning: a server's are no fresher by much


def check_times(features: Features) -> None:
    """Raises ValueError where the events have no times that counters can go by."""
    times = features.events()[TIME]
    if not len(times) or times[-1] < YEAR_MS or times[0] == times[-1]:
        got = f"{len(times):,} events of {times[0]} to {times[-1]}" if len(times) else "no event"
        raise ValueError(
            f"{features.folder}: live counters: expected events with real times that differ, Unix ms, got {got}; name "
            "the time column in the mapping and prepare again"
        )


def check_live(features: Features, rising: int, control: bool = False, shown: bool = False) -> None:
    """Raises ValueError where a ranker with live counters (``ranker.rising`` above 0) cannot be trained. ``control``: a
    control of it, on training events, is wanted too; ``shown``: it reads how often items were shown."""
    if not rising:
        return
    if shown and not features.has_shown():
        named = ", ".join(features.schema.shown_types) or "none"
        raise ValueError(
            f"{features.folder}: ranker.shown_rates: expected events of types that say what was shown, found none; the "
            f"mapping names {named} under shown_types: name them there and prepare again, or leave ranker.shown_rates "
            "out"
        )
    if control:
        raise ValueError(
            f"--control: expected a ranker without live counters, got ranker.rising {rising}: what its retriever says "
            "of training events is hindsight"
        )
    check_times(features)
    if not features.files("valid"):
        raise ValueError(
            f"{features.folder}: ranker.rising {rising}: expected validation requests, found none: no user has three "
            "events; prepare more data, or train with ranker.rising 0"
        )


class LiveAt:
    """Rising items and their features at the moments of requests, by the requests' numbers.

    Args:
        moments_R: Unix ms int64 [R], in any order.
        context_RC: ids int64 [R, C] of the columns that are counted by.
        newest_R: the newest item int64 [R] of each request's history, PADDING_ID without one.
        columns: of the context (None: none is counted by).
        impressions: where the counters say how often items were shown: all of the log's (None: they do not).
        own: of them those of the requests' own users. A request is made before its answer is seen, but its moment is
            that of the click that came of it: what its user was shown in the ``VISIT_GAP_MS`` before is left out, as a
            server could not know it (None: nothing is known of the users).
    """

    def __init__(
        self,
        features: Features,
        moments_R: np.ndarray,
        context_RC: np.ndarray,
        newest_R: np.ndarray,
        rising: int,
        columns: ContextColumns | None = None,
        limits: CountLimits | None = None,
        impressions: ShownStream | None = None,
        own: _OfUsers | None = None,
    ) -> None:
        columns = columns or ContextColumns()
        counted, shown = len(columns.counted), impressions is not None
        impressions = impressions or ShownStream.none()
        stream = features.stream(columns, limits, int(moments_R.max(initial=0)))
        table = LiveTable(features.item_count(), rising, counted, shown=shown)
        self.ids = np.zeros((len(moments_R), rising), np.int32)
        self.features = np.zeros((len(moments_R), rising, live_features(counted, shown)), np.float16)
        order = np.argsort(moments_R, kind="stable")
        steps = moments_R[order] // STEP_MS
        fed, fed_shown = 0, 0
        for of_step in np.split(order, np.flatnonzero(np.diff(steps)) + 1) if len(order) else ():
            until = int(moments_R[of_step[0]]) // STEP_MS * STEP_MS
            # many at once cost less than a few at a time: those of later wait in the table, and an item that counts at
            # a moment was first clicked before it
            if fed < (stop := int(np.searchsorted(stream.times_ms, until))):
                stop = max(stop, fed + FED_AT_ONCE)
                stream[fed:stop].into(table)
                fed = min(stop, len(stream))
            if fed_shown < (stop := int(np.searchsorted(impressions.times_ms, until))):
                stop = max(stop, fed_shown + FED_AT_ONCE)
                table.add_shown(impressions.ids[fed_shown:stop], impressions.times_ms[fed_shown:stop])
                fed_shown = min(stop, len(impressions))
            rows = table.rows(until)
            for requests, without in _alike(of_step, moments_R, own, until):
                of_requests = rows.of(context_RC[requests], newest_R[requests], without)
                self.ids[requests], self.features[requests] = of_requests

    @classmethod
    def of_part(
        cls,
        features: Features,
        part: str,
        rising: int,
        columns: ContextColumns | None = None,
        limits: CountLimits | None = None,
        shown: bool = False,
        most: int | None = None,
        nobody: bool = False,
    ) -> LiveAt:
        """``part``: "valid" or "test"; requests made of training events have none, as a retriever has learned those.
        ``shown``: whether the counters say how often items were shown. ``most``: only of its first requests, so
        many. ``nobody``: of someone unknown at the same moments, without history or context."""
        files, columns = features.files(part), columns or ContextColumns()
        moments = [pq.read_table(f, columns=[TARGET_TIME])[TARGET_TIME].to_numpy() for f in files]
        names = [target_column(columns.categoricals[i]) for i in columns.counted]
        moments_R = np.concatenate([np.empty(0, np.int64), *moments])[:most]
        context_RC, newest_R = _context(files, names)[:most], _newest(files)[:most]
        if nobody:
            context_RC, newest_R = np.full_like(context_RC, NULL_ID), np.full_like(newest_R, PADDING_ID)
        impressions = features.shown(limits) if shown else None
        own = None if impressions is None else _OfUsers(impressions, files)
        return cls(features, moments_R, context_RC, newest_R, rising, columns, limits, impressions, own)

    @classmethod
    def of_histories(
        cls, features: Features, moments_R: np.ndarray, histories: Sequence[np.ndarray], tensors: StageTensors,
        context_RC: np.ndarray | None = None,
    ) -> LiveAt:  # fmt: skip
        """At moments int64 [R] after ``histories`` of ids int64 [n], in contexts of ids int64 [R, all columns] (None:
        nothing is known of them)."""
        columns = features.context if tensors.counted else ContextColumns()
        if context_RC is None:
            context_RC = np.full((len(histories), len(columns.categoricals)), NULL_ID)
        context_RC = context_RC[:, columns.counted]
        newest_R = np.array([history[-1] if len(history) else PADDING_ID for history in histories], np.int64)
        limits = CountLimits.of(tensors)
        impressions = features.shown(limits) if tensors.shown else None
        return cls(features, moments_R, context_RC, newest_R, tensors.rising, columns, limits, impressions)

    def of(self, request: Requests) -> Requests:
        """The same requests with what was rising."""
        numbers = request.number_B.numpy()
        return replace(
            request,
            rising_BM=torch.from_numpy(self.ids[numbers].astype(np.int64)),
            live_BMF=torch.from_numpy(self.features[numbers].astype(np.float32)),
        )


def _alike(
    requests: np.ndarray, moments_R: np.ndarray, own: _OfUsers | None, until_ms: int
) -> Iterator[tuple[np.ndarray, ShownStream | None]]:
    """The requests int64 [n] of a step in groups of which the same impressions do not count: (their numbers, those)."""
    if own is None:
        yield from ((requests[n : n + REQUESTS], None) for n in range(0, len(requests), REQUESTS))
        return
    without = [own.before(int(r), int(moments_R[r]) - VISIT_GAP_MS, until_ms) for r in requests]
    nothing = requests[[not len(shown) for shown in without]]
    yield from ((nothing[n : n + REQUESTS], None) for n in range(0, len(nothing), REQUESTS))
    for request, shown in zip(requests, without, strict=True):
        if len(shown):
            yield np.array([request]), shown


class _OfUsers:
    """What the users of requests were shown, by the requests' numbers."""

    def __init__(self, shown: ShownStream, files: list[Path]) -> None:
        self._users = np.concatenate(
            [np.empty(0, np.int64), *(user_hash(pq.read_table(f, columns=[USER])[USER].to_numpy()) for f in files)]
        )
        self._shown = shown[np.argsort(shown.users, kind="stable")]  # of one user by time

    def before(self, request: int, since_ms: int, until_ms: int) -> ShownStream:
        """What the request's user was shown from ``since_ms`` to before ``until_ms``."""
        user, all_shown = self._users[request], self._shown
        start, stop = np.searchsorted(all_shown.users, user, "left"), np.searchsorted(all_shown.users, user, "right")
        times = all_shown.times_ms[start:stop]
        first, last = np.searchsorted(times, since_ms), np.searchsorted(times, until_ms)
        return all_shown[start + first : start + last]


def _context(files: list[Path], names: list[str]) -> np.ndarray:
    """Ids int64 [R, C] of columns of all requests."""
    parts = [pq.read_table(f, columns=[*names, TARGET_TIME]) for f in files]
    none = np.empty((sum(map(len, parts)), 0), np.int64)
    columns = [np.concatenate([t[name].to_numpy() for t in parts])[:, None] for name in names]
    return np.concatenate([none, *columns], 1)


def _newest(files: list[Path]) -> np.ndarray:
    """The newest item int64 [R] of each request's history."""
    parts = [pq.read_table(f, columns=[ITEM])[ITEM].combine_chunks() for f in files]
    ends = [column.offsets.to_numpy()[1:] - column.offsets.to_numpy()[0] - 1 for column in parts]
    newest = [column.flatten().to_numpy()[end] for column, end in zip(parts, ends, strict=True)]
    return np.concatenate([np.empty(0, np.int64), *newest])


def with_live(
    requests: Iterable[Requests], features: Features, part: str, tensors: StageTensors, most: int | None = None,
    nobody: bool = False,
) -> Iterator[Requests]:  # fmt: skip
    """Requests of a part, in the order of its files, with what was rising; as they are where the ranker reads no live
    counters. ``most``: how many they are at most; ``nobody``: as ``LiveAt.of_part`` has it."""
    if not tensors.rising:
        yield from requests
        return
    columns = features.context if tensors.counted else None
    limits = CountLimits.of(tensors)
    live = LiveAt.of_part(features, part, tensors.rising, columns, limits, tensors.shown, most, nobody)
    for request in requests:
        yield live.of(request)
