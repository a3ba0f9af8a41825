"""Step of the GPU kit: what a number format costs in ranking quality, on the models that the trainings left.

NDCG@10 of validation and test requests with the ranker, or the retriever, in each format, everything else in float32,
and of the differences to float32 on the same requests a 95 % interval (paired bootstrap).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.gpu import steps
from benchmarks.gpu.linears import quantise, sparsify
from benchmarks.gpu.record import Figures
from benchmarks.gpu.steps import Asked
from benchmarks.gpu.subjects import cast
from benchmarks.gpu.train import ML
from preprocessing.features import Features
from training.data.batches import Requests
from training.judge.evaluate import Candidates, Models
from training.metrics import bootstrap, ndcg_of
from training.models.ranking_gpu import gpu_graph
from training.presets import from_json
from training.scoring import candidates
from vivace.run import RANKING, Run

FORMATS = ("bf16", "fp8", "fp8-rows", "int8", "fp16", "2:4")
ON_CPU = ("bf16", "int8")  # of a rehearsal: a processor takes long for the others
PARTS = ("valid", "test")


def formatted(graph: nn.Module, number_format: str, example: Any) -> nn.Module:
    """``graph``, whose weights have 16 bits already, in the format; ``example`` runs it once."""
    if number_format == "2:4":
        sparsify(graph, next(graph.parameters()).is_cuda)
    elif number_format not in ("bf16", "fp16"):
        quantise(graph, number_format, example)  # type: ignore[arg-type]
    return graph


def rankers(models: Models, figures: Figures, example: tuple[Requests, Candidates]) -> dict[str, nn.Module]:
    """The ranker in each format that runs here."""
    request, proposed = example
    given = (request.history_BT.to(proposed.ids_BN.device), proposed.ids_BN, proposed.scores_BN, proposed.encoded_BMD)
    made: dict[str, nn.Module] = {"fp32": models.ranker}
    for name in FORMATS if models.retriever.bias.is_cuda else ON_CPU:
        try:
            graph = gpu_graph(models.ranker, torch.float16 if name == "fp16" else torch.bfloat16, lookup="sorted").model
            made[name] = formatted(graph, name, lambda graph=graph: graph(*given))
            made[name](*given)
        except Exception as error:
            figures.skip(f"ranker {name}", error)
            made.pop(name, None)
    return made


def retrievers(models: Models, figures: Figures, request: Requests) -> dict[str, Any]:
    """The retriever in each format that runs here."""
    made: dict[str, Any] = {"fp32": models.retriever}
    count, exclude_seen = models.count, models.features.schema.exclude_seen
    for name in FORMATS if models.retriever.bias.is_cuda else ON_CPU:
        try:
            model = copy.deepcopy(models.retriever)
            cast(model, torch.float16 if name == "fp16" else torch.bfloat16)
            run = lambda model=model: candidates(model, request, count, exclude_seen)  # noqa: E731
            made[name] = formatted(model, name, run)
            run()
        except Exception as error:
            figures.skip(f"retriever {name}", error)
            made.pop(name, None)
    return made


def ndcg(models: Models, figures: Figures) -> Iterator[tuple[str, str, str, np.ndarray]]:
    """(stage, format, part, NDCG@10 of each request)."""
    stages: dict[str, dict[str, Any]] = {}  # scales are of the first validation requests
    for part in PARTS:
        scores: dict[tuple[str, str], list[np.ndarray]] = {}
        for request in models.requests(part):
            proposed = models.retrieve(request)
            if not stages:
                stages = {
                    "ranker": rankers(models, figures, (request, proposed)),
                    "retriever": retrievers(models, figures, request),
                }
            history_BT = request.history_BT.to(proposed.ids_BN.device)
            for name, model in stages["ranker"].items():
                with torch.no_grad():
                    logits = model(history_BT, proposed.ids_BN, proposed.scores_BN, proposed.encoded_BMD).float()
                rank_B = models.ranked(request, proposed, logits)
                scores.setdefault(("ranker", name), []).append(ndcg_of(rank_B.cpu().numpy()))
            for name, model in stages["retriever"].items():
                rank_B, *_ = candidates(model, request, models.count, models.features.schema.exclude_seen)
                scores.setdefault(("retriever", name), []).append(ndcg_of(rank_B.cpu().numpy()))
        yield from ((stage, name, part, np.concatenate(values)) for (stage, name), values in scores.items())


def of_run(figures: Figures, root: Path, features: Features) -> None:
    run = Run(root, features.folder)
    if not run.has(RANKING):
        figures.skip(root.name, "no trained ranker: its training did not end")
        return
    models = Models(features, from_json(json.loads(run.preset.read_text())), root, [RANKING])
    exact: dict[tuple[str, str], np.ndarray] = {}
    for stage, name, part, values in ndcg(models, figures):
        expected = exact.setdefault((stage, part), values)
        low, high = bootstrap(values - expected) if values is not expected else (0.0, 0.0)
        figures.row(
            run=root.name, stage=stage, format=name, part=part, ndcg10=float(values.mean()),
            share_of_fp32=float(values.mean() / expected.mean()), difference=[low, high],
        )  # fmt: skip


def measure(figures: Figures, where: torch.device, given: Asked) -> None:
    prepared = sorted(p.parent.name for p in given.artifacts.glob("*/features"))
    data = Features(given.artifacts / (ML if ML in prepared else prepared[0]) / "features")
    for label in ("tiny-7",) if given.cpu else ("base-7", "large-7"):
        of_run(figures, given.out / "runs" / label, data)


if __name__ == "__main__":
    steps.run("format_quality", measure, "ranking quality by number format")
