"""Friend suggestions beside counting: an evaluated run of ``lastfm-friends``.

    python -m benchmarks.friends --name lastfm-friends

Common neighbours (Liben-Nowell & Kleinberg 2003) scores a person by the friends shared with the user; Adamic-Adar
divides each by the logarithm of that friend's friends. Both read the training friendships, and the history of a request
as the models do. The last line of stdout is one JSON object. Axis legend: B requests, V item ids (people).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow.parquet as pq
import scipy.sparse as sp
import torch
import typer

from benchmarks.item_knn import rows_of, show
from loadtest.reports.record import record_line
from preprocessing.features import Features
from training.data import batches
from training.data.counters import incidence
from training.judge.evaluate import RANKS
from training.metrics import ranks
from training.models.retrieval import EXCLUDED
from training.scoring import SCORED
from vivace.contract import FIRST_ID, ITEM
from vivace.run import EVALUATION, Run

COMMON, ADAMIC_ADAR = "common neighbours", "Adamic-Adar"


def friendships(features: Features) -> sp.csr_matrix:
    """float32 [V, V]: 1 where two people are friends in training. Each list begins with its owner."""
    owners, friends = [], []
    for file in features.files("train"):
        for owner, *others in pq.read_table(file, columns=[ITEM])[ITEM].to_pylist():
            owners += [owner] * len(others)
            friends += others
    size = features.item_count()
    return incidence(np.array(owners), np.array(friends), (size, size))


def ranked(features: Features, weight_V: np.ndarray) -> np.ndarray:
    """Rank from 0 of each test request's friend, int64, by the shared friends, each with its ``weight_V``."""
    friends_VV, out = friendships(features), []
    for request in batches.requests(features.files("test"), [], 1, SCORED):
        own = [h[1:] for h in request.histories]  # without the user
        rows = np.repeat(np.arange(len(own)), [len(h) for h in own])
        mine_BV = incidence(rows, np.concatenate(own), (len(own), features.item_count())) @ sp.diags(weight_V)
        scores_BV = torch.from_numpy(np.asarray((mine_BV @ friends_VV).todense(), np.float32))
        excluded_BV = request.exclude(scores_BV.shape[1], features.schema.exclude_seen)
        excluded_BV[:, :FIRST_ID] = True
        out.append(ranks(scores_BV.masked_fill(excluded_BV, EXCLUDED), request.target_B, request.number_B).numpy())
    return np.concatenate(out)


def main(
    name: Annotated[str, typer.Option(help="an evaluated run of lastfm-friends")] = "lastfm-friends",
    artifacts: Annotated[Path, typer.Option(help="where runs lie")] = Path("artifacts"),
) -> None:
    run = Run(artifacts / name)
    features, manifest = Features(run.features), run.manifest(EVALUATION)
    degree_V = np.asarray(friendships(features).sum(1)).ravel()
    with np.load(run.evaluation / RANKS) as saved:
        ranks_of = {method: saved[method] for method in saved.files}
    counted = {COMMON: np.ones_like(degree_V), ADAMIC_ADAR: 1.0 / np.log(np.maximum(degree_V, 2.0))}
    ranks_of = {method: ranked(features, weight) for method, weight in counted.items()} | ranks_of
    rows = rows_of(ranks_of, COMMON)
    show(name, rows, COMMON)
    print(record_line("friends", rows=rows, protocol=manifest["results"]["protocol"], seed=manifest["seed"]))


if __name__ == "__main__":
    typer.run(main)
