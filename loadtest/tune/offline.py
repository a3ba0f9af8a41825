"""What the tuner measures without a server: quality and time of the graphs that are served, on recorded requests."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np

from loadtest.tune.space import TOP_K
from preprocessing.requests import recorded, requests_of
from serving.runtime.pipeline import Pipeline
from serving.runtime.stages import Row, parse_row
from training.metrics import MISS, bootstrap, ndcg_of
from vivace import contract
from vivace.client_request import request_tensors
from vivace.context import ContextColumns

BATCHES = (1, 2, 4, 8, 16, 32)


def rows_of(root: Path, columns: ContextColumns, part: str = "test", most: int | None = None) -> list[Row]:
    """The first ``most`` recorded requests (None: all), parsed as those of callers are, of nobody known: what the store
    knows of their users is in their context, whose ``columns`` are the served version's."""
    frame, rows = recorded(root, part), []
    for request in requests_of(frame.head(most or len(frame))):
        given = request_tensors(history=request.history, context=request.context)
        sent = {tensor.name: value[0] for tensor, value in given}
        context = sent[contract.CONTEXT_OF_REQUEST.name][0] if request.context else b""
        rows.append(parse_row(b"", b"", sent[contract.HISTORY.name], TOP_K, context, columns))
    return rows


def gains(pipeline: Pipeline, root: Path, part: str = "valid") -> list[float]:
    """NDCG@10 of each recorded request's target in the answers of the served graphs. What is chosen is chosen on the
    validation requests; those of the "test" are for a last look at what was chosen."""
    rows, ranks = rows_of(root, pipeline.transform.moment.columns, part), []
    targets = pipeline.transform.item_ids(recorded(root, part)[contract.TARGET].tolist())
    for start in range(0, len(rows), 32):
        (ids, _), _, _ = pipeline(rows[start : start + 32])
        target_B = targets[start : start + 32]
        hit_BK = (ids[:, :TOP_K] == target_B[:, None]) & (target_B >= contract.FIRST_ID)[:, None]
        ranks.append(np.where(hit_BK.any(1), hit_BK.argmax(1), MISS))
    return [round(float(g), 4) for g in ndcg_of(np.concatenate(ranks))]


def share_kept(whole: np.ndarray, other: np.ndarray) -> tuple[float, tuple[float, float]]:
    """NDCG@10 of ``other`` as a share of ``whole``'s, with its 95 % interval: float64 gains of the same requests, in
    the same order; the interval is that of their differences, request by request."""
    low, high = bootstrap(other - whole)
    mean = max(float(whole.mean()), 1e-12)
    return 1 + float((other - whole).mean()) / mean, (1 + low / mean, 1 + high / mean)


def service_times(pipeline: Pipeline, root: Path) -> dict[str, float]:
    """Milliseconds of a batch by its size, alone in this process: the median of repeats."""
    rows, times_by_size = rows_of(root, pipeline.transform.moment.columns, most=200), {}
    for size in BATCHES:
        batch = list(itertools.islice(itertools.cycle(rows), size))
        pipeline(batch)
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < 5 or time.perf_counter() - began < 0.15:
            t = time.perf_counter()
            pipeline(batch)
            times.append((time.perf_counter() - t) * 1000)
        times_by_size[str(size)] = round(float(np.median(times)), 4)
    return times_by_size
