"""``vivace evaluate``: baselines, retriever, ranker and controls in one table, by full ranking of the test requests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from preprocessing.features import Features
from training.checkpoints import device, load_ranker, load_retrieval
from training.data import batches as data
from training.data.counters import follower_matrix, popularity
from training.learn.ranker import head_auc
from training.metrics import Collected, ranks, ranks_after
from training.models.retrieval import EXCLUDED
from training.presets import Preset
from training.scoring import candidates
from vivace.contract import FIRST_ID
from vivace.manifest import Progress, Step, read_manifest

RANKS = "ranks.npz"  # rank of every test request's target by method
POPULARITY, NEIGHBOUR = "popularity", "last-item neighbour"
RETRIEVAL, RANKED, CONTROL = "retrieval", "retrieval + ranking", "control: ranker without the extra label"
WITHOUT_TIMES = ", HISTORY without times"  # what a request that carries its own HISTORY gets of an encoder with times


def _baselines(
    features: Features, requests: data.Requests, counts: torch.Tensor, followers: Any
) -> dict[str, torch.Tensor]:
    """Scores [B, V] of the two baselines under the same exclusions; popularity breaks the neighbour's ties."""
    dead = requests.exclude(len(counts), features.schema.exclude_seen)
    popular = counts[None].expand(len(requests.histories), -1)
    last = np.array([int(h[-1]) for h in requests.histories])
    near = torch.from_numpy(np.asarray(followers[last].todense(), np.float32)) + popular * 1e-9
    return {
        n: torch.where(dead, torch.full_like(s, EXCLUDED), s) for n, s in ((POPULARITY, popular), (NEIGHBOUR, near))
    }


def protocol(features: Features) -> dict[str, Any]:
    """The choices that move figures more than most models do."""
    prepared = read_manifest(features.folder, "vivace prepare")
    return {
        "split": prepared["results"]["split"],
        "candidates ranked": f"all {features.item_count() - FIRST_ID} items of the vocabulary",
        "seen items": "filtered" if features.schema.exclude_seen else "not filtered",
        "ties": "broken at random, seeded by the request",
        "validation event": "label of the ranker only; input of both at test time",
        "targets out of vocabulary": "counted as misses",
        "sampled metrics": "none",
    }


def evaluate(features: Features, preset: Preset, root: Path, seed: int, say: Progress) -> dict[str, Any]:
    """Runs the step unless its artifact is there; returns its manifest with ``results`` table, gauc and protocol."""
    inputs = {n: read_manifest(root / n, "vivace train")["key"] for n in ("retrieval", "ranking")}
    names = {"ranking": RANKED}
    if (root / "ranking_control" / "manifest.json").exists():
        names["ranking_control"] = CONTROL
        inputs["ranking_control"] = read_manifest(root / "ranking_control", "vivace train")["key"]
    step = Step(root / "evaluation", "evaluate", {}, seed, inputs)
    if step.done():
        assert step.manifest is not None
        return step.manifest
    step.reset()
    retriever = load_retrieval(features, preset, root)
    rankers = {n: load_ranker(features, preset, root, n) for n in names}
    items, heads = features.item_count(), [h.name for h in features.schema.heads]
    counts = torch.tensor(popularity(features.files("train"), items), dtype=torch.float32)
    followers = follower_matrix(features.files("train"), items)
    found, done, oov = Collected(), 0, 0
    count = min(preset.ranker.candidates, items - FIRST_ID)
    for request in data.requests(features.files("test"), heads, preset.encoder.history, 256):
        for name, scores in _baselines(features, request, counts, followers).items():
            found.add_ranks(name, ranks(scores, request.target_B, request.number_B))
        rank, ids, scores, encoded = candidates(
            retriever, request, count, features.schema.exclude_seen, preset.ranker.memory
        )
        found.add_ranks(RETRIEVAL, rank)
        target = request.target_B.to(ids.device)
        hit = ids == target[:, None]
        for name, label in names.items():
            with torch.no_grad():
                logits = rankers[name](request.history_BT.to(ids.device), ids, scores, encoded)
            found.add_ranks(label, ranks_after(logits[..., 0], ids, target, rank, request.number_B))
            if name == "ranking":
                probability = rankers[name].probabilities(logits)
                for i, head in enumerate(heads):
                    positive = hit & (request.labels[head].to(ids.device)[:, None] > 0)
                    found.add_calibration(head, probability[..., i], positive)
                    found.add_auc(head, head_auc(logits[..., i], hit, request.labels[head].to(ids.device)))
        if preset.encoder.time_bias:
            timeless = replace(request, time_BT=torch.zeros_like(request.time_BT))
            rank, ids, scores, encoded = candidates(
                retriever, timeless, count, features.schema.exclude_seen, preset.ranker.memory
            )
            with torch.no_grad():
                logits = rankers["ranking"](request.history_BT.to(ids.device), ids, scores, encoded)
            found.add_ranks(RETRIEVAL + WITHOUT_TIMES, rank)
            found.add_ranks(RANKED + WITHOUT_TIMES, ranks_after(logits[..., 0], ids, target, rank, request.number_B))
        done += len(target)
        oov += int((request.target_B < FIRST_ID).sum())
        say(f"ranked {done:,} test requests")
    if not done:
        raise ValueError(
            "evaluate: no test request: with --split leave-one-out no user has three events, with --split time no user "
            "has an event on either side of the cut; prepare a longer log"
        )
    table, gauc = found.table(), found.gauc()
    np.savez_compressed(step.folder / RANKS, **found.ranks())
    curves = found.reliability()
    plot_reliability(curves, step.folder / "reliability.png")
    manifest = step.finish(
        0, table=table, gauc=gauc, ece=found.ece(), protocol=protocol(features), requests=done,
        targets_out_of_vocabulary=oov, device=str(device()),
    )  # fmt: skip
    (step.folder / "metrics.json").write_text(json.dumps(manifest["results"], indent=2))
    return manifest


def render(manifest: dict[str, Any], data_name: str) -> list[Table]:
    """Tables for the terminal."""
    results = manifest["results"]
    columns = ["HR@1", "HR@5", "HR@10", "HR@50", "NDCG@5", "NDCG@10", "NDCG@50", "MRR@10"]
    main = Table(title=f"{data_name}: full ranking of {results['requests']:,} test requests, seed {manifest['seed']}")
    main.add_column("method")
    for name in columns:
        main.add_column(name, justify="right")
    for method, values in results["table"].items():
        main.add_row(method, *(f"{values[c]:.4f}" for c in columns))
    heads = Table(title="within the candidates, by task head")
    for name in ("head", "GAUC", "lists", "ECE"):
        heads.add_column(name, justify="left" if name == "head" else "right")
    for head, values in results["gauc"].items():
        gauc = "-" if values["GAUC"] is None else f"{values['GAUC']:.4f}"
        heads.add_row(head, gauc, f"{values['lists']:,}", f"{results['ece'][head]:.5f}")
    how = Table(title="protocol", show_header=False)
    for key, value in results["protocol"].items():
        how.add_row(key, str(value))
    return [main, heads, how]


def plot_reliability(curves: dict[str, np.ndarray], path: Path) -> None:
    """Reliability diagram of every head: predicted against observed, both on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axis = figure.add_subplot()
    low = min(max(float(c[:, :2].min()), 1e-5) for c in curves.values())
    axis.plot([low, 1], [low, 1], color="gray", linewidth=1)
    for head, curve in curves.items():
        axis.plot(curve[:, 0].clip(low), curve[:, 1].clip(low), marker="o", label=head)
    axis.set(xscale="log", yscale="log", xlabel="predicted probability", ylabel="observed share")
    axis.legend()
    figure.savefig(path, dpi=120)
