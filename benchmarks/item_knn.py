"""An evaluated run beside item-kNN and EASE: HR@10 and NDCG@10 of each row, and what ours gain over item-kNN.

    python -m benchmarks.item_knn --name lastfm

Item-kNN (Deshpande & Karypis 2004): an item scores the sum, over the history, of its cosine with each item of it, by
the users that they share. EASE (Steck 2019): the same with the weights of a linear autoencoder. How many neighbours an
item keeps, EASE's ridge, how fast an older event weighs less, and what an item of the history itself is worth are
chosen by NDCG@10 of the validation requests; the test is ranked once, with that choice. Ranks of ours are those that
``vivace evaluate`` wrote. The last line of stdout is one JSON object.
Axis legend: B requests, V item ids, S training sequences.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import scipy.sparse as sp
import torch
import typer
from rich.table import Table

from loadtest.reports.record import record_line
from preprocessing.features import Features
from training.data import batches
from training.judge.evaluate import RANKED, RANKS, RETRIEVAL
from training.learn.memory import session_sets
from training.metrics import bootstrap, metrics, ndcg_of, ranks
from training.models.retrieval import EXCLUDED
from training.models.session_memory import linear_weights
from training.scoring import SCORED
from vivace.cli.options import console
from vivace.contract import FIRST_ID
from vivace.run import EVALUATION, Run

ITEM_KNN, EASE = "item-kNN", "EASE"
ALL = sys.maxsize
NEIGHBOURS, DECAYS, AGAIN = (100, 500, ALL), (1.0, 0.85), (0.0, 0.1, 0.3, 1.0)
RIDGES, EASE_NEIGHBOURS = (300.0, 1000.0), 512


@dataclass(frozen=True)
class Choice:
    """``neighbours`` kept an item; ``decay`` of an event's weight with each later one; ``again``: weight of an item
    with itself, where items of the history may be answered; ``ridge`` of EASE."""

    neighbours: int
    decay: float
    again: float
    ridge: float = 0.0


class ItemItem:
    """Scores that are linear in the history: ``weights_VV``, a row an item of the history; ``counts_V``: sequences that
    have an item."""

    def __init__(self, weights_VV: sp.csr_matrix, counts_V: np.ndarray) -> None:
        self.weights_VV, self.counts_V = weights_VV, counts_V

    def scores(self, histories: list[np.ndarray], decay: float) -> tuple[np.ndarray, sp.csr_matrix]:
        """Score of every item after ``histories``, oldest first, float32 [B, V], by others; and the weight of each item
        of the history itself. Popularity tells apart what no neighbour has."""
        parts = [h[h >= FIRST_ID] for h in histories]
        rows = np.repeat(np.arange(len(parts)), [len(h) for h in parts])
        weights = np.concatenate([decay ** np.arange(len(h) - 1, -1, -1.0) for h in parts])
        shape = (len(parts), self.weights_VV.shape[0])
        weight_BV = sp.csr_matrix((weights.astype(np.float32), (rows, np.concatenate(parts))), shape=shape)
        popular_V = 1e-6 * (self.counts_V / self.counts_V.max()).astype(np.float32)
        return np.asarray((weight_BV @ self.weights_VV).todense(), np.float32) + popular_V, weight_BV


def item_knn(sets_SV: sp.csr_matrix, neighbours: int) -> ItemItem:
    """The ``neighbours`` largest cosines of each item, from training sequences as sets of items."""
    counts_V = np.asarray(sets_SV.sum(0)).ravel()
    scale = sp.diags(1.0 / np.sqrt(np.maximum(counts_V, 1.0)))
    cosine = (scale @ (sets_SV.T @ sets_SV) @ scale).tocsr()
    cosine.setdiag(0.0)
    cosine.eliminate_zeros()
    if neighbours < ALL:
        rank = np.empty(cosine.nnz, np.int64)
        for item in range(len(counts_V)):
            part = slice(cosine.indptr[item], cosine.indptr[item + 1])
            rank[part][np.argsort(-cosine.data[part], kind="stable")] = np.arange(part.stop - part.start)
        cosine.data[rank >= neighbours] = 0.0
        cosine.eliminate_zeros()
    return ItemItem(cosine, counts_V)


def ease(sets_SV: sp.csr_matrix, ridge: float) -> ItemItem:
    """The EASE_NEIGHBOURS largest weights above 0 of each item."""
    ids_VK, weights_VK = linear_weights(sets_SV, EASE_NEIGHBOURS, ridge)
    rows = np.repeat(np.arange(len(ids_VK)), ids_VK.shape[1])
    weights = sp.csr_matrix((weights_VK.ravel(), (rows, ids_VK.ravel())), shape=(len(ids_VK), len(ids_VK)))
    weights.eliminate_zeros()
    return ItemItem(weights, np.asarray(sets_SV.sum(0)).ravel())


def ranked(
    model: ItemItem, features: Features, part: str, decay: float, again: tuple[float, ...]
) -> dict[float, np.ndarray]:
    """Of each value of ``again`` the rank from 0 of each request's target, int64, under the same exclusions as the
    models'."""
    out: dict[float, list[np.ndarray]] = {value: [] for value in again}
    for request in batches.requests(features.files(part), [], 1, SCORED):
        others_BV, history_BV = model.scores(request.histories, decay)
        excluded_BV = request.exclude(others_BV.shape[1], features.schema.exclude_seen)
        excluded_BV[:, :FIRST_ID] = True
        for value in again:
            scores_BV = torch.from_numpy(np.asarray(others_BV + value * history_BV, np.float32))
            scores_BV = scores_BV.masked_fill(excluded_BV, EXCLUDED)
            out[value].append(ranks(scores_BV, request.target_B, request.number_B).numpy())
    return {value: np.concatenate(parts) for value, parts in out.items()}


def chosen(features: Features) -> dict[str, tuple[ItemItem, Choice, float]]:
    """Of each method the model and choice with the highest NDCG@10 of the validation requests, and that figure."""
    sets_SV = session_sets(features.files("train"), features.item_count(), ALL)
    best: dict[str, tuple[ItemItem, Choice, float]] = {}
    tried = [(ITEM_KNN, neighbours, 0.0) for neighbours in NEIGHBOURS]
    tried += [(EASE, EASE_NEIGHBOURS, ridge) for ridge in RIDGES]
    again = (0.0,) if features.schema.exclude_seen else AGAIN
    for method, neighbours, ridge in tried:
        model = ease(sets_SV, ridge) if method == EASE else item_knn(sets_SV, neighbours)
        for decay in DECAYS:
            for value, rank in ranked(model, features, "valid", decay, again).items():
                figure = float(ndcg_of(rank).mean())
                if method not in best or figure > best[method][2]:
                    best[method] = (model, Choice(neighbours, decay, value, ridge), figure)
    return best


def tested(features: Features, model: ItemItem, choice: Choice) -> np.ndarray:
    """Ranks of the test requests' targets."""
    return ranked(model, features, "test", choice.decay, (choice.again,))[choice.again]


def rows_of(ranks_of: dict[str, np.ndarray], against: str = ITEM_KNN) -> list[dict[str, Any]]:
    """A row a method: figures, and NDCG@10 gained over ``against`` request by request, with 95 % bootstrap
    intervals."""
    base, rows = ndcg_of(ranks_of[against]), []
    for method, rank in ranks_of.items():
        values, figures = ndcg_of(rank), metrics(rank)
        row = {"method": method, **{name: figures[name] for name in ("HR@10", "NDCG@10", "HR@50")}}
        row |= {"interval": bootstrap(values), "gain": float((values - base).mean())}
        rows.append(row | {"gain interval": bootstrap(values - base)})
    return rows


def show(name: str, rows: list[dict[str, Any]], against: str) -> None:
    table = Table(title=name, title_justify="left")
    for column in ("method", "HR@10", "NDCG@10", "95 %", f"over {against}", "95 % of that"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        interval, gain = ("{:.4f} to {:.4f}".format(*row[key]) for key in ("interval", "gain interval"))
        figures = f"{row['HR@10']:.4f}", f"{row['NDCG@10']:.4f}", interval, f"{row['gain']:+.4f}", gain
        table.add_row(row["method"], *figures)
    console.print(table)


def main(
    name: Annotated[str, typer.Option(help="an evaluated run")],
    artifacts: Annotated[Path, typer.Option(help="where runs lie")] = Path("artifacts"),
    validate: Annotated[bool, typer.Option(help="choose and print the validation figure alone; no test")] = False,
) -> None:
    run = Run(artifacts / name)
    features = Features(run.features)
    methods = chosen(features)
    for method, (_, choice, value) in methods.items():
        console.print(f"{method}: {choice}, NDCG@10 of validation {value:.4f}")
    choices = {method: asdict(choice) for method, (_, choice, _) in methods.items()}
    values = {method: round(value, 4) for method, (_, _, value) in methods.items()}
    if validate:
        print(record_line("item-kNN, validation", data=name, choices=choices, ndcg10=values))
        return
    manifest = run.manifest(EVALUATION)
    with np.load(run.evaluation / RANKS) as saved:
        ranks_of = {method: saved[method] for method in saved.files}
    ours = {method: ranks_of.pop(method) for method in (RETRIEVAL, RANKED)}
    linear = {method: tested(features, model, choice) for method, (model, choice, _) in methods.items()}
    ranks_of = {**ranks_of, **linear, **ours}
    rows = rows_of(ranks_of)
    show(name, rows, ITEM_KNN)
    print(record_line(
        "item-kNN", data=name, rows=rows, choices=choices, validation_ndcg10=values,
        protocol=manifest["results"]["protocol"], seed=manifest["seed"],
    ))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
