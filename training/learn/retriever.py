"""``vivace train``: the retriever on the training events; then ``train_ranking``: the ranker on the validation events.

Axis legend: B requests, T history events, N candidates.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from preprocessing.features import Features
from training.checkpoints import device, finish_training, keep_only_own_checkpoint
from training.data import batches as data
from training.data.counters import popularity
from training.data.probes import hold_back
from training.distributed import World, whole
from training.learn.constraints import Constraint, constrain, release
from training.learn.distill import Teacher
from training.learn.loop import Loop, LoopConfig
from training.learn.objectives import log_expected_counts, retrieval_loss
from training.learn.warm_start import free_unseen, start_from_counts, take_up
from training.metrics import mean_ndcg
from training.models.adapters import Adaptation, freeze_for, merge
from training.models.item_table import item_attributes
from training.models.retrieval import EXCLUDED, RetrievalModel
from training.presets import PRESET, Preset
from training.scoring import SCORED, scored
from vivace.manifest import Progress, Step, read_manifest, write_text
from vivace.run import TEXT, Run


def _probe_metric(
    model: RetrievalModel, probes: list[np.ndarray], exclude_seen: bool
) -> Callable[[], dict[str, float]]:
    def metric() -> dict[str, float]:
        found, losses = [], []
        with torch.no_grad():
            for start in range(0, len(probes), SCORED):
                part = probes[start : start + SCORED]
                targets = torch.tensor([int(p[-1, 0]) for p in part])
                request = data.of_sequences([p[:-1] for p in part], model.config.history, targets, {}, start)
                rank, scores, _ = scored(model, request, exclude_seen)
                found.append(rank)
                losses.append(F.cross_entropy(scores, request.target_B.to(scores.device), reduction="none"))
        if not found:
            return {"log_loss": 0.0}
        loss = torch.cat(losses)
        live = loss < -EXCLUDED / 2  # a target that was seen before has no score
        return {"log_loss": float(loss[live].mean()) if live.any() else 0.0, "NDCG@10": mean_ndcg(found)}

    return metric


def train_retrieval(
    features: Features,
    preset: Preset,
    root: Path,
    seed: int,
    say: Progress,
    quiet: bool = False,
    start_from: Path | None = None,
    adaptation: Adaptation | None = None,
    world: World = data.ALONE,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    teacher: Teacher | None = None,
    constraint: Constraint | None = None,
) -> dict[str, Any]:
    """Trains (or resumes, or finds) ``artifacts/<name>/retrieval``; returns its manifest.

    ``start_from``: folder of a pretrained or trained retriever whose weights are taken up first; ``adaptation``: which
    of them are then trained; ``on_epoch`` is told the figures of each epoch and may raise; ``teacher``: what it learns
    from beside the data; ``constraint``: what its matrices must be.
    """
    prepared = read_manifest(features.folder, "vivace prepare")
    adaptation = adaptation or Adaptation()
    if adaptation.method != "full" and start_from is None:
        raise ValueError(f"--adapt {adaptation.method} fine-tunes a trained encoder: name its folder with --from")
    if adaptation.method != "full" and preset.retrieval.shard_model:
        raise ValueError(f"--adapt {adaptation.method} trains few parameters: set shard_model to false")
    config = {"encoder": asdict(preset.encoder), "training": asdict(preset.retrieval), "adapt": asdict(adaptation)}
    inputs = {"features": prepared["key"]}
    if teacher is not None:
        if preset.encoder.family == "bert4rec" or preset.encoder.time_bias:
            raise ValueError("distillation is for encoders that predict the next item without times")
        config["distillation"] = asdict(teacher.config)
        inputs["teacher"] = teacher.key
    if constraint:
        if preset.retrieval.shard_model or preset.encoder.family in ("gru", "lstm"):
            raise ValueError("--sparsity and --qat are for attention encoders of one process: set shard_model to false")
        config["constraint"] = asdict(constraint)
    if start_from is not None:
        inputs["from"] = read_manifest(start_from, "vivace pretrain")["key"]
    if preset.encoder.text_encoder:
        inputs["text"] = Run(root, features.folder).key(TEXT)
    step = Step(root / "retrieval", "train retrieval", config, seed, inputs)
    if world.first:
        root.mkdir(parents=True, exist_ok=True)
        write_text(root / PRESET, json.dumps(asdict(preset), indent=2))
    if step.done():
        say("retriever is there: nothing to do")
        assert step.manifest is not None
        return step.manifest
    if world.local_rank == 0:
        keep_only_own_checkpoint(step)
    torch.manual_seed(seed)
    items, c = features.item_count(), preset.retrieval
    counts = popularity(features.files("train"), items)
    attributes = item_attributes(features, preset.encoder)
    model = RetrievalModel(preset.encoder, items, torch.tensor(counts), attributes).to(device())
    if c.start == "cooccurrence":
        start_from_counts(model, features.files("train"), counts)
    taken: dict[str, Any] = {}
    if start_from is not None:
        taken = take_up(model, start_from, prepared["key"])
        say(f"took up {len(taken['taken'])} tensors of {start_from}, left {len(taken['left'])}")
    if constraint:
        constrain(model, constraint)
    sizes = freeze_for(model, adaptation)
    parts = step.folder / "parts"
    files, probes = hold_back(features.files("train"), parts / str(world.local_rank), c.probe_users, seed)
    world.barrier()  # nobody takes up a checkpoint that another one is about to remove

    def batches(epoch: int) -> Iterator[Tensor]:
        shared = data.training_batches(
            files, preset.encoder.history, c.batch_size, seed, epoch, c.random_offset, world, c.shard_reading,
            preset.encoder.time_bias,
        )  # fmt: skip
        return itertools.islice(shared, steps) if steps else shared

    steps = 0
    steps = world.smallest(sum(1 for _ in batches(0)))
    if not steps:
        raise ValueError(
            "train: no user has two training events, so there is nothing to learn the next event from; "
            "check the column user, or prepare a longer log"
        )
    log_expected = log_expected_counts(torch.tensor(counts), c).to(device())
    loop = Loop(
        model,
        LoopConfig(
            epochs=c.epochs, steps_per_epoch=steps, learning_rate=c.learning_rate, weight_decay=c.weight_decay,
            warmup_steps=c.warmup_steps, clip_norm=c.clip_norm, patience=c.patience, checkpoint_s=c.checkpoint_s,
            seed=seed, ema=c.ema,
        ),
        step.folder,
        "retrieval",
        batches,
        retrieval_loss(model, c, log_expected, teacher),
        _probe_metric(model, probes, features.schema.exclude_seen),
        quiet,
        world,
        on_epoch,
        c.shard_model,
    )  # fmt: skip
    torch.manual_seed(seed + world.rank)  # other dropout and negatives in each process
    if loop.resume():
        say(f"retriever: resumed at epoch {loop.epoch + 1}, step {loop.step}")
    report = loop.run()
    if loop.loss.sharded:
        state = whole(model.state_dict())
        model = RetrievalModel(preset.encoder, items, torch.tensor(counts), attributes)
        model.load_state_dict(state)
    merge(model)
    release(model)
    free_unseen(model, counts, features, c.new_items == "neighbours")
    if not world.first:
        return report
    return finish_training(step, model, report, **sizes, start=taken, processes=world.size)
