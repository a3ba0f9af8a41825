"""Trained models on disk: checkpoints of a training that goes on, weights of one that is done."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from preprocessing.features import Features
from preprocessing.sequences import WHOLE
from training.data.counters import item_tables
from training.models.item_table import item_attributes
from training.models.ranking import RankingModel
from training.models.retrieval import RetrievalModel
from training.presets import Preset
from vivace.manifest import Step
from vivace.run import FINAL, RANKING, RETRIEVAL, Run

WEIGHTS = "weights.pt"


def device() -> torch.device:
    """Where models are trained and scored: this process's GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def limit_threads(threads: int) -> None:
    """PyTorch works in so many threads from here on."""
    torch.set_num_threads(threads)


def keep_only_own_checkpoint(step: Step) -> None:
    """A checkpoint of another configuration is not taken up."""
    step.reset()
    mark = step.folder / "checkpoint.key"
    if not mark.exists() or mark.read_text() != step.key:
        (step.folder / "checkpoint.pt").unlink(missing_ok=True)
        mark.write_text(step.key)


def finish_training(step: Step, model: torch.nn.Module, report: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Saves the weights, clears what only a training that goes on needs, and writes the manifest."""
    torch.save(model.state_dict(), step.folder / WEIGHTS)
    (step.folder / "checkpoint.pt").unlink(missing_ok=True)
    shutil.rmtree(step.folder / "parts", ignore_errors=True)
    seconds = report.pop("seconds")
    return step.finish(seconds, **report, **more, device=str(device()))


def load_retrieval(features: Features, preset: Preset, root: Path, final: bool = False) -> RetrievalModel:
    """The trained retriever of a run; ``final``: as fitted again on all events. Raises StaleError if it was trained on
    other features than ``features``, or if the final fit is of another one."""
    run = Run(root, features.folder)
    run.manifest(FINAL if final else RETRIEVAL)
    items = features.item_count()
    attributes = item_attributes(features, preset.encoder)
    model = RetrievalModel(preset.encoder, items, torch.zeros(items), attributes, features.context)
    folder = (run.final if final else run).retrieval
    model.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True, map_location="cpu"))
    return model.eval().to(device())


def build_ranker(
    features: Features,
    preset: Preset,
    retriever: RetrievalModel,
    part: str = "train",
    files: list[Path] | None = None,
) -> RankingModel:
    """An untrained ranker over ``retriever``'s items, whose counters are those of a part of the features, or of other
    ``files`` of sequences."""
    tables = item_tables(features, preset.ranker.followers, part, files)
    names = tuple(h.name for h in features.schema.heads)
    return RankingModel(preset.ranker, tables, retriever.cpu(), names, preset.ranking.weighting)


def load_ranker(
    features: Features, preset: Preset, root: Path, name: str = RANKING, final: bool = False
) -> RankingModel:
    """The trained ranker of a run. Raises StaleError if it was trained on another retriever or other features.
    ``final``: see ``load_retrieval``."""
    run = Run(root, features.folder)
    run.manifest(FINAL if final else name)
    retriever = load_retrieval(features, preset, root, final)
    model = build_ranker(features, preset, retriever, WHOLE if final else "train")
    folder = run.final.ranking if final else run.step(name)
    model.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True, map_location="cpu"))
    return model.eval().to(device())
