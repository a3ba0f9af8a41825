"""Retrieval through a FAISS index, for catalogues too large to score every item for every request.

A graph of near neighbours (HNSW, Malkov & Yashunin 2018) under the inner product; inverted lists (IVF) were measured
too and find far less for the same time (docs/log.md). The item bias is one more dimension; a state meets it with a 1.
``training.compile.index`` builds and judges it. Axis legend: B states, V item ids, D width, N candidates, S seen items.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serving.runtime.by_length import chunks, together
from vivace.contract import FIRST_ID, PADDING_ID, StageTensors
from vivace.onnx_session import open_session

EXCLUDED = -1e30  # as in the exact graph: the score of a place that no item takes
FACTORY = "HNSW32"  # "HNSW32_SQ8": a quarter of the memory, about one in a hundred candidates less
INDEX, ENCODER, POPULAR = "index.faiss", "encoder.onnx", "popular.npz"


class ItemIndex:
    """``search(states, count, seen)`` answers the ``count`` best items that are not ``seen``. ``effort``: how many
    items a search keeps in view (efSearch); at least the number it is asked for."""

    def __init__(self, index: Any, effort: int) -> None:
        self.index, self.effort = index, effort

    @classmethod
    def build(cls, table_VD: np.ndarray, bias_V: np.ndarray, factory: str = FACTORY, threads: int = 1) -> ItemIndex:
        """``table_VD`` float32 [V, D] and ``bias_V`` [V] of all ids, the special ones included (they are left out)."""
        import faiss

        rows = np.concatenate([table_VD, bias_V[:, None]], 1)[FIRST_ID:]
        rows = np.ascontiguousarray(rows, np.float32)
        faiss.omp_set_num_threads(threads)
        index = faiss.index_factory(rows.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        index.train(rows)
        index.add(rows)
        return cls(index, 1)

    def save(self, path: Path) -> None:
        import faiss

        self.index.hnsw.efSearch = self.effort
        faiss.write_index(self.index, str(path))

    @classmethod
    def load(cls, path: Path, threads: int = 1) -> ItemIndex:
        import faiss  # here and above: only an indexed run needs it

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
        import faiss

        more = max((len(s) for s in seen), default=0) if seen is not None else 0
        queries = np.concatenate([states_BD, np.ones((len(states_BD), 1), np.float32)], 1).astype(np.float32)
        parameters = faiss.SearchParametersHNSW(efSearch=max(self.effort, count + more))  # type: ignore[attr-defined]
        found_scores, rows = self.index.search(queries, count + more, params=parameters)
        ids = np.where(rows < 0, PADDING_ID, rows + FIRST_ID)
        out, scores = np.full((len(ids), count), PADDING_ID, np.int64), np.full((len(ids), count), EXCLUDED, np.float32)
        for i, row in enumerate(ids):
            live = row != PADDING_ID
            if seen is not None and len(seen[i]):
                live &= ~np.isin(row, seen[i])
            keep = np.flatnonzero(live)[:count]
            out[i, : len(keep)], scores[i, : len(keep)] = row[keep], found_scores[i, keep]
        return out, scores


class IndexedRetrieval:
    """The retrieval stage as a function: an encoder graph, then the index. Files of ``folder``: ENCODER, INDEX and
    POPULAR (``ids`` by falling popularity and their ``scores``), which answers a history without a known item."""

    def __init__(self, folder: Path, shapes: StageTensors, threads: int = 1) -> None:
        self.encoder = open_session(folder / ENCODER, threads)
        self.index, self.shapes = ItemIndex.load(folder / INDEX, threads), shapes
        with np.load(folder / POPULAR) as saved:
            self.popular, self.popularity = saved["ids"], saved["scores"]

    def __call__(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Candidate ids int64 [B, N], scores float32 [B, N], encoded history float32 [B, M, D] of history ids
        [B, T], seen ids [B, S] and, for timed shapes, times [B, T]."""
        history_BT, seen_BS, *times = inputs
        names, parts = [i.name for i in self.encoder.get_inputs()], []
        for places, t in chunks(history_BT):
            tensors = [v[places, -t:] for v in (history_BT, *times)]
            parts.append((places, self.encoder.run(None, dict(zip(names, tensors, strict=True)))))
        encoded = together(parts, len(history_BT), self.shapes.memory or history_BT.shape[1])[0]
        count = self.shapes.candidates
        seen = [row[row != PADDING_ID] for row in seen_BS]
        ids, scores = self.index.search(encoded[:, -1], count, seen)
        for i in np.flatnonzero((history_BT < FIRST_ID).all(1)):
            keep = np.flatnonzero(~np.isin(self.popular, seen[i]))[:count]
            ids[i, : len(keep)], scores[i, : len(keep)] = self.popular[keep], self.popularity[keep]
        return [ids, scores, encoded]
