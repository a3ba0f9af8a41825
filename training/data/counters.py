"""Counters of the training data: popularity and directed co-occurrence. Axis legend: V item ids, K followers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import svds
from sklearn.utils.extmath import randomized_svd

from preprocessing.features import Features
from training.models.item_table import ItemLists, ItemTables, attribute_tables
from vivace.contract import FIRST_ID, ITEM

WINDOW = 5  # a follower within this many events counts, with weight 1 / distance
EXACT_WIDTH = 256  # beyond it the exact decomposition takes minutes, the randomized one seconds (Halko et al. 2011)
POWER_STEPS = 5
SMOOTHING = 5.0  # added to an item's count: rare items promise less


def _items_and_rows(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """(item ids of all sequences of a parquet file one after the other, the row of each), int64 [events] twice."""
    column = pq.read_table(file, columns=[ITEM])[ITEM].combine_chunks()
    rows = np.repeat(np.arange(len(column)), np.diff(column.offsets.to_numpy()))
    return column.flatten().to_numpy(), rows


def popularity(files: list[Path], items: int) -> np.ndarray:
    """Training events of each item id, float64 [V]; 0 for the special ids."""
    counts = np.zeros(items)
    for file in files:
        counts += np.bincount(_items_and_rows(file)[0], minlength=items)
    counts[:FIRST_ID] = 0
    return counts


def incidence(rows: np.ndarray, ids: np.ndarray, shape: tuple[int, int]) -> sp.csr_matrix:
    """float32 [sessions, V]: 1 where a session, by its row int64 [n], has an item of the vocabulary, by its id int64
    [n], however often."""
    known = ids >= FIRST_ID
    sets = sp.csr_matrix((np.ones(int(known.sum()), np.float32), (rows[known], ids[known])), shape=shape)
    sets.sum_duplicates()
    sets.data[:] = 1.0
    return sets


def follower_matrix(files: list[Path], items: int) -> sp.csr_matrix:
    """Row i: how often each item came within WINDOW events after i, weighted by 1 / distance, over i's count."""
    counts = popularity(files, items)
    return sp.diags(1.0 / (counts + SMOOTHING)) @ follower_counts(files, items)


def follower_counts(files: list[Path], items: int) -> sp.csr_matrix:
    """Entry (i, j): how often j came within WINDOW events after i, weighted by 1 / distance."""
    total = sp.csr_matrix((items, items))
    for file in files:
        flat, rows = _items_and_rows(file)
        for distance in range(1, WINDOW + 1):
            a, b = flat[:-distance], flat[distance:]
            same = (rows[:-distance] == rows[distance:]) & (a >= FIRST_ID) & (b >= FIRST_ID) & (a != b)
            weight = np.full(int(same.sum()), 1.0 / distance)
            total = total + sp.csr_matrix((weight, (a[same], b[same])), shape=(items, items))
    return total


def cooccurrence_embeddings(files: list[Path], items: int, width: int, scale: float) -> np.ndarray:
    """Where item embeddings may start: the truncated SVD of positive pointwise mutual information within WINDOW events
    (Levy & Goldberg 2014, with the singular values' roots), float32 [V, width]; rows of known items have root mean
    square ``scale``, the others are zero."""
    counts = follower_counts(files, items)
    both = (counts + counts.T).tocoo()
    margin = np.asarray(both.sum(1)).ravel()
    pmi = np.log(both.data * margin.sum() / (margin[both.row] * margin[both.col]))
    keep = pmi > 0
    if not keep.any():
        return np.zeros((items, width), np.float32)
    matrix = sp.csr_matrix((pmi[keep], (both.row[keep], both.col[keep])), shape=both.shape)
    k = min(width, items - 1)
    if k > EXACT_WIDTH:
        left, values, _ = randomized_svd(matrix, k, n_iter=POWER_STEPS, random_state=0)
    else:
        left, values, _ = svds(matrix, k=k, v0=np.ones(items), which="LM")
    out = np.zeros((items, width), np.float32)
    out[:, :k] = left * np.sqrt(values)
    size = np.sqrt((out**2).mean(1, keepdims=True))
    return np.where(size > 1e-8, out / np.maximum(size, 1e-8) * scale, 0.0).astype(np.float32)


def top_followers(matrix: sp.csr_matrix, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64 [V, K], weights float32 [V, K]) of each row's largest entries; id 0 and weight 0 where there are
    fewer. Ties go to the smaller id."""
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -matrix.data, rows))
    rank = np.arange(len(order)) - matrix.indptr[rows]
    chosen = order[rank < keep]
    slot, row = rank[rank < keep], rows[rank < keep]
    ids = np.zeros((matrix.shape[0], keep), np.int64)
    weights = np.zeros((matrix.shape[0], keep), np.float32)
    ids[row, slot], weights[row, slot] = matrix.indices[chosen], matrix.data[chosen]
    return ids, weights


def item_tables(features: Features, followers: int, part: str = "train", files: list[Path] | None = None) -> ItemTables:
    """What the ranker knows of every item, counted in a part of the features, or in other ``files`` of sequences."""
    files, items, schema = files or features.files(part), features.item_count(), features.schema
    ids, weights = top_followers(follower_matrix(files, items), followers)
    categories, sizes, numbers = attribute_tables(features.items(), schema.item_categoricals, schema.item_continuous)
    return ItemTables(
        popularity=torch.tensor(popularity(files, items)),
        follower_ids=torch.from_numpy(ids),
        follower_weights=torch.from_numpy(weights),
        categories=categories,
        category_sizes=sizes,
        numbers=numbers,
        lists=ItemLists.of(features),
    )
