"""Seeds and exact resume: an interrupted run ends where an uninterrupted one does. The loss falls as recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import wait_until
from training.data import batches
from training.distributed import Parallel
from training.learn.loop import Loop, LoopConfig
from training.learn.objectives import log_expected_counts, retrieval_loss
from training.models.retrieval import RetrievalModel
from training.presets import tiny
from training.tracking import WANDB


def _loop(features, folder: Path, metric=lambda: {"log_loss": 0.0}, patience: int = 0, epochs: int = 2) -> Loop:
    preset = tiny()
    torch.manual_seed(5)
    items = features.item_count()
    model = RetrievalModel(preset.encoder, items, torch.ones(items))
    folder.mkdir(parents=True, exist_ok=True)
    windows = lambda epoch: batches.training_batches(features.files("train"), 20, 32, 5, epoch)  # noqa: E731
    steps = sum(1 for _ in windows(0))
    config = LoopConfig(
        epochs=epochs, steps_per_epoch=steps, learning_rate=3e-3, warmup_steps=5, patience=patience, checkpoint_s=1e9,
        seed=5, ema=0.9,
    )  # fmt: skip
    return Loop(
        model,
        config,
        folder,
        "test",
        windows,
        retrieval_loss(model, preset.retrieval, log_expected_counts(torch.ones(items), preset.retrieval)),
        metric,
        quiet=True,
    )


def test_resume_is_exact(features, tmp_path):
    whole = _loop(features, tmp_path / "whole")
    whole.run()
    part = _loop(features, tmp_path / "part")
    part.run(stop_after_steps=13)
    resumed = _loop(features, tmp_path / "part")
    torch.manual_seed(999)  # the checkpoint brings its own generator state
    assert resumed.resume()
    resumed.run()
    assert [e["loss"] for e in resumed.history] == [e["loss"] for e in whole.history]
    for mine, reference in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, reference)


def test_loss_falls_and_the_seed_fixes_it(features, tmp_path):
    reports = [_loop(features, tmp_path / name).run() for name in ("a", "b")]
    losses = [[e["loss"] for e in r["epochs"]] for r in reports]
    assert losses[0] == losses[1]
    assert losses[0][1] < losses[0][0] - 0.1


def test_early_stopping_returns_to_the_best(features, tmp_path):
    losses = iter([0.3, 0.4, 0.5, 0.1])
    loop = _loop(features, tmp_path, metric=lambda: {"log_loss": next(losses)}, patience=2, epochs=4)
    report = loop.run()
    assert report["stopped_early"] and len(report["epochs"]) == 3
    snapshot = loop.best_state["items.id.weight"]
    assert torch.equal(loop.model.items.id.weight, snapshot)


def test_a_loss_that_is_not_finite_is_named(features, tmp_path):
    loop = _loop(features, tmp_path)
    loop.loss = Parallel(loop.model, lambda batch: (loop.model.bias * float("nan")).sum(), batches.ALONE)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        loop.run()


def _offline_losses(file: Path) -> list[float]:
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    store, losses = DataStore(), []
    store.open_for_scan(str(file))
    while (raw := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record.FromString(raw)
        items = {i.key or i.nested_key[0]: i.value_json for i in record.history.item}
        losses += [float(items["test/loss"])] if "test/loss" in items else []
    store.close()
    return losses


def test_epochs_are_tracked(features, tmp_path, monkeypatch):
    """TensorBoard's files, and Weights & Biases offline, hold the losses of the report."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv(WANDB, "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    losses = [e["loss"] for e in _loop(features, tmp_path).run()["epochs"]]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("test/loss")] == pytest.approx(losses)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    wait_until(lambda: len(_offline_losses(file)) >= len(losses), "as many losses as epochs")  # another process writes
    assert _offline_losses(file) == pytest.approx(losses)
