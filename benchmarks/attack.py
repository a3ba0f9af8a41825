"""Perturbations of the item embeddings: training that withstands them, and how much a trained retriever loses to them.

    python -m benchmarks.attack --name ml-1m-benchmark --epsilons 0.25,0.5,1

Source: FGM (Miyato et al. 2017) and adversarial personalised ranking (He et al. 2018, eq. 6 to 8). Axis legend: V item
ids, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from loadtest.reports.record import record_line
from preprocessing.features import Features
from training.data import batches
from training.learn.objectives import direction
from training.metrics import metrics, ranks
from training.models.retrieval import RetrievalModel
from training.presets import Preset
from vivace.contract import FIRST_ID
from vivace.run import Run

EPSILONS = "0.25,0.5,1"


def under_attack(
    model: RetrievalModel, features: Features, preset: Preset, epsilons: list[float], seed: int = 0
) -> dict[str, dict[str, float]]:
    """NDCG@10 of the test requests with every item embedding moved by ``epsilon`` mean row lengths: along the gradient
    of the requests' own loss, and in random directions of the same length (mean of three)."""
    heads, where = [h.name for h in features.schema.heads], model.bias.device
    requests = list(batches.requests(features.files("test"), heads, preset.encoder.window, 256))
    plain = model.table().detach()
    gradient = torch.zeros_like(plain)
    for request in requests:
        moved = plain.clone().requires_grad_()
        known = request.target_B.to(where) >= FIRST_ID
        on = request.to(where).take(np.flatnonzero(known.cpu().numpy()))
        encoded = model.encode(on.history_BT, moved, on.time_BT, types=on.type_BT)[:, -1]
        logits = model.logits(model.state(encoded, on.context), moved)
        loss = F.cross_entropy(logits, on.target_B, reduction="sum")
        gradient += torch.autograd.grad(loss, moved)[0]

    def ndcg(table: Tensor) -> float:
        ranks_by_batch = []
        with torch.no_grad():
            for request in requests:
                on = request.to(where)
                exclude = request.exclude(len(table), features.schema.exclude_seen).to(where)
                encoded = model.encode(on.history_BT, table, on.time_BT, types=on.type_BT)
                scores = model.scores(on.history_BT, encoded, exclude, table, on.context)
                ranks_by_batch.append(ranks(scores, request.target_B.to(where), request.number_B).cpu().numpy())
        return metrics(np.concatenate(ranks_by_batch))["NDCG@10"]

    length, generator = plain[FIRST_ID:].norm(dim=1).mean(), torch.Generator().manual_seed(seed)
    out = {"0": {"attacked": ndcg(plain), "random": ndcg(plain)}}
    for epsilon in epsilons:
        noises = [direction(torch.randn(plain.shape, generator=generator).to(where)) for _ in range(3)]
        out[f"{epsilon:g}"] = {
            "attacked": ndcg(plain + epsilon * length * direction(gradient)),
            "random": float(np.mean([ndcg(plain + epsilon * length * n) for n in noises])),
        }
    return out


def main(
    name: str = "shop",
    artifacts: Path = Path("artifacts"),
    preset: str = "",
    epsilons: Annotated[str, typer.Option(help="by commas, in mean lengths of an item embedding")] = EPSILONS,
) -> None:
    from training.checkpoints import load_retrieval
    from vivace.cli.options import chosen_preset

    root = artifacts / name
    features, chosen = Features(Run(root).features), chosen_preset(preset, root)
    model = load_retrieval(features, chosen, root)
    by_epsilon = under_attack(model, features, chosen, [float(e) for e in epsilons.split(",")])
    print(record_line("NDCG@10 under attack on item embeddings", data=name, by_epsilon=by_epsilon))


if __name__ == "__main__":
    typer.run(main)
