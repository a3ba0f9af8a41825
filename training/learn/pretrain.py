"""``vivace pretrain``: objectives that need no next-item label, on the training sequences; ``train --from`` takes up.

Axis legend: B windows, T events, V item ids, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from preprocessing.features import Features
from training.checkpoints import finish_training, keep_only_own_checkpoint
from training.data.batches import pad_left, training_batches
from training.data.columns import TIMED
from training.data.counters import popularity
from training.data.probes import hold_back
from training.learn.loop import Loop, LoopConfig
from training.learn.objectives import hide
from training.learn.warm_start import new_retriever
from training.losses import full_softmax
from training.models.retrieval import RetrievalModel
from training.presets import Preset, recorded_fields
from vivace.checks import check_fields, check_minimum, check_positive, check_shares
from vivace.contract import FIRST_ID, PADDING_ID
from vivace.manifest import Progress, Step, read_manifest
from vivace.run import PRETRAINED, Run

Objective = Literal["masked", "segment", "session", "contrastive"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
FOLDER = PRETRAINED


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """What the encoder learns before it learns to predict the next item."""

    objectives: tuple[Objective, ...] = ("masked",)
    """Summed. "masked" guesses hidden items (Sun et al. 2019; causal families see the past only); "session" tells which
    session followed which past, among the batch: next-session prediction; "segment" the same with sequences cut in the
    middle, for logs whose times tell no sessions; "contrastive" draws two augmentations of a sequence together
    (CL4SRec, Xie et al. 2022, eq. 2)."""
    epochs: int = 2
    """Passes over the training windows."""
    batch_size: int = 64
    """Windows a step."""
    learning_rate: float = 4e-3
    """Peak of the schedule."""
    temperature: float = 0.2
    """Of the contrasts, above 0."""
    share: float = 0.3
    """Of a window's events that are hidden, cropped or re-ordered; 0 <= x < 1."""
    session_gap_s: int = 1800
    """Seconds of pause that end a session."""

    def __post_init__(self) -> None:
        check_fields(self, {"objectives": "pretraining objectives"})
        if not self.objectives:
            raise ValueError(f"pretraining objectives: expected some of {list(OBJECTIVES)}, got none")
        check_minimum(self, 1, "epochs", "batch_size", "session_gap_s")
        check_positive(self, "learning_rate", "temperature")
        check_shares(self, "share")


def augment(window_BT: Tensor, share: float) -> Tensor:
    """One of crop, hide or re-order for each row of ids int64 [B, T] padded on the left (CL4SRec): a random run of
    1 - ``share`` of the events; ``share`` of the events removed; a random run of ``share`` shuffled."""
    out = torch.zeros_like(window_BT)
    for row, ids in enumerate(window_BT):
        events = ids[ids != PADDING_ID]
        n, kind = len(events), int(torch.randint(3, ()))
        run = max(1, round(n * share))
        if n > 2 and kind == 0:
            start = int(torch.randint(run + 1, ()))
            events = events[start : start + max(1, n - run)]
        elif n > 2 and kind == 1:
            events = events[torch.rand(n).argsort()[run:].sort().values]
        elif n > 2:
            start = int(torch.randint(n - run + 1, ()))
            order = torch.arange(n)
            order[start : start + run] = start + torch.randperm(run)
            events = events[order]
        out[row, out.shape[1] - len(events) :] = events
    return out


def in_batch_contrast(a_BD: Tensor, b_BD: Tensor, temperature: float) -> Tensor:
    """InfoNCE both ways: row i of ``a`` belongs to row i of ``b``, every other row of the batch does not."""
    logits = F.normalize(a_BD, dim=1) @ F.normalize(b_BD, dim=1).t() / temperature
    partner = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, partner) + F.cross_entropy(logits.t(), partner)) / 2


def halves(window_BT: Tensor) -> tuple[Tensor, Tensor]:
    """First and second half of each row, both padded on the left; rows of one event give an empty second half."""
    first, second = torch.zeros_like(window_BT), torch.zeros_like(window_BT)
    for row, ids in enumerate(window_BT):
        events = ids[ids != PADDING_ID]
        cut = (len(events) + 1) // 2
        for out, part in ((first, events[:cut]), (second, events[cut:])):
            out[row, out.shape[1] - len(part) :] = part
    return first, second


def sessions(window_BT: Tensor, time_BT: Tensor, gap_s: int) -> tuple[Tensor, Tensor]:
    """(events before a random pause of at least ``gap_s``, the session after it) of the rows that have such a pause,
    each int64 [B', T] padded on the left. A session ends at the next such pause."""
    first, second = [], []
    for ids, times in zip(window_BT.tolist(), time_BT.tolist(), strict=True):
        events = [(i, t) for i, t in zip(ids, times, strict=True) if i != PADDING_ID]
        pauses = [n for n in range(1, len(events)) if events[n][1] - events[n - 1][1] >= gap_s * 1000]
        if pauses:
            chosen = int(torch.randint(len(pauses), ()))
            end = pauses[chosen + 1] if chosen + 1 < len(pauses) else len(events)
            first.append(np.array([i for i, _ in events[: pauses[chosen]]]))
            second.append(np.array([i for i, _ in events[pauses[chosen] : end]]))
    if not first:
        return window_BT[:0], window_BT[:0]
    return tuple(pad_left(part, window_BT.shape[1]).to(window_BT.device) for part in (first, second))  # type: ignore


def objective(model: RetrievalModel, config: Pretraining) -> Callable[[Tensor], Tensor]:
    """Sum of the losses of windows and their times, int64 [B, T + 1, 2]."""

    def masked(window: Tensor, times: Tensor, table: Tensor) -> Tensor:
        hidden = hide(window, config.share)
        if model.masked:
            encoded = model.encode_masked(window, hidden, table, times)[hidden]
        else:  # a causal encoder guesses a hidden item from the state before it, with the hidden ones left blank
            blank = torch.where(hidden, torch.full_like(window, FIRST_ID - 1), window)
            encoded = model.encode(blank[:, :-1], table, times[:, :-1])[hidden[:, 1:]]
            hidden = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, 1:]], 1)
        return full_softmax(encoded, table, model.bias, window[hidden], FIRST_ID)

    def state(window: Tensor, table: Tensor) -> Tensor:
        return model.encode(window[:, -model.config.span :], table)[:, -1]

    def contrastive(window: Tensor, times: Tensor, table: Tensor) -> Tensor:
        one, two = (state(augment(window, config.share).to(window.device), table) for _ in range(2))
        return in_batch_contrast(one, two, config.temperature)

    def follows(a: Tensor, b: Tensor, table: Tensor) -> Tensor:
        if len(a) < 2:  # nothing to tell apart
            return table.sum() * 0.0
        return in_batch_contrast(state(a, table), state(b, table), config.temperature)

    def segment(window: Tensor, times: Tensor, table: Tensor) -> Tensor:
        a, b = halves(window)
        both = (b != PADDING_ID).any(1)
        return follows(a[both], b[both], table)

    def session(window: Tensor, times: Tensor, table: Tensor) -> Tensor:
        return follows(*sessions(window, times, config.session_gap_s), table)

    parts = {"masked": masked, "contrastive": contrastive, "segment": segment, "session": session}

    def loss(batch: Tensor) -> Tensor:
        batch, table = batch.to(model.bias.device), model.table()
        window, times = batch[..., 0], batch[..., 1]
        return torch.stack([parts[name](window, times, table) for name in config.objectives]).sum()

    return loss


def pretrain(
    features: Features,
    preset: Preset,
    config: Pretraining,
    root: Path,
    seed: int,
    say: Progress,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains (or resumes, or finds) ``artifacts/<name>/pretrained``; returns its manifest."""
    prepared = read_manifest(features.folder, "vivace prepare")
    settings = {
        "encoder": recorded_fields(preset.encoder),
        "pretraining": asdict(config),
        "start": preset.retrieval.start,
    }
    step = Step(Run(root).pretrained, "pretrain", settings, seed, {"features": prepared["key"]})
    if (manifest := step.finished(say, "the pretrained encoder is there")) is not None:
        return manifest
    keep_only_own_checkpoint(step)
    torch.manual_seed(seed)
    history = preset.encoder.span
    model = new_retriever(features, preset, popularity(features.files("train"), features.item_count()))
    files, probes = hold_back(features.files("train"), step.folder / "parts", preset.retrieval.probe_users, seed)
    steps = sum(1 for _ in training_batches(files, history, config.batch_size, seed, 0, columns=TIMED))
    of_window = objective(model, config)

    def metric() -> dict[str, float]:
        """The objective on the users held back, always with the same hidden places."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            parts = [probes[i : i + config.batch_size] for i in range(0, len(probes), config.batch_size)]
            losses = [float(of_window(pad_left(p, history + 1))) for p in parts if len(p) > 1]
        return {"log_loss": sum(losses) / max(len(losses), 1)}

    loop = Loop(
        model,
        LoopConfig(epochs=config.epochs, steps_per_epoch=steps, learning_rate=config.learning_rate, seed=seed),
        step.folder,
        "pretraining",
        lambda epoch: training_batches(files, history, config.batch_size, seed, epoch, columns=TIMED),
        of_window,
        metric,
        quiet,
    )
    loop.resume(say)
    return finish_training(step, model, loop.run(), parameters=sum(p.numel() for p in model.parameters()))
