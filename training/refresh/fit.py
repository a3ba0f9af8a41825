"""Trains a run's models on by what they have not learned yet, with older sequences beside it against forgetting.

Axis legend: B requests, T history events, V item ids.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from preprocessing.features import Features
from training.checkpoints import device
from training.data import batches
from training.data.columns import TIMED, EventColumns
from training.learn.loop import Loop, LoopConfig
from training.learn.memory import remember
from training.learn.objectives import log_expected_counts, retrieval_loss
from training.learn.ranker import RankerData, calibrate, ranker_loss
from training.learn.warm_start import finish_unseen
from training.metrics import mean_ndcg
from training.models.ranking import RankingModel
from training.models.retrieval import EXCLUDED, RetrievalModel
from training.presets import Preset
from training.scoring import SCORED, scored
from vivace.contract import ITEM, USER

WATCHED = 2048  # validation requests whose loss decides on the epochs
LEAST_LABELS = 100  # validation requests of a ranker that is trained on; with fewer it stays as it is
LEAST_CALIBRATION = 200  # requests held out of it that calibrate it anew


@dataclass(frozen=True, kw_only=True)
class MoreTraining:
    """How a trained model goes on."""

    epochs: int = 6
    """Passes over new and replayed sequences at most."""
    steps: int = 300
    """Steps at least: of few events there are more passes, up to ``MOST_PASSES``."""
    rate: float = 0.5
    """Share of the learning rate of the first training."""
    replay: float = 1.0
    """Older sequences beside each that has something new."""
    ranker_epochs: int = 2
    """Passes over the new validation requests."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.steps < 0 or self.ranker_epochs < 0 or not self.rate > 0 or self.replay < 0:
            raise ValueError(f"MoreTraining: expected epochs from 1, a rate above 0 and no negative value, got {self}")


MOST_PASSES = 12
PATIENCE = 2  # epochs without a smaller loss of the validation requests before it stops


# -- what is learned -----------------------------------------------------------------------------------
def learned_lengths(files: list[Path]) -> pd.Series:
    """Events of each user that files of training sequences hold, int64 by user id."""
    parts = [pq.read_table(file, columns=[USER, ITEM]) for file in files]
    lengths = [np.diff(part[ITEM].combine_chunks().offsets.to_numpy()) for part in parts]
    users = [part[USER].to_numpy() for part in parts]
    return pd.Series(np.concatenate([np.empty(0, np.int64), *lengths]), np.concatenate([np.empty(0, object), *users]))


def sequences_to_learn(
    files: list[Path], learned: pd.Series, history: int, replay: float, seed: int, columns: EventColumns = TIMED
) -> tuple[list[np.ndarray], int]:
    """(sequences int64 [n, W] of ``columns``, how many of them hold something new): those that are longer than
    ``learned`` says, from ``history`` events before what is new, and ``replay`` times as many others by chance."""
    fresh: list[np.ndarray] = []
    others: list[np.ndarray] = []
    for file in files:
        table = pq.read_table(file, columns=[USER, *columns.names])
        lists = {name: table[name].combine_chunks() for name in columns.names}
        flat = columns.packed({name: c.flatten().to_numpy(zero_copy_only=False) for name, c in lists.items()})
        sequences = np.split(flat, lists[ITEM].offsets.to_numpy()[1:-1])
        known = learned.reindex(table[USER].to_numpy()).fillna(0).to_numpy(np.int64)
        for sequence, before in zip(sequences, known, strict=True):
            if len(sequence) > before:
                fresh.append(sequence[-(len(sequence) - before + history) :])
            else:
                others.append(sequence)
    count = min(round(replay * len(fresh)), len(others))
    chosen = np.random.default_rng(seed).permutation(len(others))[:count]
    return fresh + [others[i] for i in chosen], len(fresh)


def windows_of(sequences: list[np.ndarray], preset: Preset, seed: int) -> Callable[[int], Iterator[Tensor]]:
    """Batches of an epoch, int64 [B, <= T + 1] or, of more columns, [B, <= T + 1, W]; in an order set by seed and
    epoch."""
    alone = not sequences or sequences[0].shape[1] == 1
    pool = [w for s in sequences for w in batches.windows(s[:, 0] if alone else s, preset.encoder.span)]
    pool.sort(key=len)  # of like length together
    size = preset.retrieval.batch_size

    def of_epoch(epoch: int) -> Iterator[Tensor]:
        for start in np.random.default_rng([seed, epoch]).permutation(np.arange(0, len(pool), size)):
            chosen = pool[start : start + size]
            yield batches.pad_left(chosen, max(len(w) for w in chosen))

    return of_epoch


def watched_loss(model: RetrievalModel, features: Features, preset: Preset) -> Callable[[], dict[str, float]]:
    """Log loss and NDCG@10 of validation requests, which the retriever never learns; {} where there are none."""
    heads = [head.name for head in features.schema.heads]
    read = batches.requests(features.files("valid"), heads, preset.encoder.window, SCORED)
    requests = list(itertools.islice(read, WATCHED // SCORED))

    def metric() -> dict[str, float]:
        ranks, losses = [], []
        with torch.no_grad():
            for request in requests:
                rank, scores, _ = scored(model, request, features.schema.exclude_seen)
                losses.append(F.cross_entropy(scores, request.target_B.to(scores.device), reduction="none"))
                ranks.append(rank)
        loss = torch.cat(losses) if losses else torch.empty(0)
        live = loss < -EXCLUDED / 2  # a target that was seen before has no score
        return {"log_loss": float(loss[live].mean()), "NDCG@10": mean_ndcg(ranks)} if live.any() else {}

    return metric


# -- the models ----------------------------------------------------------------------------------------
def train_more(
    model: RetrievalModel, sequences: list[np.ndarray], counts: np.ndarray, preset: Preset, more: MoreTraining,
    seed: int, folder: Path, metric: Callable[[], dict[str, float]] = dict, epochs: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Trains ``model`` in place on ``sequences``; the loop's report. ``counts``: events of each item [V] of all that it
    has learned then. ``epochs`` 0: as many as ``more`` says, of which those are kept that ``metric`` likes best."""
    training = replace(preset.retrieval, stochastic_length=0.0)  # the windows are whole
    of_epoch = windows_of(sequences, preset, seed)
    steps = sum(1 for _ in of_epoch(0))
    if not steps:
        return {"epochs": [], "stopped_early": False, "seconds": 0.0}
    epochs = epochs or min(max(more.epochs, math.ceil(more.steps / steps)), MOST_PASSES)
    model.popularity.copy_(torch.tensor(counts))
    model.remembers = False
    loop = Loop(
        model,
        LoopConfig(
            epochs=epochs, steps_per_epoch=steps, learning_rate=more.rate * training.learning_rate,
            weight_decay=training.weight_decay, warmup_steps=training.warmup_steps, clip_norm=training.clip_norm,
            checkpoint_s=training.checkpoint_s, seed=seed, ema=training.ema, patience=PATIENCE * (metric is not dict),
        ),
        folder,
        "refresh",
        of_epoch,
        retrieval_loss(model, training, log_expected_counts(torch.tensor(counts), training).to(device())),
        metric,
        quiet=True,
    )  # fmt: skip
    loop.resume()
    report = loop.run()
    model.remembers = True
    return report


def settle(
    model: RetrievalModel, features: Features, files: list[Path], counts: np.ndarray, preset: Preset
) -> RetrievalModel:
    """After training: items without an event at their neighbours, the session memory from ``files`` of sequences."""
    finish_unseen(model, counts, features, preset.retrieval)
    remember(model, files)
    return model.eval()


def train_ranker_more(
    model: RankingModel, data: RankerData, preset: Preset, more: MoreTraining, seed: int, folder: Path
) -> dict[str, Any]:
    """Trains a ranker in place on validation requests that its retriever has not learned, if there are
    ``LEAST_LABELS``; the loop's report with how many there were."""
    training = preset.ranking
    labels = len(data.known.target_B) if data.known is not None else 0
    if data.known is None and not data.without_validation:
        labels = sum(pq.read_metadata(f).num_rows for f in data.features.files("valid"))
    if labels < LEAST_LABELS or not more.ranker_epochs:
        return {"epochs": [], "stopped_early": False, "seconds": 0.0, "labels": labels, "calibration": {}}
    loop = Loop(
        model,
        LoopConfig(
            epochs=more.ranker_epochs, steps_per_epoch=data.steps(training.batch_size), warmup_steps=50, seed=seed,
            learning_rate=more.rate * training.learning_rate, weight_decay=training.weight_decay,
            clip_norm=training.clip_norm,
        ),
        folder,
        "refresh the ranker",
        lambda epoch: data.batches(False, seed * 1000 + epoch, training.batch_size),
        lambda batch: ranker_loss(model, batch),
        dict,
        quiet=True,
    )  # fmt: skip
    loop.resume()
    report = loop.run()
    model.eval()
    held_out = list(data.batches(True, None, SCORED))
    enough = sum(len(batch.target_B) for batch in held_out) >= LEAST_CALIBRATION
    return {**report, "labels": labels, "calibration": calibrate(model, iter(held_out)) if enough else {}}
