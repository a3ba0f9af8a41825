"""Which of a user's training events are learned from, so that no account teaches more than a person does.

A cap holds for what is learned: tables of co-occurrence, popularity, windows. Requests that are predicted and histories
that are served keep every event.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.features import Features
from preprocessing.sequences import WHOLE
from vivace.checks import check_fields, check_minimum
from vivace.contract import ITEM, TIME, USER

DAY_MS = 86_400_000
LEARNED = ("train", WHOLE)


@dataclass(frozen=True)
class LearningCaps:
    """``day_events``: of a user's events of one day (UTC), the first so many are learned from (0: all);
    ``same_item_s``: of those on one item, one within so many seconds (0: all)."""

    day_events: int = 0
    same_item_s: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        check_minimum(self, 0, "day_events", "same_item_s")

    @property
    def none(self) -> bool:
        """Whether all events are learned from."""
        return not (self.day_events or self.same_item_s)

    def learned(self, owner: np.ndarray, items: np.ndarray, times_ms: np.ndarray) -> np.ndarray:
        """bool [n]: which events of the users ``owner`` int64 [n], each user's in order of time, are learned from. What
        comes later changes nothing of what came before."""
        kept = np.ones(len(items), bool)
        if self.same_item_s:
            kept = self._once(owner, items, times_ms)
        if self.day_events:
            rows = np.flatnonzero(kept)
            kept[rows] = _place(owner[rows], times_ms[rows] // DAY_MS) < self.day_events
        return kept

    def _once(self, owner: np.ndarray, items: np.ndarray, times_ms: np.ndarray) -> np.ndarray:
        kept, last = np.zeros(len(items), bool), dict[tuple[int, int], int]()
        rows = zip(owner.tolist(), items.tolist(), times_ms.tolist(), strict=True)
        for row, (user, item, time_ms) in enumerate(rows):
            before = last.get((user, item))
            if before is None or time_ms - before >= 1000 * self.same_item_s:
                kept[row], last[user, item] = True, time_ms
        return kept

    def table(self, sequences: pa.Table) -> pa.Table:
        """Rows of sequences, USER and lists of one value an event, with what is learned of them; none is empty, as the
        first event of each stays."""
        lists = {name: sequences[name].combine_chunks() for name in sequences.column_names if name != USER}
        owner = np.repeat(np.arange(len(sequences)), np.diff(lists[ITEM].offsets.to_numpy()))
        kept = self.learned(owner, *(lists[name].flatten().to_numpy() for name in (ITEM, TIME)))
        lengths = np.bincount(owner[kept], minlength=len(sequences))
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        cut = {name: pa.ListArray.from_arrays(offsets, v.flatten().filter(pa.array(kept))) for name, v in lists.items()}
        return pa.table({USER: sequences[USER], **cut}).cast(sequences.schema)


def _place(owner: np.ndarray, day: np.ndarray) -> np.ndarray:
    """Place from 0 of each event among those of its user's day, int64 [n]."""
    order = np.lexsort((np.arange(len(owner)), day, owner))
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(owner[order]) != 0) | (np.diff(day[order]) != 0)
    starts = np.flatnonzero(new)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    return place


class CappedFeatures(Features):
    """Features whose training sequences are held to caps, as copies in another folder."""

    def __init__(self, features: Features, caps: LearningCaps, folder: Path) -> None:
        super().__init__(features.folder)
        self._copies = {
            part: [self._copy(file, caps, folder / part) for file in features.files(part)] for part in LEARNED
        }

    def _copy(self, file: Path, caps: LearningCaps, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        table = caps.table(pq.read_table(file))
        pq.write_table(table, folder / file.name, row_group_size=max(len(table), 1))
        return folder / file.name

    def files(self, part: str) -> list[Path]:
        return self._copies.get(part) or super().files(part)


def learned_from(features: Features, caps: LearningCaps, folder: Path) -> Features:
    """``features`` as a model that is held to ``caps`` learns from them; copies go to ``folder``, anew."""
    if caps.none:
        return features
    shutil.rmtree(folder, ignore_errors=True)
    return CappedFeatures(features, caps, folder)
