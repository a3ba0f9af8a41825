"""A cheap model of the served stages: measured service times, a queue, batches. It proposes; live runs decide.

Requests arrive at random (Poisson); whichever instance is free first takes those that wait, up to the largest batch, or
waits for more as the batcher does. A batch of b takes what it took in process plus what the server adds to each request
and to each batch; instances beyond the cores slow each other down.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

ARRIVALS = 1500


@dataclass(frozen=True)
class Service:
    """Times in ms: ``batches`` of the graphs by batch size, ``request`` and ``batch`` what the server adds to each."""

    batches: Mapping[int, float]
    request: float = 0.5
    batch: float = 0.2

    def table(self, largest: int) -> np.ndarray:
        """Time of a batch of 0..largest."""
        sizes = sorted(self.batches)
        graphs = np.interp(np.arange(largest + 1), sizes, [self.batches[s] for s in sizes])
        if largest > sizes[-1]:
            graphs[sizes[-1] + 1 :] = self.batches[sizes[-1]] / sizes[-1] * np.arange(sizes[-1] + 1, largest + 1)
        times: np.ndarray = graphs + self.request * np.arange(largest + 1) + self.batch
        return times


@dataclass(frozen=True)
class Batcher:
    """Triton's dynamic batcher: ``largest`` batch; ``preferred`` and its doubles are sent at once, less waits up to
    ``delay_ms`` (0: for the largest)."""

    instances: int
    largest: int
    preferred: int = 0
    delay_ms: float = 0.0

    def size(self, waiting: int) -> int:
        """How many of those that wait are taken."""
        if waiting >= self.largest or not self.preferred or waiting < self.preferred:
            return min(waiting, self.largest)
        size = self.preferred
        while 2 * size <= min(waiting, self.largest):
            size *= 2
        return size


def latencies(service: Service, qps: float, batcher: Batcher, cores: int, seed: int = 7) -> np.ndarray:
    """Latency in ms of ARRIVALS requests at ``qps``."""
    instances, largest, enough = batcher.instances, batcher.largest, batcher.preferred or batcher.largest
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1000 / qps, ARRIVALS))
    times, took = arrivals.tolist(), (service.table(largest) * max(1.0, instances / cores)).tolist()
    free = [0.0] * instances
    out = np.empty(ARRIVALS)
    i = 0
    while i < ARRIVALS:
        start = max(heapq.heappop(free), times[i])
        if batcher.delay_ms:  # the batcher waits for enough, but no longer than the delay
            last = times[i + enough - 1] if i + enough <= ARRIVALS else float("inf")
            start = max(start, min(times[i] + batcher.delay_ms, last))
        stop = i + 1
        while stop < ARRIVALS and stop - i < largest and times[stop] <= start:
            stop += 1
        stop = i + batcher.size(stop - i)
        done = start + took[stop - i]
        out[i:stop] = done - arrivals[i:stop]
        heapq.heappush(free, done)
        i = stop
    return out


def knee(service: Service, batcher: Batcher, cores: int, percentile: float, ms: float) -> float:
    """The largest rate at which ``percentile`` of the latencies stays within ``ms``; 0 if none does."""
    times = service.table(batcher.largest)
    high = min(batcher.instances, cores) * batcher.largest / times[batcher.largest] * 1000 * 1.05
    low = 0.0
    for _ in range(9):
        middle = (low + high) / 2
        met = np.percentile(latencies(service, middle, batcher, cores), percentile) <= ms
        low, high = (middle, high) if met else (low, middle)
    return low
