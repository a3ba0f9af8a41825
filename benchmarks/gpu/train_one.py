"""One training of the GPU kit, from prepared features to test figures: retriever, ranker, evaluation.

    python -m benchmarks.gpu.train_one --features artifacts/ml-1m-benchmark/features --root FOLDER --preset base \
        --out FOLDER --label base --seconds 150

It writes ``<label>.json`` after every epoch, so a training that is stopped keeps its curve.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.gpu.record import Figures, device
from preprocessing.features import Features
from training.judge.evaluate import RANKED, RETRIEVAL, VALIDATION_RANKS, evaluate
from training.learn.ranker import train_ranker
from training.learn.retriever import train_retrieval
from training.metrics import ndcg_of
from training.presets import preset, with_values
from vivace.run import Run


def parameters(folder: Path) -> dict[str, int]:
    """Trained numbers of a saved model: those of the item table and the others."""
    state = torch.load(folder / "weights.pt", weights_only=True, map_location="cpu")
    sizes = {name: value.numel() for name, value in state.items() if value.is_floating_point()}
    items = sum(n for name, n in sizes.items() if name.startswith("items.") or name in ("bias", "popularity"))
    return {"items": items, "layers": sum(sizes.values()) - items}


def validation(root: Path) -> dict[str, float]:
    """NDCG@10 of the validation requests by method: what configurations are chosen by."""
    with np.load(Run(root).evaluation / VALIDATION_RANKS) as ranks:
        return {name: float(ndcg_of(ranks[name]).mean()) for name in (RETRIEVAL, RANKED) if len(ranks[name])}


def main(
    features: Annotated[Path, typer.Option(help="what vivace prepare wrote")],
    root: Annotated[Path, typer.Option(help="folder of the run to make")],
    out: Annotated[Path, typer.Option(help="folder of the results")],
    label: Annotated[str, typer.Option(help="name of the training")],
    name: Annotated[str, typer.Option("--preset", help="preset")] = "base",
    values: Annotated[str, typer.Option(help="JSON of fields to change, such as {'encoder.dropout': 0.4}")] = "{}",
    seed: int = 7,
    seconds: float = 150.0,
    cpu: bool = False,
) -> None:
    where, began = device(cpu), time.monotonic()
    figures = Figures(out, label, seconds)
    changes: dict[str, Any] = json.loads(values)
    chosen = with_values(preset(name), changes)
    chosen = replace(chosen, retrieval=replace(chosen.retrieval, checkpoint_s=1e9))  # no run here is resumed
    figures.set(preset=name, changes=changes, seed=seed, device=str(where), threads=torch.get_num_threads())
    data = Features(features)

    def on_epoch(entry: dict[str, float]) -> None:
        figures.row(after_s=time.monotonic() - began, **entry)

    manifest = train_retrieval(data, chosen, root, seed, print, quiet=True, on_epoch=on_epoch)
    figures.set(retrieval_s=manifest["seconds"], parameters=parameters(Run(root).retrieval))
    if where.type == "cuda":
        figures.set(gpu_memory_mib=torch.cuda.max_memory_allocated() / 2**20)
    ranking = train_ranker(data, chosen, root, seed, print, quiet=True)
    figures.set(ranking_s=ranking["seconds"])
    results = evaluate(data, chosen, root, seed, print)["results"]
    figures.set(
        validation_ndcg10=validation(root), test=results["table"], protocol=results["protocol"],
        seconds=time.monotonic() - began,
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
