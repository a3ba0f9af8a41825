"""Friend suggestions beside counting: an evaluated run of ``lastfm-friends``.

    python -m benchmarks.friends --name lastfm-friends [--validate]

Common neighbours (Liben-Nowell & Kleinberg 2003) scores a person by the friends shared with the user; Adamic-Adar
divides each by the logarithm of that friend's friends. Both read the training friendships, and the history of a request
as the models do. ``--validate`` judges them and the retriever by the validation requests, and looks at no test: the
ranker has learned those. The last line of stdout is one JSON object. Axis legend: B requests, V item ids (people).
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
from training.judge.evaluate import RANKS, RETRIEVAL, Models, rank_validation
from training.metrics import ranks
from training.models.retrieval import EXCLUDED
from training.scoring import SCORED
from vivace.cli.options import chosen_preset
from vivace.contract import FIRST_ID, ITEM
from vivace.run import EVALUATION, RANKING, Run

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


def ranked(features: Features, weight_V: np.ndarray, part: str) -> np.ndarray:
    """Rank from 0 of the friend of each request of a part, int64, by the shared friends, each with its ``weight_V``."""
    friends_VV, out = friendships(features), []
    for request in batches.requests(features.files(part), [], 1, SCORED):
        own = [h[1:] for h in request.histories]  # without the user
        rows = np.repeat(np.arange(len(own)), [len(h) for h in own])
        mine_BV = incidence(rows, np.concatenate(own), (len(own), features.item_count())) @ sp.diags(weight_V)
        scores_BV = torch.from_numpy(np.asarray((mine_BV @ friends_VV).todense(), np.float32))
        excluded_BV = request.exclude(scores_BV.shape[1], features.schema.exclude_seen)
        excluded_BV[:, :FIRST_ID] = True
        out.append(ranks(scores_BV.masked_fill(excluded_BV, EXCLUDED), request.target_B, request.number_B).numpy())
    return np.concatenate(out)


def counted(features: Features, part: str) -> dict[str, np.ndarray]:
    """Ranks of both ways of counting."""
    degree_V = np.asarray(friendships(features).sum(1)).ravel()
    weights = {COMMON: np.ones_like(degree_V), ADAMIC_ADAR: 1.0 / np.log(np.maximum(degree_V, 2.0))}
    return {method: ranked(features, weight, part) for method, weight in weights.items()}


def main(
    name: Annotated[
        str, typer.Option(help="a run of lastfm-friends; evaluated, but for --validate")
    ] = "lastfm-friends",
    artifacts: Annotated[Path, typer.Option(help="where runs lie")] = Path("artifacts"),
    validate: Annotated[bool, typer.Option("--validate", help="by validation requests, without the test")] = False,
) -> None:
    run = Run(artifacts / name)
    features = Features(run.features)
    if validate:
        models = Models(features, chosen_preset("", run.root), run.root, [RANKING])
        ours = {RETRIEVAL: rank_validation(models, lambda _: None)[RETRIEVAL]}
        seed, protocol = run.manifest(RANKING)["seed"], "validation requests"
    else:
        manifest = run.manifest(EVALUATION)
        with np.load(run.evaluation / RANKS) as saved:
            ours = {method: saved[method] for method in saved.files}
        seed, protocol = manifest["seed"], manifest["results"]["protocol"]
    rows = rows_of(counted(features, "valid" if validate else "test") | ours, COMMON)
    show(name, rows, COMMON)
    print(record_line("friends", rows=rows, protocol=protocol, seed=seed))


if __name__ == "__main__":
    typer.run(main)
