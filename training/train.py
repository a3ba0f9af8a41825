"""``vivace train``: the retriever on the training events; then ``train_ranking``: the ranker on the validation events.

Axis legend: B requests, T history events, N candidates.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from preprocessing.contract import FIRST_ID, ITEM, PADDING_ID, TIME
from preprocessing.prepare import Features
from training import data
from training.adapt import Adaptation, freeze_for, merge
from training.attack import adversarial
from training.constraints import Constraint, constrain, release
from training.counters import cooccurrence_embeddings, popularity
from training.distill import Teacher
from training.distributed import World, whole
from training.evaluation import mean_ndcg, ranks
from training.item_table import item_attributes, nearest_seen
from training.loop import Loop, LoopConfig
from training.losses import full_softmax, gbce, sampled_softmax
from training.presets import PRESET, Preset, RetrievalTraining
from training.retrieval_model import EXCLUDED, MASKED, RetrievalModel
from vivace.artifacts import Step, read_manifest, write_text

Progress = Callable[[str], None]
LAST_ONLY = 0.2  # share of the masked encoder's windows that hide only the newest item
START_SCALE = 0.1  # root mean square of a starting item embedding
RARE_SHARE = 0.25  # the least frequent quarter of the items counts as rare
WEIGHTS = "weights.pt"
SCORED = 256  # requests scored at once in evaluation


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# -- retrieval ---------------------------------------------------------------------------------------
def hold_back(files: list[Path], folder: Path, users: int, seed: int) -> tuple[list[Path], list[np.ndarray]]:
    """Copies of the training files in which ``users`` random users miss their last event, and those users' whole
    training sequences, ids and times int64 [n, 2]: what early stopping watches, for one training event each."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = [pq.read_metadata(f).num_rows for f in files]
    chosen = np.random.default_rng(seed).permutation(sum(rows))[: min(users, sum(rows) // 4)]
    probes, out, start = [], [], 0
    for file, count in zip(files, rows, strict=True):
        table = pq.read_table(file, columns=[ITEM, TIME])
        columns = [table[name].combine_chunks() for name in (ITEM, TIME)]
        flat = np.stack([column.flatten().to_numpy() for column in columns], 1)
        own = set((chosen[(chosen >= start) & (chosen < start + count)] - start).tolist())
        lists = np.split(flat, columns[0].offsets.to_numpy()[1:-1])
        for i in own:
            if len(lists[i]) >= 3 and lists[i][-1, 0] >= FIRST_ID:
                probes.append(lists[i])
                lists[i] = lists[i][:-1]
        lengths = np.cumsum([0, *(len(x) for x in lists)])
        offsets, left = pa.array(lengths, pa.int32()), np.concatenate(lists)
        table = pa.table({n: pa.ListArray.from_arrays(offsets, left[:, i].copy()) for i, n in enumerate((ITEM, TIME))})
        pq.write_table(table, folder / file.name, row_group_size=max(count, 1))
        out.append(folder / file.name)
        start += count
    return out, probes


def item_loss(
    model: RetrievalModel, config: RetrievalTraining, log_expected_V: Tensor
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Loss of predicting items ``t`` int64 [P] from encodings ``h`` [P, D] with the item table [V, D]. An item without
    a training event is no negative: it would be pushed down, and its words with it."""
    sampling_V, items = log_expected_V.exp(), len(log_expected_V)
    unseen_V = torch.where(model.popularity > 0, 0.0, MASKED).to(log_expected_V.device)
    unseen_V[:FIRST_ID] = 0.0

    def loss(h: Tensor, t: Tensor, table: Tensor) -> Tensor:
        bias = model.bias + unseen_V
        if config.loss == "full":
            return full_softmax(h, table, bias, t, FIRST_ID, config.label_smoothing)
        if config.loss == "gbce":
            negatives = torch.randint(FIRST_ID, items, (config.negatives,), device=t.device)
            return gbce(h, table, bias, t, negatives, items - FIRST_ID, config.calibration)
        sample = torch.multinomial(sampling_V, config.negatives, replacement=True)
        return sampled_softmax(h, table, bias, t, sample, log_expected_V)

    return loss


def retrieval_loss(
    model: RetrievalModel, config: RetrievalTraining, log_expected_V: Tensor, teacher: Teacher | None = None
) -> Callable[..., Any]:
    of_items = item_loss(model, config, log_expected_V)

    def next_item(batch: Tensor) -> tuple[Tensor, Tensor]:
        (window, times), table = data.ids_and_times(batch.to(model.bias.device)), model.table()
        inputs, targets, seen = window[:, :-1], window[:, 1:], None if times is None else times[:, :-1]
        keep = (inputs != PADDING_ID) & (targets >= FIRST_ID)

        def at(moved: Tensor) -> Tensor:
            states = model.encode(inputs, moved, seen)[keep].float()
            loss = of_items(states, targets[keep], moved)
            return loss if teacher is None else loss + teacher.loss(states, moved, model.bias, inputs, keep)

        if not config.adversarial:
            return at(table), keep.sum()
        return adversarial(at, table, config.adversarial, config.adversarial_weight), keep.sum()

    def masked_item(batch: Tensor) -> tuple[Tensor, Tensor]:
        (window, times), table = data.ids_and_times(batch.to(model.bias.device)), model.table()
        hidden = hide(window, config.mask_share)
        encoded = model.encode_masked(window, hidden, table, times)[hidden]
        return of_items(encoded.float(), window[hidden], table), hidden.sum()

    return masked_item if model.masked else next_item


def hide(window_BT: Tensor, share: float) -> Tensor:
    """Which items of a window the masked encoder must guess, bool [B, T]: a random ``share``, or in some rows
    only the newest one, which is what it is asked for when it serves."""
    real = window_BT >= FIRST_ID
    drawn = torch.rand(window_BT.shape, device=window_BT.device) < share
    last = torch.zeros_like(real)
    last[:, -1] = True
    only_last = torch.rand(len(window_BT), 1, device=window_BT.device) < LAST_ONLY
    hidden = torch.where(only_last, last, drawn) & real
    return hidden | (last & real & ~hidden.any(1, keepdim=True))


def _probe_metric(
    model: RetrievalModel, probes: list[np.ndarray], exclude_seen: bool
) -> Callable[[], dict[str, float]]:
    def metric() -> dict[str, float]:
        found, losses = [], []
        with torch.no_grad():
            for start in range(0, len(probes), SCORED):
                part = probes[start : start + SCORED]
                targets = torch.tensor([int(p[-1, 0]) for p in part])
                request = data.of_sequences([p[:-1] for p in part], model.config.history, targets, {})
                rank, scores, _ = scored(model, request, exclude_seen)
                found.append(rank)
                losses.append(F.cross_entropy(scores, request.target_B.to(scores.device), reduction="none"))
        if not found:
            return {"log_loss": 0.0}
        loss = torch.cat(losses)
        live = loss < -EXCLUDED / 2  # a target that was seen before has no score
        return {"log_loss": float(loss[live].mean()) if live.any() else 0.0, "NDCG@10": mean_ndcg(found)}

    return metric


def scored(model: RetrievalModel, request: data.Requests, exclude_seen: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(rank of the target [B], scores [B, V], encoded history [B, T, D])."""
    where = model.bias.device
    history = request.history_BT.to(where)
    exclude = request.exclude(len(model.bias), exclude_seen).to(where)
    encoded = model.encode(history, times=request.time_BT.to(where))
    scores = model.scores(history, encoded, exclude)
    return ranks(scores, request.target_B.to(where)), scores, encoded


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
    from training.pretrain import take_up

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
        inputs["text"] = read_manifest(features.folder.parent / "text", "vivace pretrain --objective text")["key"]
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
    p = torch.tensor((counts + 1) ** c.negative_power)
    p[:FIRST_ID] = 1e-12
    log_expected = (c.negatives * p / p.sum()).log().float().to(device())
    loop = Loop(
        model,
        LoopConfig(
            c.epochs, steps, c.learning_rate, c.weight_decay, c.warmup_steps, c.clip_norm, c.patience,
            c.checkpoint_s, seed, c.ema,
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


def start_from_counts(model: RetrievalModel, files: list[Path], counts: np.ndarray) -> None:
    """Item embeddings from co-occurrence, item biases from popularity; items without events keep their random start."""
    vectors = torch.from_numpy(cooccurrence_embeddings(files, len(counts), model.config.width, START_SCALE))
    with torch.no_grad():
        weight = model.items.id.weight
        seen = (vectors != 0).any(1)[:, None]
        weight.copy_(torch.where(seen, vectors, weight.cpu()))
        model.bias.copy_(torch.tensor(np.log((counts + 1) / (counts + 1).mean()), dtype=model.bias.dtype))


def free_unseen(model: RetrievalModel, counts: np.ndarray, features: Features, by_neighbours: bool) -> None:
    """Items without a training event get the weighted mean of their nearest seen items by text and attributes, with
    the length and the bias that those have on average. Where nothing is near (or without ``by_neighbours``) the id
    embedding is zero, so that attributes and words speak alone, and the bias that of a rare item."""
    unseen = torch.from_numpy(counts == 0)
    unseen[:FIRST_ID] = False
    if not unseen.any():
        return
    rare = torch.from_numpy((counts > 0) & (counts <= np.quantile(counts[counts > 0], RARE_SHARE)))
    training = model.training
    model.eval()
    with torch.no_grad():
        weight, bias = model.items.id.weight, model.bias
        weight[unseen] = 0.0
        bias[unseen] = bias[rare.to(bias.device)].median()
        if by_neighbours:
            own, near, shares = (torch.from_numpy(x).to(bias.device) for x in nearest_seen(features, counts > 0))
            table = model.table()  # what attributes and words say of an unseen item, as its id says nothing
            mean = (table[near] * shares[:, :, None]).sum(1)
            length = (table[near].norm(dim=2) * shares).sum(1, keepdim=True)
            weight[own] = mean / mean.norm(dim=1, keepdim=True).clamp_min(1e-9) * length - table[own]
            bias[own] = (bias[near] * shares).sum(1)
    model.train(training)


def keep_only_own_checkpoint(step: Step) -> None:
    """A checkpoint of another configuration is not taken up."""
    step.reset()
    mark = step.folder / "checkpoint.key"
    if not mark.exists() or mark.read_text() != step.key:
        (step.folder / "checkpoint.pt").unlink(missing_ok=True)
        mark.write_text(step.key)


def finish_training(step: Step, model: torch.nn.Module, report: dict[str, Any], **more: Any) -> dict[str, Any]:
    torch.save(model.state_dict(), step.folder / WEIGHTS)
    (step.folder / "checkpoint.pt").unlink(missing_ok=True)
    shutil.rmtree(step.folder / "parts", ignore_errors=True)
    seconds = report.pop("seconds")
    return step.finish(seconds, **report, **more, device=str(device()))


def load_retrieval(features: Features, preset: Preset, root: Path) -> RetrievalModel:
    read_manifest(root / "retrieval", "vivace train")
    items = features.item_count()
    model = RetrievalModel(preset.encoder, items, torch.zeros(items), item_attributes(features, preset.encoder))
    model.load_state_dict(torch.load(root / "retrieval" / WEIGHTS, weights_only=True, map_location="cpu"))
    return model.eval().to(device())
