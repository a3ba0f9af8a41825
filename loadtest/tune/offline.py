"""What the tuner measures without a server: quality and time of the graphs that are served, on recorded requests."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np

from loadtest.tune.space import TOP_K
from preprocessing.requests import recorded
from serving.runtime.pipeline import Pipeline
from serving.runtime.stages import Row
from training.metrics import MISS, ndcg_of
from vivace import contract

BATCHES = (1, 2, 4, 8, 16, 32)


def gains(pipeline: Pipeline, root: Path) -> list[float]:
    """NDCG@10 of each recorded request's target in the answers of the served graphs."""
    frame, out = recorded(root), []
    targets = pipeline.transform.item_ids(frame[contract.TARGET].tolist())
    histories = frame[contract.ITEM].tolist()
    for start in range(0, len(frame), 32):
        rows = [Row("", list(h) or None, TOP_K) for h in histories[start : start + 32]]
        (ids, _), _, _ = pipeline(rows)
        own = targets[start : start + 32]
        hit = (ids[:, :TOP_K] == own[:, None]) & (own >= contract.FIRST_ID)[:, None]
        out.append(np.where(hit.any(1), hit.argmax(1), MISS))
    return [round(float(g), 4) for g in ndcg_of(np.concatenate(out))]


def service_times(pipeline: Pipeline, root: Path) -> dict[str, float]:
    """Milliseconds of a batch by its size, alone in this process: the median of repeats."""
    frame = recorded(root).head(200)
    rows = [Row("", list(h) or None, TOP_K) for h in frame[contract.ITEM]]
    found = {}
    for size in BATCHES:
        batch = list(itertools.islice(itertools.cycle(rows), size))
        pipeline(batch)
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < 5 or time.perf_counter() - began < 0.15:
            t = time.perf_counter()
            pipeline(batch)
            times.append((time.perf_counter() - t) * 1000)
        found[str(size)] = round(float(np.median(times)), 4)
    return found
