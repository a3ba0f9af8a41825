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
from typing import Any, Literal

import torch

from preprocessing.features import Features
from training.checkpoints import WEIGHTS, load_retrieval
from training.compile.compiler import CompileConfig, compile_models
from training.compile.prune import Importance, Target, measure, prune
from training.compile.quantize import Precision
from training.data import batches
from training.data.columns import EventColumns
from training.data.counters import popularity
from training.judge.evaluate import evaluate
from training.judge.gate import BOUND
from training.learn.constraints import Constraint
from training.learn.distill import Distillation, Teacher
from training.learn.objectives import log_expected_counts, retrieval_loss
from training.learn.ranker import train_ranker
from training.learn.retriever import train_retrieval
from training.models.ranking import RankerConfig
from training.models.retrieval import RetrievalModel
from training.presets import Preset
from vivace.checks import check_fields
from vivace.manifest import Progress, Step
from vivace.run import EVALUATION, FEATURES, RETRIEVAL, Run

MEASURED_BATCHES = 20


@dataclass(frozen=True, kw_only=True)
class SmallerRanker:
    """Sizes of the ranker (see RankerConfig), which is trained anew on the smaller retriever; 0 or "": as before."""

    memory: int = 0
    """Newest encoded events that it reads."""
    heads: int = 0
    """Attention heads."""
    followers: int = 0
    """Followers that are kept of an item."""
    mixture: Literal["", "mmoe", "ple", "shared"] = ""
    """How the task heads share experts."""

    def __post_init__(self) -> None:
        check_fields(self)

    def of(self, config: RankerConfig) -> RankerConfig:
        return replace(config, **{name: value for name, value in asdict(self).items() if value})


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What becomes of a run."""

    target: Target = field(default_factory=Target)
    """Sizes of the retriever."""
    ranker: SmallerRanker = field(default_factory=SmallerRanker)
    """Sizes of the ranker."""
    student: Preset | None = None
    """Sizes and training of a new small run that the whole one teaches, in the place of all that is pruned and
    recovered: of ``target``, ``ranker``, ``fresh``, ``epochs``, ``learning_rate`` and ``dropout``."""
    fresh: bool = False
    """Whether the small retriever starts as a new one does and not from the slices of the large one."""
    constraint: Constraint = field(default_factory=Constraint)
    """What the matrices of the retriever must be: sparse, or ready for eight bits."""
    epochs: int = 4
    """Epochs of recovery training."""
    learning_rate: float = 3e-3
    """Of the recovery."""
    dropout: float = 0.1
    """Of the recovery: a pruned model has less to spare."""
    distillation: Distillation = field(default_factory=Distillation)
    """What the whole model teaches beside the data."""
    precision: Precision = "fp32"
    """Number format of the engine."""
    bound: float = BOUND
    """Relative fall of NDCG@10, 0 to 1, that the quality gate lets through."""
    force: bool = False
    """Whether to publish what the gate refuses."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.student is not None and (self.target != Target() or self.ranker != SmallerRanker()):
            raise ValueError("--to: the preset gives all sizes; expected none beside it, such as --layers or --memory")

    def preset(self, whole: Preset) -> Preset:
        """The sizes and the training of the variant of a run of ``whole``. Raises ValueError for a student that reads
        more events than its teacher can."""
        if self.student is not None:
            events, most = self.student.encoder.history, whole.encoder.history
            if events > most:
                raise ValueError(f"--to: expected a history of at most the whole run's {most} events, got {events}")
            return self.student
        encoder = replace(self.target.of(whole.encoder), dropout=self.dropout)
        if self.fresh and encoder.width % encoder.heads == 0:
            encoder = replace(encoder, head_width=0)  # the heads of a large model are too wide for a small one
        training = replace(whole.retrieval, epochs=self.epochs, learning_rate=self.learning_rate)
        return replace(whole, encoder=encoder, retrieval=training, ranker=self.ranker.of(whole.ranker))


def _importance(features: Features, preset: Preset, model: RetrievalModel, seed: int) -> Importance:
    """What every part of a trained retriever is worth on the first batches of its training."""
    config = replace(preset.retrieval, adversarial=0.0, stochastic_length=0.0)
    counts = torch.tensor(popularity(features.files("train"), features.item_count()))
    log_expected = log_expected_counts(counts, config).to(model.bias.device)
    epoch = batches.training_batches(
        features.files("train"), preset.encoder.span, config.batch_size, seed, 0,
        columns=EventColumns.read_by(model),
    )  # fmt: skip
    windows = list(itertools.islice(epoch, MEASURED_BATCHES))
    return measure(model, windows, lambda part, batch: retrieval_loss(part, config, log_expected)(batch)[0])


def prune_retriever(
    features: Features, preset: Preset, root: Path, out: Path, target: Target, seed: int, say: Progress
) -> dict[str, Any]:
    """Measures what every part of ``root``'s retriever is worth and writes the pruned one to ``out``/pruned, to be
    taken up by training; returns its manifest, with the importance of layers and heads."""
    run, config = Run(root, features.folder), target.of(preset.encoder)
    inputs = {name: run.key(name) for name in (FEATURES, RETRIEVAL)}
    step = Step(out / "pruned", "prune", {"encoder": asdict(config), "target": asdict(target)}, seed, inputs)
    if step.done():
        assert step.manifest is not None
        return step.manifest
    started = time.monotonic()
    step.reset()
    model = load_retrieval(features, preset, root)
    importance = _importance(features, preset, model, seed)
    small = prune(model, importance, target)
    torch.save(small.state_dict(), step.folder / WEIGHTS)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    say(f"pruned: {before:,} to {after:,} parameters")
    return step.finish(
        time.monotonic() - started, parameters=after, layers=importance.layers.tolist(), heads=importance.heads.tolist()
    )


def _share(run: Run, variant: Run) -> None:
    """Makes the variant's folder, in which features and feature store are those of the whole run."""
    variant.root.mkdir(parents=True, exist_ok=True)
    for shared in (run.root / FEATURES, run.feature_store):
        link = variant.root / shared.name
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(shared, variant.root))


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
    Raises GateError where it lost more than ``config.bound``, StaleError where the run was made from other features."""
    run = Run(root, features.folder)
    run.manifest(EVALUATION)  # the reference of the gate
    out = run.variants / variant
    small, start_from = config.preset(preset), None
    _share(run, Run(out, features.folder))
    if not config.fresh and config.student is None:
        prune_retriever(features, preset, root, out, config.target, seed, say)
        start_from = out / "pruned"
    teacher = Teacher(load_retrieval(features, preset, root), config.distillation, run.key(RETRIEVAL))
    train_retrieval(
        features, small, out, seed, say, quiet, start_from=start_from, teacher=teacher, constraint=config.constraint
    )
    train_ranker(features, small, out, seed, say, quiet=quiet)
    evaluate(features, small, out, seed, say)
    how = CompileConfig(precision=config.precision, reference=root, bound=config.bound, force=config.force)
    return compile_models(features, small, out, seed, say, how)
