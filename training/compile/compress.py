"""``vivace compress``: a smaller variant of a trained run: pruned, taught by the whole model, compiled, judged.

``artifacts/<name>/compressed/<variant>`` is a run like any other (``vivace serve --name <name>/compressed/<variant>``),
which shares the features and the feature store of the run it came from.
"""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from preprocessing.features import Features
from training.checkpoints import WEIGHTS, load_retrieval
from training.compile.export import CompileConfig, compile_models
from training.compile.prune import Target, measure, prune
from training.data import batches as data
from training.data.counters import popularity
from training.judge.evaluate import evaluate
from training.judge.gate import BOUND
from training.learn.constraints import Constraint
from training.learn.distill import Distillation, Teacher
from training.learn.objectives import log_expected_counts, retrieval_loss
from training.learn.ranker import train_ranker
from training.learn.retriever import train_retrieval
from training.models.ranking import RankerConfig
from training.presets import Preset
from vivace.manifest import Progress, Step, read_manifest

FOLDER = "compressed"
MEASURED_BATCHES = 20


@dataclass(frozen=True)
class SmallerRanker:
    """Sizes of the ranker (see RankerConfig), which is trained anew on the smaller retriever; 0 or "": as before."""

    memory: int = 0
    heads: int = 0
    followers: int = 0
    mixture: str = ""

    def of(self, config: RankerConfig) -> RankerConfig:
        return replace(config, **{name: value for name, value in asdict(self).items() if value})


@dataclass(frozen=True)
class Compression:
    """What becomes of a run. ``target`` sizes of the retriever and ``ranker`` sizes of the ranker; ``fresh``: the small
    retriever starts as a new one does and not from the slices of the large one; ``constraint`` on its matrices;
    ``epochs`` of recovery under ``distillation``, with ``learning_rate`` and ``dropout`` (a pruned model has less to
    spare); ``precision`` of the engine; ``bound`` of the quality gate."""

    target: Target = field(default_factory=Target)
    ranker: SmallerRanker = field(default_factory=SmallerRanker)
    fresh: bool = False
    constraint: Constraint = field(default_factory=Constraint)
    epochs: int = 4
    learning_rate: float = 3e-3
    dropout: float = 0.1
    distillation: Distillation = field(default_factory=Distillation)
    precision: str = "fp32"
    bound: float = BOUND
    force: bool = False


def prune_retriever(
    features: Features, preset: Preset, root: Path, out: Path, target: Target, seed: int, say: Progress
) -> dict[str, Any]:
    """Measures what every part of ``root``'s retriever is worth and writes the pruned one to ``out``/pruned, to be
    taken up by training; returns its manifest, with the importance of layers and heads."""
    inputs = {"features": read_manifest(features.folder, "vivace prepare")["key"]}
    inputs["retrieval"] = read_manifest(root / "retrieval", "vivace train")["key"]
    config = target.of(preset.encoder)
    step = Step(out / "pruned", "prune", {"encoder": asdict(config), "target": asdict(target)}, seed, inputs)
    if step.done():
        assert step.manifest is not None
        return step.manifest
    started = time.monotonic()
    step.reset()
    model, c = load_retrieval(features, preset, root), preset.retrieval
    counts = torch.tensor(popularity(features.files("train"), features.item_count()))
    log_expected = log_expected_counts(counts, c).to(model.bias.device)
    plain = replace(c, adversarial=0.0)
    epoch = data.training_batches(
        features.files("train"), preset.encoder.history, c.batch_size, seed, 0, timed=preset.encoder.time_bias
    )
    batches = list(itertools.islice(epoch, MEASURED_BATCHES))
    found = measure(model, batches, lambda m, batch: retrieval_loss(m, plain, log_expected)(batch)[0])
    small = prune(model, found, target)
    torch.save(small.state_dict(), step.folder / WEIGHTS)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    say(f"pruned: {before:,} to {after:,} parameters")
    return step.finish(
        time.monotonic() - started, parameters=after, layers=found.layers.tolist(), heads=found.heads.tolist()
    )


def compress(
    features: Features,
    preset: Preset,
    root: Path,
    variant: str,
    config: Compression,
    seed: int,
    say: Progress,
    quiet: bool = False,
) -> dict[str, Any]:
    """Makes (or finds) the variant and publishes it in its own model repository; returns what ``compile`` recorded.
    Raises GateError where it lost more than ``config.bound``."""
    read_manifest(root / "evaluation", "vivace evaluate")  # the reference of the gate
    out = root / FOLDER / variant
    out.mkdir(parents=True, exist_ok=True)
    for shared in ("features", "feature_store"):
        link = out / shared
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(root / shared, out))
    start_from = None
    if not config.fresh:
        prune_retriever(features, preset, root, out, config.target, seed, say)
        start_from = out / "pruned"
    encoder = replace(config.target.of(preset.encoder), dropout=config.dropout)
    if config.fresh and encoder.width % encoder.heads == 0:
        encoder = replace(encoder, head_width=0)  # the heads of a large model are too wide for a small one
    small = replace(
        preset,
        encoder=encoder,
        retrieval=replace(preset.retrieval, epochs=config.epochs, learning_rate=config.learning_rate),
        ranker=config.ranker.of(preset.ranker),
    )
    key = read_manifest(root / "retrieval", "vivace train")["key"]
    teacher = Teacher(load_retrieval(features, preset, root), config.distillation, key)
    train_retrieval(
        features, small, out, seed, say, quiet, start_from=start_from, teacher=teacher, constraint=config.constraint
    )
    train_ranker(features, small, out, seed, say, quiet=quiet)
    evaluate(features, small, out, seed, say)
    how = CompileConfig(config.precision, reference=root / "evaluation", bound=config.bound, force=config.force)
    return compile_models(features, small, out, seed, say, how)
