"""Fake accounts in a training log: into how many answers of item-item tables they push what they share.

    python -m benchmarks.shilling --name lastfm --accounts 5,20,80

Each fake account has a target and, as filler, some of the most popular items, by chance (O'Mahony et al. 2004; "random
filler" attack). A target is an item of one training user. Tables are those of ``benchmarks.item_knn``, counted with the
fakes: cosine, and EASE with a small and a large ridge. A row is the share of validation requests whose first ten hold
the target, mean over targets, and NDCG@10 of the same requests, which says what a table costs without an attack (0
accounts). The last line of stdout is one JSON object. Axis legend: S sequences, V item ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import scipy.sparse as sp
import torch
import typer

from benchmarks.item_knn import ALL, ItemItem, ease, item_knn
from loadtest.reports.record import record_line
from preprocessing.features import Features
from training.data import batches
from training.learn.memory import session_sets
from training.metrics import ndcg_of, ranks
from training.models.retrieval import EXCLUDED
from training.scoring import SCORED
from vivace.cli.options import console
from vivace.contract import FIRST_ID
from vivace.run import Run

TOP, POPULAR = 10, 100


def poisoned(
    sets_SV: sp.csr_matrix, targets: list[int], accounts: int, filler: int, rng: np.random.Generator
) -> sp.csr_matrix:
    """The sequences with so many fake accounts of each target behind them."""
    popular = np.argsort(-np.asarray(sets_SV.sum(0)).ravel(), kind="stable")[:POPULAR]
    fakes = sp.lil_matrix((accounts * len(targets), sets_SV.shape[1]), dtype=np.float32)
    for row in range(fakes.shape[0]):
        fakes[row, rng.choice(popular, filler, replace=False)] = 1.0
        fakes[row, targets[row % len(targets)]] = 1.0
    return sp.vstack([sets_SV, fakes]).tocsr()


def answered(model: ItemItem, features: Features, targets: list[int], again: float) -> tuple[float, float]:
    """(share of validation requests with a target among the first ten, mean over targets; NDCG@10)."""
    hits, judged = np.zeros(len(targets)), []
    for request in batches.requests(features.files("valid"), [], 1, SCORED):
        others_BV, history_BV = model.scores(request.histories, 1.0)
        scores_BV = torch.from_numpy(np.asarray(others_BV + again * history_BV, np.float32))
        excluded_BV = request.exclude(scores_BV.shape[1], features.schema.exclude_seen)
        excluded_BV[:, :FIRST_ID] = True
        scores_BV = scores_BV.masked_fill(excluded_BV, EXCLUDED)
        judged.append(ranks(scores_BV, request.target_B, request.number_B).numpy())
        top_B10 = scores_BV.topk(TOP, dim=1).indices
        hits += [int((top_B10 == target).any(1).sum()) for target in targets]
    rank = np.concatenate(judged)
    return float(hits.mean() / len(rank)), float(ndcg_of(rank).mean())


def main(
    name: Annotated[str, typer.Option(help="a prepared run")] = "lastfm",
    artifacts: Annotated[Path, typer.Option(help="where runs lie")] = Path("artifacts"),
    accounts: Annotated[str, typer.Option(help="fakes of a target, by commas")] = "5,20,80",
    filler: Annotated[int, typer.Option(help="popular items of each fake account", min=1, max=POPULAR)] = 20,
    targets: int = 3,
) -> None:
    features = Features(Run(artifacts / name).features)
    sets_SV, rng = session_sets(features.files("train"), features.item_count(), ALL), np.random.default_rng(0)
    rare = np.flatnonzero(np.asarray(sets_SV.sum(0)).ravel() == 1)
    chosen = rng.choice(rare, targets, replace=False).tolist()
    rows: list[dict[str, Any]] = []
    for count in (0, *(int(a) for a in accounts.split(","))):
        log = poisoned(sets_SV, chosen, count, filler, np.random.default_rng(1)) if count else sets_SV
        tables = {"item-kNN": (item_knn(log, 500), 1.0), "EASE, ridge 300": (ease(log, 300.0), 0.1)}
        tables["EASE, ridge 1000"] = (ease(log, 1000.0), 0.1)
        for table, (model, again) in tables.items():
            share, ndcg = answered(model, features, chosen, 0.0 if features.schema.exclude_seen else again)
            rows.append({"accounts": count, "table": table, "top 10": share, "NDCG@10": ndcg})
            console.print(rows[-1])
    print(record_line("fake accounts in training", data=name, sequences=sets_SV.shape[0], filler=filler, rows=rows))


if __name__ == "__main__":
    typer.run(main)
