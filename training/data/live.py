"""What live counters said at the moment of each request: a replay of the log, exactly the events strictly before it.

Axis legend: R requests of a part, B of a batch, M rising items, F features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import torch

from preprocessing.features import Features
from preprocessing.splits import YEAR_MS
from training.data.batches import Requests
from vivace.contract import ITEM, LIVE_FEATURES, TARGET_TIME, TIME, USER
from vivace.live import LiveTable, entries

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


def check_live(features: Features, rising: int, control: bool = False) -> None:
    """Raises ValueError where a ranker with live counters (``ranker.rising`` above 0) cannot be trained. ``control``: a
    control of it, on training events, is wanted too."""
    if not rising:
        return
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
    """Rising items and their features at the moments of a part's requests, by the requests' numbers.

    Args:
        part: "valid" or "test"; requests made of training events have none, as a retriever has learned those.
    """

    def __init__(self, features: Features, part: str, rising: int) -> None:
        files = features.files(part)
        self.moments = np.concatenate(
            [np.empty(0, np.int64), *(pq.read_table(f, columns=[TARGET_TIME])[TARGET_TIME].to_numpy() for f in files)]
        )
        stream, table = features.events(), LiveTable(features.item_count(), rising)
        ids, times = stream[ITEM], stream[TIME]
        entry = entries(stream[USER], times)
        self.ids = np.zeros((len(self.moments), rising), np.int32)
        self.features = np.zeros((len(self.moments), rising, LIVE_FEATURES), np.float16)
        fed, step = 0, -1
        rows: tuple[np.ndarray, np.ndarray] = (self.ids[:0], self.features[:0])
        for request in np.argsort(self.moments, kind="stable"):
            moment = int(self.moments[request])
            if moment // STEP_MS != step:
                step = moment // STEP_MS
                until = step * STEP_MS
                stop = int(np.searchsorted(times, until))
                table.add(ids[fed:stop], times[fed:stop], entry[fed:stop])
                fed, rows = stop, table.at(until)
            self.ids[request], self.features[request] = rows

    def of(self, request: Requests) -> Requests:
        """The same requests with what was rising."""
        numbers = request.number_B.numpy()
        return replace(
            request,
            rising_BM=torch.from_numpy(self.ids[numbers].astype(np.int64)),
            live_BMF=torch.from_numpy(self.features[numbers].astype(np.float32)),
        )


def with_live(requests: Iterable[Requests], features: Features, part: str, rising: int) -> Iterator[Requests]:
    """Requests of a part, in the order of its files, with what was rising; as they are where ``rising`` is 0."""
    if not rising:
        yield from requests
        return
    live = LiveAt(features, part, rising)
    for request in requests:
        yield live.of(request)
