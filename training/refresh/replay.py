"""The refresh within a replay: at each hour the models go on with what had happened until then, and nothing later."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from preprocessing.features import Features
from preprocessing.sequences import WHOLE, cut_lists
from training.data import batches
from training.data.columns import EventColumns
from training.data.counters import popularity
from training.judge.evaluate import Models
from training.judge.replay import HOUR
from training.learn.ranker import RankerData
from training.presets import Preset
from training.refresh.carry import counted_ranker
from training.refresh.fit import (
    MoreTraining,
    learned_lengths,
    sequences_to_learn,
    settle,
    train_more,
    train_ranker_more,
)
from vivace.contract import TIME, USER
from vivace.manifest import Progress
from vivace.run import RANKING, Run

USUAL = 6  # refreshes of a replay where their distance is not named
MORE = MoreTraining(epochs=1, steps=20, rate=0.25, ranker_epochs=1)


def sequences_before(features: Features, until_ms: int, folder: Path) -> list[Path]:
    """Writes what is before ``until_ms`` of all sequences of the log, with all columns, to files in ``folder``."""
    files = []
    for file in features.files(WHOLE):
        table = pq.read_table(file)
        times = table[TIME].combine_chunks()
        owner = np.repeat(np.arange(len(table)), np.diff(times.offsets.to_numpy()))
        stops = np.bincount(owner[times.flatten().to_numpy() < until_ms], minlength=len(table)).astype(np.int64)
        rows = np.flatnonzero(stops)
        lists = {n: cut_lists(table[n].combine_chunks(), rows, stops[rows]) for n in table.column_names if n != USER}
        whole = pa.table({USER: table[USER].combine_chunks().take(pa.array(rows)), **lists})
        pq.write_table(whole, folder / file.name, row_group_size=max(len(rows), 1))
        files.append(folder / file.name)
    return files


class Renewals:
    """``judge.replay.Renewing``: the run's models, trained on every ``hours``.

    The ranker learns from the requests that were answered since the last time, whose targets its retriever has not
    learned yet; then the retriever learns the events.
    """

    def __init__(self, models: Models, hours: float, seed: int, say: Progress) -> None:
        self.features, self.preset, self.seed, self.say = models.features, models.preset, seed, say
        self._retriever, self._ranker = copy.deepcopy(models.retriever), copy.deepcopy(models.ranker)
        self._step_ms, self._next_ms = int(hours * HOUR), 0
        self._learned = learned_lengths(self.features.files("train"))
        self._answered: list[batches.Requests] = []
        self.moments: list[int] = []

    def models_at(self, now_ms: int) -> Models:
        if now_ms >= self._next_ms:
            until = now_ms - now_ms % self._step_ms if self._next_ms else now_ms
            self._next_ms = now_ms - now_ms % self._step_ms + self._step_ms
            with tempfile.TemporaryDirectory(prefix="vivace-replay-") as folder:
                self._renew(until, Path(folder))
            self.moments.append(until)
            self.say(f"refreshed with the events before {until} ms, {len(self.moments)} times")
        loaded = (self._retriever, self._ranker)
        return Models(self.features, self.preset, self.features.folder, [RANKING], loaded=loaded)

    def answered(self, request: batches.Requests) -> None:
        self._answered.append(request)

    def _renew(self, until_ms: int, folder: Path) -> None:
        torch.manual_seed(self.seed + len(self.moments))
        if self._answered:
            known = batches.together(self._answered)
            data = RankerData(self.features, self._retriever, self.preset, self.seed, False, known)
            train_ranker_more(self._ranker, data, self.preset, MORE, self.seed, _inner(folder, "ranking"))
            self._answered = []
        files = sequences_before(self.features, until_ms, _inner(folder, "sequences"))
        counts = popularity(files, self.features.item_count())
        history, columns = self.preset.encoder.span, EventColumns.read_by(self._retriever)
        sequences, fresh = sequences_to_learn(files, self._learned, history, MORE.replay, self.seed, columns)
        if fresh:
            train_more(
                self._retriever, sequences, counts, self.preset, MORE, self.seed, _inner(folder, "retrieval"),
                epochs=MORE.epochs,
            )  # fmt: skip
        settle(self._retriever, self.features, files, counts, self.preset)
        self._ranker = counted_ranker(self.features, self.preset, self._retriever, self._ranker, files)
        self._learned = learned_lengths(files)


def _inner(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir()
    return path


def renewals(
    features: Features, preset: Preset, root: Path, hours: float, say: Progress
) -> Callable[[np.ndarray], Renewals]:
    """What ``judge.replay.replay`` takes as ``renewing``. ``hours`` below 0: ``USUAL`` times, but no more than once an
    hour."""

    def make(moments: np.ndarray) -> Renewals:
        span = (int(moments[-1]) - int(moments[0])) / HOUR
        seed = int(Run(root, features.folder).manifest(RANKING)["seed"])
        return Renewals(
            Models(features, preset, root, [RANKING]), hours if hours > 0 else max(1.0, span / USUAL), seed, say
        )

    return make
