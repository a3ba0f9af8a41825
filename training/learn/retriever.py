"""``vivace train``: the retriever on the training events.

Axis legend: B requests, T history events, V item ids.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from preprocessing.caps import learned_from
from preprocessing.features import Features
from training.advice import outsized
from training.checkpoints import device, finish_training, keep_only_own_checkpoint
from training.data import batches
from training.data.columns import EventColumns
from training.data.counters import popularity
from training.data.probes import hold_back
from training.distributed import ALONE, World, whole
from training.learn.constraints import Constraint, constrain, release
from training.learn.distill import Teacher
from training.learn.loop import Loop, LoopConfig
from training.learn.memory import fit_memory, remember
from training.learn.objectives import log_expected_counts, retrieval_loss
from training.learn.warm_start import finish_unseen, new_retriever, take_up
from training.metrics import mean_ndcg
from training.models.adapters import Adaptation, freeze_for, merge
from training.models.encoders import Attention
from training.models.item_table import item_attributes
from training.models.retrieval import EXCLUDED, RetrievalModel
from training.presets import Preset, recorded_fields
from training.scoring import SCORED, scored
from vivace.manifest import Progress, Step, read_manifest, write_text
from vivace.run import TEXT, Run


def _probe_metric(
    model: RetrievalModel, probes: list[np.ndarray], columns: EventColumns, exclude_seen: bool
) -> Callable[[], dict[str, float]]:
    """Log loss and NDCG@10 of the events that were held back, the last of each of ``probes``."""
    of_history = replace(columns, context=(), amounts=())

    def metric() -> dict[str, float]:
        ranks, losses = [], []
        with torch.no_grad():
            for start in range(0, len(probes), SCORED):
                part = probes[start : start + SCORED]
                targets = torch.tensor([int(p[-1, 0]) for p in part])
                context = columns.read(torch.from_numpy(np.stack([p[-1] for p in part]))).context
                histories = [p[:-1, : of_history.width] for p in part]
                request = batches.of_sequences(
                    histories, model.config.window, targets, {}, start, columns=of_history, context=context
                )
                rank, scores, _ = scored(model, request, exclude_seen)
                ranks.append(rank)
                losses.append(F.cross_entropy(scores, request.target_B.to(scores.device), reduction="none"))
        if not ranks:
            return {"log_loss": 0.0}
        loss = torch.cat(losses)
        live = loss < -EXCLUDED / 2  # a target that was seen before has no score
        return {"log_loss": float(loss[live].mean()) if live.any() else 0.0, "NDCG@10": mean_ndcg(ranks)}

    return metric


def _check_combination(
    preset: Preset, start_from: Path | None, adaptation: Adaptation, teacher: Teacher | None,
    constraint: Constraint | None,
) -> None:  # fmt: skip
    """Raises ValueError for ways to train that do not go together."""
    if adaptation.method != "full" and start_from is None:
        raise ValueError(f"--adapt {adaptation.method} fine-tunes a trained encoder: name its folder with --from")
    if adaptation.method != "full" and preset.retrieval.shard_model:
        raise ValueError(f"--adapt {adaptation.method} trains few parameters: set shard_model to false")
    if teacher is not None and (preset.encoder.family == "bert4rec" or preset.encoder.time_bias):
        raise ValueError("distillation is for encoders that predict the next item without times")
    if constraint and (preset.retrieval.shard_model or preset.encoder.family in ("gru", "lstm")):
        raise ValueError("--sparsity and --qat are for attention encoders of one process: set shard_model to false")


def _step(
    features: Features, preset: Preset, root: Path, seed: int, start_from: Path | None, adaptation: Adaptation,
    teacher: Teacher | None, constraint: Constraint | None,
) -> Step:  # fmt: skip
    """The step with all that its weights depend on."""
    config = {
        "encoder": recorded_fields(preset.encoder),
        "training": recorded_fields(preset.retrieval),
        "adapt": asdict(adaptation),
    }
    inputs = {"features": read_manifest(features.folder, "vivace prepare")["key"]}
    if teacher is not None:
        config["distillation"] = asdict(teacher.config)
        inputs["teacher"] = teacher.key
    if constraint:
        config["constraint"] = asdict(constraint)
    if start_from is not None:
        inputs["from"] = read_manifest(start_from, "vivace pretrain")["key"]
    if preset.encoder.text_encoder:
        inputs["text"] = Run(root, features.folder).key(TEXT)
    return Step(Run(root).retrieval, "train retrieval", config, seed, inputs)


def training_windows(
    files: list[Path], preset: Preset, seed: int, world: World, columns: EventColumns
) -> tuple[Callable[[int], Iterator[Tensor]], int]:
    """(batches of an epoch for this process, steps of an epoch: as many as every process has). Raises ValueError
    where there is no step to take."""
    training = preset.retrieval

    def of_epoch(epoch: int) -> Iterator[Tensor]:
        return batches.training_batches(
            files, preset.encoder.span, training.batch_size, seed, epoch, training.random_offset, world,
            training.shard_reading, columns, training.stochastic_length,
        )  # fmt: skip

    steps = world.smallest(sum(1 for _ in of_epoch(0)))
    if not steps:
        raise ValueError(
            "train: no user has two training events, so there is nothing to learn the next event from; "
            "check the column user, or prepare a longer log"
        )
    return lambda epoch: itertools.islice(of_epoch(epoch), steps), steps


def _prepared_model(
    features: Features, preset: Preset, counts: np.ndarray, step: Step, start_from: Path | None,
    adaptation: Adaptation, constraint: Constraint | None, say: Progress,
) -> tuple[RetrievalModel, dict[str, Any]]:  # fmt: skip
    """(the model that training starts with, what is recorded of its start and sizes)."""
    model = new_retriever(features, preset, counts)
    start: dict[str, Any] = {}
    if start_from is not None:
        start = take_up(model, start_from, step.inputs["features"])
        say(f"took up {len(start['taken'])} tensors of {start_from}, left {len(start['left'])}")
    if constraint:
        constrain(model, constraint)
    return model, {**freeze_for(model, adaptation), "start": start}


def compile_blocks(model: RetrievalModel) -> None:
    """Runs the encoder's blocks through torch.compile, for windows of any length; the names of the weights stay. Rows
    are not packed then: a group more or less would be compiled anew."""
    if isinstance(model.encoder, Attention):
        model.encoder.packs = False
    for block in getattr(model.encoder, "blocks", []):
        block.compile(dynamic=True)


def _finished_model(
    loop: Loop, model: RetrievalModel, features: Features, preset: Preset, counts: np.ndarray
) -> RetrievalModel:
    """The trained model in the form that is saved. All processes must call it."""
    if loop.loss.sharded:
        state = whole(model.state_dict())
        attributes = item_attributes(features, preset.encoder)
        model = RetrievalModel(preset.encoder, len(counts), torch.tensor(counts), attributes, features.context)
        model.load_state_dict(state)
    merge(model)
    release(model)
    model.remembers = True
    finish_unseen(model, counts, features, preset.retrieval)
    return model


def train_retrieval(
    features: Features,
    preset: Preset,
    root: Path,
    seed: int,
    say: Progress,
    quiet: bool = False,
    start_from: Path | None = None,
    adaptation: Adaptation | None = None,
    world: World = ALONE,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    teacher: Teacher | None = None,
    constraint: Constraint | None = None,
) -> dict[str, Any]:
    """Trains (or resumes, or finds) ``artifacts/<name>/retrieval``; returns its manifest.

    ``start_from``: folder of a pretrained or trained retriever whose weights are taken up first; ``adaptation``: which
    of them are then trained; ``on_epoch`` is told the figures of each epoch and may raise; ``teacher``: what it learns
    from beside the data; ``constraint``: what its matrices must be.
    """
    adaptation, training = adaptation or Adaptation(), preset.retrieval
    _check_combination(preset, start_from, adaptation, teacher, constraint)
    step = _step(features, preset, root, seed, start_from, adaptation, teacher, constraint)
    if world.first:
        root.mkdir(parents=True, exist_ok=True)
        write_text(Run(root).preset, json.dumps(asdict(preset), indent=2))
    if (manifest := step.finished(say, "retriever is there")) is not None:
        return manifest
    if world.local_rank == 0:
        keep_only_own_checkpoint(step)
    torch.manual_seed(seed)
    features = learned_from(features, training.caps, step.folder / "parts" / f"learned-{world.local_rank}")
    counts = popularity(features.files("train"), features.item_count())
    if warning := outsized(preset.encoder, int(counts.sum())):
        say(warning)
    model, record = _prepared_model(features, preset, counts, step, start_from, adaptation, constraint, say)
    model.remembers = False
    if training.shard_model and model.context is not None:  # FSDP does not see the weights in Merlin's wrappers
        model.context = model.context.plain_copy()
    if training.compiled:
        compile_blocks(model)
    parts = step.folder / "parts" / str(world.local_rank)
    files, probes = hold_back(features.files("train"), parts, training.probe_users, seed)
    world.barrier()  # nobody takes up a checkpoint that another one is about to remove
    of_epoch, steps = training_windows(files, preset, seed, world, EventColumns.read_by(model))
    log_expected_V = log_expected_counts(torch.tensor(counts), training).to(device())
    loop = Loop(
        model,
        LoopConfig(
            epochs=training.epochs, steps_per_epoch=steps, learning_rate=training.learning_rate,
            weight_decay=training.weight_decay, warmup_steps=training.warmup_steps, clip_norm=training.clip_norm,
            patience=training.patience, checkpoint_s=training.checkpoint_s, seed=seed, ema=training.ema,
        ),
        step.folder,
        "retrieval",
        of_epoch,
        retrieval_loss(model, training, log_expected_V, teacher),
        _probe_metric(model, probes, EventColumns.of_files(files), features.schema.exclude_seen),
        quiet,
        world,
        on_epoch,
        training.shard_model,
    )  # fmt: skip
    torch.manual_seed(seed + world.rank)  # other dropout and negatives in each process
    loop.resume(say)
    report = loop.run()
    model = _finished_model(loop, model, features, preset, counts)
    if not world.first:
        return report
    if model.memory is not None:
        say("counting which items go together, and fitting what that says")
    remember(model, features.files("train"))
    record["memory"] = fit_memory(model.eval(), features, seed, preset.ranking.held_out)
    return finish_training(step, model, report, **record, processes=world.size)
