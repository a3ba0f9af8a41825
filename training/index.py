"""FAISS index of item embeddings, for catalogues too large to score every item for every request.

A graph of near neighbours (HNSW, Malkov & Yashunin 2018) under the inner product; inverted lists (IVF) were measured
too and find far less for the same time (docs/log.md). The item bias is one more dimension; a state meets it with a 1.
Axis legend: B states, V item ids, D width, N candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from preprocessing.contract import FIRST_ID, PADDING_ID
from training.gate import GateError

EXCLUDED = -1e30  # as ``retrieval_model``: the score of a place that no item takes
FACTORY = "HNSW32"  # "HNSW32_SQ8": a quarter of the memory, about one in a hundred candidates less
RECALL = 0.98  # of the exact top N that an index must find to be published


class ItemIndex:
    """``search(states, count, seen)`` answers the ``count`` best items that are not ``seen``. ``effort``: how many
    items a search keeps in view (efSearch); at least the number it is asked for."""

    def __init__(self, index: Any, effort: int) -> None:
        self.index, self.effort = index, effort

    @classmethod
    def build(cls, table_VD: np.ndarray, bias_V: np.ndarray, factory: str = FACTORY, threads: int = 1) -> ItemIndex:
        """``table_VD`` float32 [V, D] and ``bias_V`` [V] of all ids, the special ones included (they are left out)."""
        rows = np.concatenate([table_VD, bias_V[:, None]], 1)[FIRST_ID:]
        rows = np.ascontiguousarray(rows, np.float32)
        faiss.omp_set_num_threads(threads)
        index = faiss.index_factory(rows.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        index.train(rows)
        index.add(rows)
        return cls(index, 1)

    def save(self, path: Path) -> None:
        self.index.hnsw.efSearch = self.effort
        faiss.write_index(self.index, str(path))

    @classmethod
    def load(cls, path: Path, threads: int = 1) -> ItemIndex:
        if not path.exists():
            raise FileNotFoundError(f"{path}: expected a FAISS index; run vivace compile --index")
        faiss.omp_set_num_threads(threads)
        index: Any = faiss.read_index(str(path))
        return cls(index, index.hnsw.efSearch)

    def search(
        self, states_BD: np.ndarray, count: int, seen: Sequence[np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids int64 [B, count], scores float32 [B, count]), best first; PADDING_ID and EXCLUDED where fewer were
        found. ``seen``: ids that each row may not be answered."""
        more = max((len(s) for s in seen), default=0) if seen is not None else 0
        queries = np.concatenate([states_BD, np.ones((len(states_BD), 1), np.float32)], 1).astype(np.float32)
        parameters = faiss.SearchParametersHNSW(efSearch=max(self.effort, count + more))  # type: ignore[attr-defined]
        found, rows = self.index.search(queries, count + more, params=parameters)
        ids = np.where(rows < 0, PADDING_ID, rows + FIRST_ID)
        out, scores = np.full((len(ids), count), PADDING_ID, np.int64), np.full((len(ids), count), EXCLUDED, np.float32)
        for i, row in enumerate(ids):
            live = row != PADDING_ID
            if seen is not None and len(seen[i]):
                live &= ~np.isin(row, seen[i])
            keep = np.flatnonzero(live)[:count]
            out[i, : len(keep)], scores[i, : len(keep)] = row[keep], found[i, keep]
        return out, scores


def recall(expected: np.ndarray, got: np.ndarray) -> float:
    """Mean share of the ids of each row of ``expected`` (PADDING_ID does not count) that ``got`` has too."""
    shares = []
    for a, b in zip(expected, got, strict=True):
        wanted = a[a != PADDING_ID]
        shares.append(np.isin(wanted, b).mean() if len(wanted) else 1.0)
    return float(np.mean(shares))


@dataclass(frozen=True)
class Tuned:
    """The least effort that reaches the recall, and what every effort tried reached."""

    effort: int
    recall: float
    tried: dict[int, float]


def tune(index: ItemIndex, states_BD: np.ndarray, exact_BN: np.ndarray, wanted: float = RECALL) -> Tuned:
    """Doubles ``index.effort`` from N on until it finds ``wanted`` of the exact ids int64 [B, N] of ``states_BD``; the
    index keeps that effort. Raises GateError if looking at every item in 16 does not find them."""
    tried: dict[int, float] = {}
    effort = exact_BN.shape[1]
    while True:
        index.effort = effort
        tried[effort] = recall(exact_BN, index.search(states_BD, exact_BN.shape[1])[0])
        if tried[effort] >= wanted:
            return Tuned(effort, tried[effort], tried)
        if effort >= max(index.index.ntotal // 16, 16 * exact_BN.shape[1]):
            raise GateError(
                f"index: not published: finds {tried[effort]:.4f} of the exact candidates at effort {effort} of "
                f"{index.index.ntotal:,} items, expected {wanted}; take HNSW32 instead of eight-bit rows, or the exact "
                "search"
            )
        effort *= 2
