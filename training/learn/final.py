"""``vivace train --final``: the judged models, fitted once more on every event of the log, those held out too. It is
what is served.

Nothing of it can be judged on the log, as it has learned all of it: epochs, the numbers of the session memory, the
ranker and its calibration are those that were chosen beforehand. The retriever goes on from the judged one, so that the
ranker, which reads its vectors, still knows them: trained from another start they would mean something else.
"""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preprocessing.caps import learned_from
from preprocessing.features import Features
from preprocessing.sequences import WHOLE
from training.checkpoints import WEIGHTS, build_ranker, device, load_ranker, load_retrieval
from training.data.columns import EventColumns
from training.data.counters import popularity
from training.distributed import ALONE
from training.learn.loop import Loop, LoopConfig
from training.learn.memory import remember
from training.learn.objectives import log_expected_counts, retrieval_loss
from training.learn.retriever import training_windows
from training.learn.warm_start import finish_unseen
from training.models.ranking import RankingModel
from training.models.retrieval import RetrievalModel
from training.presets import Preset, recorded_fields
from vivace.contract import FIRST_ID
from vivace.manifest import Progress, Step
from vivace.run import FEATURES, FINAL, RANKING, RETRIEVAL, Run

RATE = 0.25  # of the learning rate that the judged model had
OWN = ("item.", "popularity", "follower_ids", "follower_weights")  # of a ranker: read from retriever and counts


def chosen_epochs(manifest: dict[str, Any]) -> int:
    """Epochs after which the judged retriever's weights were kept: those of the smallest loss on the users held back,
    the last ones where none was measured."""
    epochs = manifest["results"]["epochs"]
    losses = [entry.get("log_loss", math.inf) for entry in epochs]
    best = min(range(len(epochs)), key=lambda i: losses[i])
    return int(epochs[best]["epoch"]) if math.isfinite(losses[best]) else len(epochs)


def _fit_retriever(
    model: RetrievalModel, features: Features, preset: Preset, counts: np.ndarray, epochs: int, step: Step, quiet: bool
) -> dict[str, Any]:
    """Goes on with the judged ``model`` for ``epochs`` over all events; the loop's report."""
    training = preset.retrieval
    columns = EventColumns.read_by(model)
    of_epoch, steps = training_windows(features.files(WHOLE), preset, step.seed, ALONE, columns)
    model.popularity.copy_(torch.tensor(counts))
    model.remembers = False
    loop = Loop(
        model,
        LoopConfig(
            epochs=epochs, steps_per_epoch=steps, learning_rate=RATE * training.learning_rate,
            weight_decay=training.weight_decay, warmup_steps=training.warmup_steps, clip_norm=training.clip_norm,
            checkpoint_s=training.checkpoint_s, seed=step.seed, ema=training.ema,
        ),
        step.folder,
        FINAL,
        of_epoch,
        retrieval_loss(model, training, log_expected_counts(torch.tensor(counts), training).to(device())),
        dict,  # nothing is held back
        quiet,
    )  # fmt: skip
    loop.resume()
    report = loop.run()
    model.remembers = True
    finish_unseen(model, counts, features, training)
    remember(model, features.files(WHOLE))
    return report


def _refreshed(judged: RankingModel, features: Features, preset: Preset, retriever: RetrievalModel) -> RankingModel:
    """The judged ranker over the new retriever's vectors and the counts of all events."""
    model = build_ranker(features, preset, retriever, WHOLE)
    kept = {name: value for name, value in judged.state_dict().items() if not name.startswith(OWN)}
    missing = model.load_state_dict(kept, strict=False).missing_keys
    assert all(name.startswith(OWN) for name in missing), missing
    return model


def train_final(features: Features, preset: Preset, root: Path, say: Progress, quiet: bool = False) -> dict[str, Any]:
    """Writes ``artifacts/<name>/final`` unless it is there; returns its manifest. Raises FileNotFoundError or
    StaleError where the judged models are not there, or belong to other features."""
    run = Run(root, features.folder)
    judged = {name: run.manifest(name) for name in (RETRIEVAL, RANKING)}
    inputs = {FEATURES: run.key(FEATURES), **{name: manifest["key"] for name, manifest in judged.items()}}
    epochs = chosen_epochs(judged[RETRIEVAL])
    config = {"training": recorded_fields(preset.retrieval), "epochs": epochs, "rate": RATE}
    step = Step(run.step(FINAL), "final fit", config, judged[RETRIEVAL]["seed"], inputs)
    if (manifest := step.finished(say, "final fit is there")) is not None:
        return manifest
    started = time.monotonic()
    step.keep_only_own()
    torch.manual_seed(step.seed)
    features = learned_from(features, preset.retrieval.caps, step.folder / "learned")
    counts = popularity(features.files(WHOLE), features.item_count())
    say(f"final fit on all {int(counts.sum()):,} events: {epochs} epochs, as chosen on validation")
    retriever = load_retrieval(features, preset, root)
    report = _fit_retriever(retriever, features, preset, counts, epochs, step, quiet)
    ranker = _refreshed(load_ranker(features, preset, root), features, preset, retriever)
    for folder, model in ((run.final.retrieval, retriever), (run.final.ranking, ranker)):
        folder.mkdir(exist_ok=True)
        torch.save(model.state_dict(), folder / WEIGHTS)
    (step.folder / "checkpoint.pt").unlink(missing_ok=True)
    shutil.rmtree(step.folder / "learned", ignore_errors=True)
    return step.finish(
        time.monotonic() - started, epochs=report["epochs"], chosen_epochs=epochs, events=int(counts[FIRST_ID:].sum()),
        card=f"final fit on all events: {epochs} epochs chosen on validation", device=str(device()),
    )  # fmt: skip
