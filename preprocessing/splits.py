"""Which events are for training, validation and test: leave-one-out, by time, or by session."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pandas as pd

from vivace.contract import CONTEXT, GIVEN, GIVEN_TEST, SPLIT, TEST, TIME, TRAIN, USER, VALID

LEAVE_ONE_OUT, BY_TIME, SESSIONS = SPLITS = ("leave-one-out", "time", "sessions")
SAMPLE = 1_000_000
DAY_MS, YEAR_MS = 86_400_000, 31_536_000_000


@dataclass(frozen=True)
class SplitConfig:
    """``kind`` "leave-one-out": each user's last event is the test, the one before the validation (users with fewer
    than three events only train). ``kind`` "time": the newest ``test_share`` of the events is the test, the
    ``valid_share`` before it the validation; each user's first event of either period is the one to predict. ``kind``
    "sessions": a user is one session, and whole ones are held out, those that end in these periods; each of their
    events but the first is one to predict (Ludewig & Jannach 2018). Where the log brings its own test set, that is the
    test, and the newest ``valid_share`` the validation."""

    kind: str = "leave-one-out"
    valid_share: float = 0.1
    test_share: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in SPLITS:
            raise ValueError(f"split: expected one of {SPLITS}, got {self.kind!r}")
        if not (self.valid_share > 0 and self.test_share > 0 and self.valid_share + self.test_share < 1):
            raise ValueError(f"split: expected shares above 0 that sum below 1, got {self}")

    @property
    def every(self) -> bool:
        """Whether each held-out event is a request of its own."""
        return self.kind == SESSIONS

    def describe(self, times: TimeSample) -> str:
        if self.kind == LEAVE_ONE_OUT:
            return "leave-one-out: last event test, last but one validation"
        first_valid, first_test = times.cuts(self)
        if self.kind == SESSIONS:
            test = f"{times.given:,} requests that came with the log" if times.given else f"those from {first_test}"
            return f"whole sessions: those that end from {first_valid} on for validation, test: {test}"
        return f"time: validation from {first_valid} ms, test from {first_test} ms"


class TimeSample:
    """Quantiles of event times over a log that is seen in chunks: a uniform reservoir sample, seeded."""

    def __init__(self) -> None:
        self._kept = np.empty(0, np.int64)
        self._rank = np.empty(0)
        self._rng = np.random.default_rng(0)
        self.given = 0  # requests of a test set that came with the log

    def add(self, times_ms: np.ndarray, marks: pd.Series | None = None) -> None:
        """Each value draws a rank; the SAMPLE smallest ranks stay (exact below SAMPLE values). What ``marks`` say is of
        a test set is only counted."""
        if marks is not None:
            self.given += int((marks == GIVEN_TEST).sum())
            times_ms = times_ms[(marks < GIVEN).to_numpy()]
        rank = np.concatenate([self._rank, self._rng.random(len(times_ms))])
        kept = np.concatenate([self._kept, times_ms])
        if len(kept) > SAMPLE:
            stay = np.argpartition(rank, SAMPLE)[:SAMPLE]
            rank, kept = rank[stay], kept[stay]
        self._rank, self._kept = rank, kept

    def cuts(self, config: SplitConfig) -> tuple[int, int]:
        """(first validation time, first test time) in ms."""
        test_share = 0.0 if self.given else config.test_share
        valid, test = np.quantile(self._kept, [1 - test_share - config.valid_share, 1 - test_share])
        return int(valid), np.iinfo(np.int64).max if self.given else int(test)

    def doubts(self) -> list[str]:
        """A line if half of the events lie in 1970 or in the future: then the unit is probably another. Within 1970's
        first day they are places in the log, not times."""
        median = int(np.median(self._kept))
        if median < DAY_MS or YEAR_MS <= median <= time.time() * 1000 + DAY_MS:
            return []
        day = np.datetime64(median, "ms").astype("datetime64[D]")
        where = "in 1970" if median < YEAR_MS else "in the future"
        return [f"half of the events lie {where} (the median is {day}): if these are dates, time_unit is another"]


@dataclass
class Ties:
    """Users whose held-out events (leave-one-out) were told apart from the event before by their order in the file
    alone, as the times are equal; ``equal``: those whose events all have one time."""

    held_out: int = 0
    tied: int = 0
    equal: int = 0

    def add(self, frame: pd.DataFrame) -> None:
        """``frame`` is sorted by user and time and holds whole users."""
        of_user = frame.groupby(USER, sort=False)
        from_end = of_user.cumcount(ascending=False).to_numpy()
        size = of_user[USER].transform("size").to_numpy()
        times, first = frame[TIME].to_numpy(), of_user.cumcount().to_numpy() == 0
        same = np.zeros(len(frame), bool)  # as the event before it of the same user
        same[1:] = (times[1:] == times[:-1]) & ~first[1:]
        last = (from_end == 0) & (size >= 3)
        tied = same.copy()
        tied[1:] |= same[:-1] & (from_end[1:] == 0)  # the validation event's tie, on the row of the test event
        all_equal = (of_user[TIME].transform("min") == of_user[TIME].transform("max")).to_numpy()
        self.held_out += int(last.sum())
        self.tied += int((last & tied).sum())
        self.equal += int((last & all_equal).sum())

    def notes(self) -> list[str]:
        """A line if there are any."""
        if not self.tied:
            return []
        each = (
            f"; the times of all events of {self.equal:,} of them are equal, so that their order in the file is taken "
            "for the order in time"
            if self.equal
            else ""
        )
        return [
            f"leave-one-out: of {self.held_out:,} users with held-out events {self.tied:,} have one whose time is that "
            f"of the event before it; which of them came last is decided by their order in the file{each}"
        ]


def mark(frame: pd.DataFrame, config: SplitConfig, times: TimeSample) -> np.ndarray:
    """The mark of each event, int8; ``frame`` is sorted by user and time and holds whole users. Raises ValueError for a
    test set that came with a log that is not split by sessions."""
    if config.kind == SESSIONS:
        return _by_session(frame, config, times)
    if times.given:
        raise ValueError(f"split {config.kind}: a log that brings its own test requests is split by sessions")
    if config.kind == BY_TIME:
        first_valid, first_test = times.cuts(config)
        time_ms = frame[TIME].to_numpy()
        return np.where(time_ms >= first_test, TEST, np.where(time_ms >= first_valid, VALID, TRAIN)).astype("int8")
    from_end = frame.groupby(USER, sort=False).cumcount(ascending=False).to_numpy()
    size = frame.groupby(USER, sort=False)[USER].transform("size").to_numpy()
    split = np.where(from_end == 0, TEST, np.where(from_end == 1, VALID, TRAIN))
    return np.where(size < 3, TRAIN, split).astype("int8")


def _by_session(frame: pd.DataFrame, config: SplitConfig, times: TimeSample) -> np.ndarray:
    """Whole sessions held out by their last event: the first event of such a one is CONTEXT."""
    first_valid, first_test = times.cuts(config)
    of_session = frame.groupby(USER, sort=False)
    ends = of_session[TIME].transform("max").to_numpy()
    first = of_session.cumcount().to_numpy() == 0
    held_out = np.where(first, CONTEXT, np.where(ends >= first_test, TEST, VALID))
    split = np.where(ends >= first_valid, held_out, TRAIN).astype("int8")
    if SPLIT not in frame:
        return split
    given = frame[SPLIT].to_numpy()
    return np.where(given >= GIVEN, given, split).astype("int8")
