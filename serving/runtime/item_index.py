"""Retrieval through a FAISS index, for catalogues too large to score every item for every request.

A graph of near neighbours (HNSW, Malkov & Yashunin 2018); inverted lists (IVF) were measured too and find far less for
the same time (docs/log.md). The item bias is one more dimension; a state meets it with a 1. The graph is one by inner
products, or by distances of rows that a further dimension makes equally long, so that the nearest are the best by inner
product too (Bachrach et al. 2014): which finds more depends on the catalogue. The first may lead to long rows alone and
never reach many others. Items of equal vectors are one row of the index: a graph of their copies knows no way to the
others.
``training.compile.index`` builds and judges it. Axis legend: B states, V item ids, D width, N candidates, S seen items,
G groups of items with equal vectors, K rows that a search returns, M rising items, E encoded events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serving.runtime.encoded import EXCLUDED, Encoder, Popular, rising_of, with_rising, without_history
from vivace.contract import FIRST_ID, PADDING_ID, StageTensors

FACTORY = "HNSW32"  # "HNSW32_SQ8": a quarter of the memory, about one in a hundred candidates less
PRODUCTS, DISTANCES = "inner products", "distances"  # what a graph is one of
INDEX, GROUPS = "index.faiss", "groups.npz"


def with_bias(table_VD: np.ndarray, bias_V: np.ndarray) -> np.ndarray:
    """Rows float32 [V - FIRST_ID, D + 1] of the items of a table of all ids, the special ones included."""
    rows = np.concatenate([table_VD, bias_V[:, None]], 1)[FIRST_ID:]
    return np.ascontiguousarray(rows, np.float32) + np.float32(0)  # -0 becomes 0: equal rows are equal bytes


def lifted(rows: np.ndarray) -> np.ndarray:
    """The same rows with a further dimension that makes all as long as the longest, float32 [n, D + 2]."""
    squares = np.einsum("nd,nd->n", rows, rows, dtype=np.float64)
    more = np.sqrt(squares.max(initial=0.0) - squares)
    return np.ascontiguousarray(np.concatenate([rows, more[:, None]], 1), np.float32)


def asking(states_BD: np.ndarray) -> np.ndarray:
    """States as the rows above are asked with, float32 [B, D + 1]."""
    return np.concatenate([states_BD, np.ones((len(states_BD), 1), np.float32)], 1).astype(np.float32)


@dataclass(frozen=True)
class Groups:
    """Items by the row of the index that stands for them: ``ids`` int64 [V - FIRST_ID] group by group, each in the
    order of ids, and where each group starts, ``starts`` int64 [G + 1]."""

    ids: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray) -> tuple[Groups, np.ndarray]:
        """The groups of ``rows``, in the order of their first items, and the positions of those."""
        whole = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1])))[:, 0]
        _, first, group = np.unique(whole, return_index=True, return_inverse=True)
        order = np.argsort(first)
        group = np.argsort(order)[group.ravel()]
        starts = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=len(order)))])
        return cls(np.argsort(group, kind="stable") + FIRST_ID, starts), first[order]

    @classmethod
    def single(cls, count: int) -> Groups:
        """Every item by itself."""
        return cls(np.arange(FIRST_ID, FIRST_ID + count), np.arange(count + 1))

    @property
    def all_single(self) -> bool:
        return len(self.starts) == len(self.ids) + 1

    def expand(self, rows_K: np.ndarray, scores_K: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, scores) of the items behind rows of the index, best first, ``limit`` of them if there are as many."""
        if self.all_single:
            return rows_K[:limit] + FIRST_ID, scores_K[:limit]
        starts = self.starts[rows_K]
        sizes = np.minimum(self.starts[rows_K + 1] - starts, limit)
        ends = np.cumsum(sizes)
        stop = int(np.searchsorted(ends, limit)) + 1
        starts, sizes, ends = starts[:stop], sizes[:stop], ends[:stop]
        places = np.repeat(starts - ends + sizes, sizes) + np.arange(sizes.sum())
        return self.ids[places[:limit]], np.repeat(scores_K[:stop], sizes)[:limit]


class ItemIndex:
    """``search(states, count, seen)`` answers the ``count`` best items that are not ``seen``. ``effort``: how many
    items a search keeps in view (efSearch); at least the number it is asked for."""

    def __init__(self, index: Any, effort: int, groups: Groups) -> None:
        self.index, self.effort, self.groups = index, effort, groups

    @classmethod
    def build(
        cls, table_VD: np.ndarray, bias_V: np.ndarray, factory: str = FACTORY, threads: int = 1, by: str = PRODUCTS
    ) -> ItemIndex:
        """``table_VD`` float32 [V, D] and ``bias_V`` [V] of all ids, the special ones included (they are left out)."""
        import faiss

        rows = with_bias(table_VD, bias_V)
        groups, first = Groups.of(rows)
        distinct = rows[first] if by == PRODUCTS else lifted(rows[first])
        faiss.omp_set_num_threads(threads)
        metric = faiss.METRIC_INNER_PRODUCT if by == PRODUCTS else faiss.METRIC_L2
        index = faiss.index_factory(distinct.shape[1], factory, metric)
        index.train(distinct)
        index.add(distinct)
        return cls(index, 1, groups)

    def save(self, folder: Path) -> None:
        """Writes INDEX and GROUPS."""
        import faiss

        self.index.hnsw.efSearch = self.effort
        faiss.write_index(self.index, str(folder / INDEX))
        np.savez(folder / GROUPS, ids=self.groups.ids, starts=self.groups.starts)

    @classmethod
    def load(cls, folder: Path, threads: int = 1) -> ItemIndex:
        import faiss  # here and above: only an indexed run needs it

        path, groups = folder / INDEX, folder / GROUPS
        if not path.exists():
            raise FileNotFoundError(f"{path}: expected a FAISS index; run vivace compile --index")
        faiss.omp_set_num_threads(threads)
        index: Any = faiss.read_index(str(path))
        if not groups.exists():  # compiled before there were any
            return cls(index, index.hnsw.efSearch, Groups.single(index.ntotal))
        with np.load(groups) as saved:
            return cls(index, index.hnsw.efSearch, Groups(saved["ids"], saved["starts"]))

    def search(
        self, states_BD: np.ndarray, count: int, seen: Sequence[np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids int64 [B, count], scores float32 [B, count]), best first; PADDING_ID and EXCLUDED where fewer were
        found. ``seen``: ids that each row may not be answered, of any number."""
        queries = asking(states_BD)
        ids = np.full((len(queries), count), PADDING_ID, np.int64)
        scores = np.full((len(queries), count), EXCLUDED, np.float32)
        more = np.array([len(s) for s in seen] if seen is not None else [0] * len(queries))
        extra = min(int(more.max(initial=0)), count)  # seen items are seldom all among the best
        places = np.arange(len(queries))
        while len(places):
            rows_BK, scores_BK = self._nearest(queries[places], count + extra)
            short = []
            for i, rows_K, scores_K in zip(places, rows_BK, scores_BK, strict=True):
                live = rows_K >= 0
                kept, kept_scores = self.groups.expand(rows_K[live], scores_K[live], count + int(more[i]))
                if more[i]:
                    free = ~np.isin(kept, seen[i])  # type: ignore[index]
                    kept, kept_scores = kept[free], kept_scores[free]
                n = min(len(kept), count)
                ids[i, :n], scores[i, :n] = kept[:n], kept_scores[:n]
                if n < count and more[i] > extra:
                    short.append(i)
            places, extra = np.array(short, np.int64), int(more[short].max(initial=0))
        return ids, scores

    def _nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows of the index int64 [B, K], scores float32 [B, K]), best first; -1 where fewer were found."""
        import faiss

        k = min(k, self.index.ntotal)
        parameters = faiss.SearchParametersHNSW(efSearch=max(self.effort, k))  # type: ignore[attr-defined]
        if self.index.metric_type == faiss.METRIC_INNER_PRODUCT:
            scores, rows = self.index.search(queries, k, params=parameters)
            return rows, scores
        width = queries.shape[1]
        _, rows = self.index.search(np.pad(queries, ((0, 0), (0, 1))), k, params=parameters)
        vectors = self.index.reconstruct_batch(np.maximum(rows, 0).ravel())[:, :width].reshape(*rows.shape, width)
        scores = np.where(rows < 0, np.float32(EXCLUDED), np.einsum("bkd,bd->bk", vectors, queries))
        order = np.argsort(-scores, axis=1, kind="stable")  # distances round otherwise
        return np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)


class IndexedRetrieval:
    """The retrieval stage as a function: an encoder graph, then the index. Files of ``folder``: ENCODER, INDEX, GROUPS
    and POPULAR, which answers a history without a known item."""

    def __init__(self, folder: Path, shapes: StageTensors, threads: int = 1) -> None:
        self.encoder, self.popular = Encoder(folder, shapes, threads), Popular(folder)
        self.index, self.shapes = ItemIndex.load(folder, threads), shapes

    def __call__(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Candidate ids int64 [B, M + N], scores float32 [B, M + N], encoded history float32 [B, E, D] of what
        ``contract.retrieval_inputs`` names, the M rising items before the N that the index finds beside them."""
        history_BT, seen_BS, *_ = inputs
        state_BD, encoded, of_rising = self.encoder(inputs)
        rising_BM = rising_of(self.shapes, inputs)
        left_out = np.concatenate([seen_BS, rising_BM], 1)
        ids, scores = self.index.search(state_BD, self.shapes.candidates, [row[row != PADDING_ID] for row in left_out])
        cold = without_history(history_BT)
        self.popular.fill(cold, left_out, ids, scores)
        if self.shapes.rising:
            of_rising[cold] = self.popular.of(rising_BM[cold])
        return [*with_rising(rising_BM, of_rising, seen_BS, ids, scores), encoded]
