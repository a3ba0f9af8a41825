"""Which requests are put aside to be computed again offline, and what of them.

Axis legend: B rows, T history events.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import numpy as np

from serving.runtime.drift import inputs_of
from serving.runtime.known import Known
from serving.runtime.stages import Row
from vivace.contract import HOUR, MAX_PARAMETER_ID_BYTES, PADDING_ID, WEEKDAY, StageTensors
from vivace.impressions.queue import row_ids
from vivace.impressions.samples import Sample, SampleWriter


class Sampling:
    """Of one worker. A request that names no id cannot be found in the log of impressions, and is not taken."""

    def __init__(self, writer: SampleWriter, shapes: StageTensors, version: str) -> None:
        self._writer, self._shapes, self._version = writer, shapes, version
        self._share = writer.options.share

    def take(self) -> bool:
        """Whether the next request is one; a draw."""
        return random.random() < self._share

    def put(self, request_id: str, rows: Sequence[Row], start: int, known: Known, inputs: Sequence[np.ndarray]) -> None:
        """Rows of one request, of which the first is row ``start`` of ``known`` and of the feature transform's
        tensors."""
        if not request_id or len(request_id.encode()) > MAX_PARAMETER_ID_BYTES:
            return
        tensors = inputs_of(self._shapes, inputs)
        for place, (row, id_) in enumerate(zip(rows, row_ids(request_id, len(rows)), strict=True), start):
            if row.query or any(name in row.context for name in (HOUR, WEEKDAY)):
                continue
            stored = known.stored.get(place) or ([], [], [])
            items = list(stored[0] if row.history is None else row.history)
            types = list((stored[1] if row.history is None else row.types or ()) or [""] * len(items))
            times = list((stored[2] if row.history is None else row.times or ()) or [0] * len(items))
            history_T, moment = tensors[0][place], tensors[1 + self._shapes.types :]
            self._writer.put(Sample(
                id_, self._version, int(time.time() * 1000), items, types, times,
                dict(known.values[place]) if known.values else {}, history_T[history_T != PADDING_ID].tolist(),
                moment[0][place].tolist() if self._shapes.context else [],
                moment[-1][place].tolist() if self._shapes.amounts else [], known.number,
            ))  # fmt: skip

    def close(self) -> None:
        self._writer.close()


def sampling_of_worker(writer: SampleWriter | None, shapes: StageTensors, version: str) -> Sampling | None:
    """None where the server does not sample, and of a run with live counters, whose moment cannot be computed again."""
    return Sampling(writer, shapes, version) if writer is not None and not shapes.rising else None
