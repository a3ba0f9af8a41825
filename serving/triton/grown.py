"""What the cache of states did, on Triton's metrics page.

Runs inside Triton's Python stub only (it imports ``triton_python_backend_utils``).
"""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from serving.runtime.grown import GROWN, HIT, MISSED, GrownHistories
from serving.triton.stage import Counts


class GrownCounts:
    """Of the cache of ``histories``: rows by what it had, and the memory it takes, which all workers share."""

    def __init__(self, histories: GrownHistories) -> None:
        self._histories = histories
        self._rows = Counts("vivace_state_cache_total", "Histories by what the cache had of them", "result")
        kinds = (
            ("vivace_state_cache_bytes", "Memory that states take", pb_utils.MetricFamily.GAUGE),
            ("vivace_state_cache_evicted_total", "Histories dropped for want of room", pb_utils.MetricFamily.COUNTER),
        )
        self._families = [pb_utils.MetricFamily(name=n, description=d, kind=k) for n, d, k in kinds]
        metrics: list[Any] = [family.Metric(labels={}) for family in self._families]
        self._bytes, self._evicted = metrics
        histories.rows.clear()  # of the warm-up
        for result in (HIT, GROWN, MISSED):
            self._rows(result, 0)

    def hand_over(self) -> None:
        """Takes what was counted away, a few times a second."""
        for result, rows in self._histories.rows.items():
            self._rows(result, rows)
        self._histories.rows.clear()
        if not self._rows.hand_over():
            return
        cache = self._histories.cache
        self._bytes.set(cache.size())
        if cache.evicted:
            self._evicted.increment(cache.evicted)
            cache.evicted = 0
