"""``vivace optimize``: hyper-parameters of the retriever by Optuna, in a study file that can be taken up again.

Trials are judged by NDCG@10 of the validation requests and pruned by the log loss of the users held back from training,
epoch by epoch; the test requests are never looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from preprocessing.features import Features
from training.checkpoints import load_retrieval
from training.data import batches
from training.learn.retriever import train_retrieval
from training.metrics import metrics
from training.preset_rules import unread
from training.presets import Preset, flat, with_values
from training.scoring import SCORED, scored
from vivace.manifest import Progress, read_manifest, write_text
from vivace.run import Run

SPACE: dict[str, list[Any]] = {
    "retrieval.learning_rate": [1e-3, 8e-3, "log"],
    "retrieval.label_smoothing": [0.0, 0.2],
    "encoder.dropout": [0.0, 0.5],
    "encoder.layers": [1, 3, "int"],
    "encoder.position_bias": ["none", "relative", "choice"],
}


def suggest(trial: optuna.Trial, space: dict[str, list]) -> dict[str, Any]:
    """One value for each name of ``space``: [low, high], [low, high, "log"], [low, high, "int"] or [..., "choice"]."""
    values: dict[str, Any] = {}
    for name, (*limits, kind) in ((n, v if isinstance(v[-1], str) else [*v, ""]) for n, v in space.items()):
        if kind == "choice":
            values[name] = trial.suggest_categorical(name, limits)
        elif kind == "int":
            values[name] = trial.suggest_int(name, *limits)
        elif kind in ("", "log"):
            values[name] = trial.suggest_float(name, *limits, log=kind == "log")
        else:
            raise ValueError(
                f"hyper-parameter space: {name}: expected 'log', 'int' or 'choice' at the end, got {kind!r}"
            )
    return values


def check_values(name: str, values: Any, preset: Preset) -> None:
    """Raises ValueError for a range that no value can be drawn from, or whose values ``preset`` refuses."""
    match values:
        case [int() | float() as low, int() | float() as high] if low <= high:
            pass
        case [int() | float() as low, int() | float() as high, "log" | "int" as kind] if low <= high:
            if kind == "log" and low <= 0:
                raise ValueError(f"hyper-parameter space: {name}: expected a low above 0 of a log range, got {low}")
        case [_, *_, "choice"]:
            pass
        case _:
            raise ValueError(
                f'hyper-parameter space: {name}: expected [low, high], [low, high, "log"], [low, high, "int"] or '
                f'[value, ..., "choice"], got {values!r}'
            )
    kind = values[-1] if isinstance(values[-1], str) else ""
    if kind != "choice" and any(isinstance(value, bool) for value in values):
        raise ValueError(f"hyper-parameter space: {name}: expected numbers as ends of a range, got {values!r}")
    if name.startswith(("ranker.", "ranking.")):
        raise ValueError(
            f"hyper-parameter space: {name}: expected a field of encoder or retrieval, as the retriever alone is "
            "trained and judged"
        )
    ends = values[:-1] if kind in ("choice", "int") else [float(end) for end in values[:2]]  # as they are drawn
    for end in ends:
        try:
            with_values(preset, {name: end})
        except ValueError as error:
            raise ValueError(f"hyper-parameter space: {name} {values}: {error}") from None


def default_space(preset: Preset) -> dict[str, list[Any]]:
    """SPACE without what ``preset`` does not take, such as label smoothing where its loss has none."""
    space = dict(SPACE)
    for name, values in SPACE.items():
        try:
            check_values(name, values, preset)
        except ValueError:
            del space[name]
    return space


def drawn(trial: optuna.Trial, space: dict[str, list], preset: Preset) -> Preset:
    """``preset`` with a value for each name of ``space``, but those that nothing reads beside the others."""
    values = suggest(trial, space)
    whole = flat(preset) | values
    return with_values(preset, {name: value for name, value in values.items() if unread(name, whole) is None})


def check_space(study: optuna.Study, space: dict[str, list], preset: Preset, folder: Path) -> None:
    """Raises ValueError for a space that cannot be drawn from, and for one that differs from that of the study's
    earlier trials, whose values it would mix with others."""
    for name, values in space.items():
        check_values(name, values, preset)
    trial = optuna.create_study().ask()
    suggest(trial, space)
    for earlier in study.trials:
        if earlier.distributions and earlier.distributions != trial.distributions:
            names = sorted({*earlier.distributions, *trial.distributions})
            changed = [n for n in names if earlier.distributions.get(n) != trial.distributions.get(n)]
            raise ValueError(
                f"the study in {folder} searched another space (it differs in {', '.join(changed)}): give that space "
                f"again, or rename {folder} to begin a new study"
            )


def validation_ndcg(features: Features, preset: Preset, root: Path) -> float:
    """NDCG@10 of the retriever on the validation requests, all items ranked."""
    model = load_retrieval(features, preset, root)
    heads = [h.name for h in features.schema.heads]
    ranks = []
    with torch.no_grad():
        for request in batches.requests(features.files("valid"), heads, preset.encoder.window, SCORED):
            ranks.append(scored(model, request, features.schema.exclude_seen)[0].cpu().numpy())
    return metrics(np.concatenate(ranks))["NDCG@10"]


def optimize(
    features: Features,
    preset: Preset,
    root: Path,
    seed: int,
    trials: int,
    say: Progress,
    space: dict[str, list] | None = None,
) -> optuna.Study:
    """Runs ``trials`` more trials of the study in ``root/optimized``; writes best.json and two plots."""
    folder = Run(root).optimized
    searched: dict[str, list[Any]] = space or default_space(preset)
    folder.mkdir(parents=True, exist_ok=True)
    prepared = read_manifest(features.folder, "vivace prepare")["key"]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "study.log"))),
        study_name=f"retrieval-{prepared}",
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed + len(_earlier(folder))),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
        load_if_exists=True,
    )

    check_space(study, searched, preset, folder)

    def objective(trial: optuna.Trial) -> float:
        try:
            chosen = drawn(trial, searched, preset)
        except ValueError as error:  # values that do not fit each other, such as a width and heads
            say(f"trial {trial.number}: not run: {error}")
            raise optuna.TrialPruned from None
        trial_root = folder / f"trial-{trial.number}"
        train_retrieval(features, chosen, trial_root, seed, say, quiet=True, on_epoch=_pruner(trial))
        value = validation_ndcg(features, chosen, trial_root)
        say(f"trial {trial.number}: validation NDCG@10 {value:.4f} {trial.params}")
        return value

    study.optimize(objective, n_trials=trials, show_progress_bar=False)
    done = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    if done:
        best = {"value": study.best_value, "values": study.best_params, "trial": study.best_trial.number}
        write_text(folder / "best.json", json.dumps({**best, "trials": len(study.trials)}, indent=2))
        _plots(study, folder)
    return study


def _earlier(folder: Path) -> list[Path]:
    return list(folder.glob("trial-*"))


def _pruner(trial: optuna.Trial) -> Callable[[dict[str, float]], None]:
    def report(entry: dict[str, float]) -> None:
        trial.report(-entry["log_loss"], int(entry["epoch"]))
        if trial.should_prune():
            raise optuna.TrialPruned

    return report


def _plots(study: optuna.Study, folder: Path) -> None:
    """What each trial reached, pruned ones apart, and the reached value over each parameter."""
    from matplotlib.figure import Figure

    done = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    names = sorted({n for t in done for n in t.params})
    figure = Figure(figsize=(4 * (len(names) + 1), 3.4), layout="constrained")
    axes = figure.subplots(1, len(names) + 1, squeeze=False)[0]
    axes[0].plot([t.number for t in done], [t.value for t in done], "o", label="finished")
    pruned = [t.number for t in study.trials if t.state == optuna.trial.TrialState.PRUNED]
    floor = min(float(t.value or 0.0) for t in done)
    axes[0].plot(pruned, [floor] * len(pruned), "x", color="tab:gray", label="pruned")
    axes[0].set(xlabel="trial", ylabel="validation NDCG@10")
    axes[0].legend()
    for axis, name in zip(axes[1:], names, strict=True):
        axis.plot([str(t.params[name]) if isinstance(t.params[name], str) else t.params[name] for t in done],
                  [t.value for t in done], "o")  # fmt: skip
        axis.set_xlabel(name)
        if "rate" in name:
            axis.set_xscale("log")
    figure.savefig(folder / "study.png", dpi=110)
