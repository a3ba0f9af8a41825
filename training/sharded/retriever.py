"""``vivace train --table-processes``: a retriever whose item table no process holds whole.

What comes out is what ``train_retrieval`` leaves: ``retrieval/weights.pt``, which every later step reads.
Axis legend: V item ids, D width.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from preprocessing.features import Features
from training.checkpoints import finish_training
from training.data.columns import EventColumns
from training.data.counters import cooccurrence_embeddings, popularity
from training.data.probes import hold_back
from training.distributed import World, device
from training.learn.loop import LoopConfig
from training.learn.retriever import compile_blocks, training_windows
from training.learn.warm_start import START_SCALE, finish_unseen
from training.models.retrieval import RetrievalModel
from training.presets import Preset, recorded_fields
from training.sharded.config import TableSharding
from training.sharded.loop import BEST, CHECKPOINT, ShardedLoop
from training.sharded.objective import Negatives, sharded_loss, sharded_metric
from training.sharded.table import ShardedItems, read_whole
from vivace.contract import FIRST_ID
from vivace.manifest import Progress, Step, read_manifest, write_text
from vivace.run import Run

WHOLE_TABLE = "table"  # folder of a step: the trained table, then the file it is read into


def for_sharding(preset: Preset) -> Preset:
    """``preset`` as it is trained with a sharded table: without an average of the weights, which would need a second
    table. Raises ValueError for what cannot be cut, with what to set instead."""
    encoder, training = preset.encoder, preset.retrieval
    refused = {
        "retrieval.loss 'full' scores every item each step: set --loss sampled or gbce": training.loss == "full",
        "encoder.family 'bert4rec' hides items of the table: choose another family": encoder.family == "bert4rec",
        "item attributes and texts need the whole table: set encoder.attributes and encoder.text_encoder to false and "
        "encoder.text_tokens to 0": encoder.attributes or bool(encoder.text_tokens) or encoder.text_encoder,
        "the session memory is a table of its own: set encoder.neighbours to 0": bool(encoder.neighbours),
        "retrieval.adversarial moves the whole table: set it to 0": bool(training.adversarial),
        "retrieval.stochastic_length is not read here: set it to 0": bool(training.stochastic_length),
        "retrieval.shard_model (FSDP) cuts the same table: set it to false": training.shard_model,
        f"encoder.width {encoder.width}: FBGEMM's rows need a multiple of 4": bool(encoder.width % 4),
    }
    if reasons := [reason for reason, applies in refused.items() if applies]:
        raise ValueError("--table-processes: " + "; ".join(reasons))
    return replace(preset, retrieval=replace(training, ema=0.0))


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """A process group for a world of one, as TorchRec needs one; nothing where there is one."""
    if dist.is_initialized():
        yield
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def dense_retriever(preset: Preset, features: Features | None = None) -> RetrievalModel:
    """The retriever without its item table: what is in every process. Its own rows and biases, of the special ids, are
    not used."""
    columns = None if features is None else features.context
    model = RetrievalModel(preset.encoder, FIRST_ID, torch.zeros(FIRST_ID), None, columns)
    model.items.id.weight.requires_grad_(False)
    model.bias.requires_grad_(False)
    return model


def _start(
    items: ShardedItems, features: Features, preset: Preset, counts: np.ndarray, seed: int, scratch: Path
) -> None:
    """As ``warm_start.start_from_counts``: the first process works the vectors out, each takes its rows of the file."""
    if preset.retrieval.start != "cooccurrence":
        items.start(seed)
        return
    file, world = scratch / "start.npy", items.world
    if world.first:
        scratch.mkdir(parents=True, exist_ok=True)
        vectors = cooccurrence_embeddings(features.files("train"), len(counts), items.width, START_SCALE)
        np.save(file, vectors.astype(np.float32))
    world.barrier()
    vectors = np.load(file, mmap_mode="r")
    biases = torch.from_numpy(np.log((counts + 1) / (counts + 1).mean()).astype(np.float32))
    items.start(seed, lambda first, last: torch.from_numpy(np.array(vectors[first:last])), biases)
    world.barrier()
    if world.first:
        file.unlink()


def whole_retriever(dense: RetrievalModel, rows_VD: Tensor, bias_V: Tensor, counts: np.ndarray) -> RetrievalModel:
    """The trained retriever as every later step knows it, over a table that may lie in a mapped file."""
    dense.items.id = nn.Embedding.from_pretrained(rows_VD, freeze=False, padding_idx=0)
    dense.bias = nn.Parameter(bias_V)
    dense.popularity = torch.from_numpy(counts).float()
    return dense


def _loop(
    features: Features, preset: Preset, step: Step, items: ShardedItems, model: RetrievalModel, counts: np.ndarray,
    quiet: bool,
) -> ShardedLoop:  # fmt: skip
    training, world = preset.retrieval, items.world
    parts = step.folder / "parts" / str(world.rank)
    files, probes = hold_back(features.files("train"), parts, training.probe_users, step.seed)
    world.barrier()
    of_epoch, steps = training_windows(files, preset, step.seed, world, EventColumns.read_by(model))
    negatives = Negatives(counts, training, step.seed)
    return ShardedLoop(
        items,
        negatives,
        model,
        LoopConfig(
            epochs=training.epochs, steps_per_epoch=steps, learning_rate=training.learning_rate,
            weight_decay=training.weight_decay, warmup_steps=training.warmup_steps, clip_norm=training.clip_norm,
            patience=training.patience, checkpoint_s=training.checkpoint_s, seed=step.seed,
        ),
        step.folder,
        "retrieval",
        of_epoch,
        sharded_loss(model, items, training, negatives),
        sharded_metric(model, items, probes, EventColumns.of_files(files), features.schema.exclude_seen),
        quiet,
        world,
    )  # fmt: skip


def train_sharded(
    features: Features,
    preset: Preset,
    root: Path,
    seed: int,
    sharding: TableSharding,
    world: World,
    say: Progress,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains (or resumes, or finds) ``artifacts/<name>/retrieval`` with its item table cut over the processes of
    ``world``, all of which call it and see the folder; returns the manifest, in other processes than the first the
    loop's report. The number of processes is no part of what the run is: it may change from start to start."""
    preset = for_sharding(preset)
    config = {
        "encoder": recorded_fields(preset.encoder), "training": recorded_fields(preset.retrieval),
        "table": {"optimizer": "row-wise Adagrad", "learning_rate": sharding.learning_rate},
    }  # fmt: skip
    inputs = {"features": read_manifest(features.folder, "vivace prepare")["key"]}
    step = Step(Run(root).retrieval, "train retrieval", config, seed, inputs)
    if world.first:
        root.mkdir(parents=True, exist_ok=True)
        write_text(Run(root).preset, json.dumps(asdict(preset), indent=2))
    if (manifest := step.finished(say, "retriever is there")) is not None:
        return manifest
    if world.first:
        step.keep_only_own()
    with process_group():
        world.barrier()
        torch.manual_seed(seed)
        counts = popularity(features.files("train"), features.item_count())
        model = dense_retriever(preset, features).to(device(world))
        if preset.retrieval.compiled:
            compile_blocks(model)
        items = ShardedItems(len(counts), preset.encoder.width, sharding, world)
        say(f"item table: {len(counts):,} rows over {world.size} processes, {items.held():,} of them in the first")
        loop = _loop(features, preset, step, items, model, counts, quiet)
        torch.manual_seed(seed + world.rank)  # other dropout in each process
        if not loop.resume(say):
            _start(items, features, preset, counts, seed, step.folder / "parts")
        report = loop.run()
        loop.write_table(step.folder / WHOLE_TABLE)
    if not world.first:
        return report
    return _finish(step, model.cpu(), counts, features, preset, report, sharding, world)


def _finish(
    step: Step, model: RetrievalModel, counts: np.ndarray, features: Features, preset: Preset, report: dict[str, Any],
    sharding: TableSharding, world: World,
) -> dict[str, Any]:  # fmt: skip
    """Puts the table together in a mapped file, saves the whole model and clears what only the training needed."""
    saved = step.folder / WHOLE_TABLE
    rows_VD, biases = read_whole(saved, len(counts), preset.encoder.width, saved)
    whole = whole_retriever(model, rows_VD, biases[:, 0].clone(), counts)
    finish_unseen(whole, counts, features, preset.retrieval)
    sizes = {"parameters": sum(p.numel() for p in whole.parameters())}
    record = {**sizes, "trained_parameters": sizes["parameters"], "start": {}, "memory": {}}
    manifest = finish_training(step, whole, report, **record, processes=world.size, table=asdict(sharding))
    for folder in (CHECKPOINT, BEST, WHOLE_TABLE):
        shutil.rmtree(step.folder / folder, ignore_errors=True)
    return manifest
