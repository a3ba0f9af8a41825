"""Which events are for training, validation and test: leave-one-out, or by time."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pandas as pd

from vivace.contract import TEST, TIME, TRAIN, USER, VALID

SPLITS = ("leave-one-out", "time")
SAMPLE = 1_000_000
DAY_MS, YEAR_MS = 86_400_000, 31_536_000_000


@dataclass(frozen=True)
class SplitConfig:
    """``kind`` "leave-one-out": each user's last event is the test, the one before the validation (users with fewer
    than three events only train). ``kind`` "time": the newest ``test_share`` of the events is the test, the
    ``valid_share`` before it the validation; each user's first event of either period is the one to predict."""

    kind: str = "leave-one-out"
    valid_share: float = 0.1
    test_share: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in SPLITS:
            raise ValueError(f"split: expected one of {SPLITS}, got {self.kind!r}")
        if not (self.valid_share > 0 and self.test_share > 0 and self.valid_share + self.test_share < 1):
            raise ValueError(f"split: expected shares above 0 that sum below 1, got {self}")

    def describe(self, times: TimeSample) -> str:
        if self.kind == "leave-one-out":
            return "leave-one-out: last event test, last but one validation"
        first_valid, first_test = times.cuts(self)
        return f"time: validation from {first_valid} ms, test from {first_test} ms"


class TimeSample:
    """Quantiles of event times over a log that is seen in chunks: a uniform reservoir sample, seeded."""

    def __init__(self) -> None:
        self._kept = np.empty(0, np.int64)
        self._rank = np.empty(0)
        self._rng = np.random.default_rng(0)

    def add(self, times_ms: np.ndarray) -> None:
        """Each value draws a rank; the SAMPLE smallest ranks stay (exact below SAMPLE values)."""
        rank = np.concatenate([self._rank, self._rng.random(len(times_ms))])
        kept = np.concatenate([self._kept, times_ms])
        if len(kept) > SAMPLE:
            stay = np.argpartition(rank, SAMPLE)[:SAMPLE]
            rank, kept = rank[stay], kept[stay]
        self._rank, self._kept = rank, kept

    def cuts(self, config: SplitConfig) -> tuple[int, int]:
        """(first validation time, first test time) in ms."""
        shares = [1 - config.test_share - config.valid_share, 1 - config.test_share]
        valid, test = np.quantile(self._kept, shares)
        return int(valid), int(test)

    def doubts(self) -> list[str]:
        """A line if half of the events lie in 1970 or in the future: then the unit is probably another."""
        median = int(np.median(self._kept))
        if YEAR_MS <= median <= time.time() * 1000 + DAY_MS:
            return []
        day = np.datetime64(median, "ms").astype("datetime64[D]")
        where = "in 1970" if median < YEAR_MS else "in the future"
        return [f"half of the events lie {where} (the median is {day}): if these are dates, time_unit is another"]


def mark(frame: pd.DataFrame, config: SplitConfig, times: TimeSample) -> np.ndarray:
    """TRAIN, VALID or TEST for each event, int8; ``frame`` is sorted by user and time and holds whole users."""
    if config.kind == "time":
        first_valid, first_test = times.cuts(config)
        time_ms = frame[TIME].to_numpy()
        return np.where(time_ms >= first_test, TEST, np.where(time_ms >= first_valid, VALID, TRAIN)).astype("int8")
    from_end = frame.groupby(USER, sort=False).cumcount(ascending=False).to_numpy()
    size = frame.groupby(USER, sort=False)[USER].transform("size").to_numpy()
    split = np.where(from_end == 0, TEST, np.where(from_end == 1, VALID, TRAIN))
    return np.where(size < 3, TRAIN, split).astype("int8")
