"""V-SKNN, the nearest sessions of a session: a baseline of logs of sessions.

Source: Ludewig & Jannach, "Evaluation of session-based recommendation algorithms" (UMUAI 2018), section 3.2.
Axis legend: B requests, S training sessions, V item ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import scipy.sparse as sp

from training.data.counters import incidence
from vivace.contract import FIRST_ID, ITEM, TIME

SESSIONS = "nearest sessions (V-SKNN)"  # the row of an evaluation
NEAREST, SAMPLE = 500, 5000  # neighbours that are summed, and the newest sessions they are picked from


class SessionNeighbours:
    """Training sessions as sets of items, the oldest first.

    An item of the request weighs its place from the start over the number of items, its newest place if it came twice.
    Of the ``sample`` newest sessions that share an item with the request the ``nearest`` by the sum of the weights of
    what they share, the newer of equals, give each of their items that sum.
    """

    def __init__(self, files: list[Path], items: int, nearest: int = NEAREST, sample: int = SAMPLE) -> None:
        """``files``: parquet of training sequences. ``items``: V."""
        if nearest < 1 or sample < nearest:
            raise ValueError(f"SessionNeighbours: expected 1 <= nearest <= sample, got {nearest} and {sample}")
        self.items, self.nearest, self.sample = items, nearest, sample
        sessions: list[np.ndarray] = []
        ends: list[np.ndarray] = []
        for file in files:
            table = pq.read_table(file, columns=[ITEM, TIME])
            flat, times = (table[name].combine_chunks() for name in (ITEM, TIME))
            stops = flat.offsets.to_numpy() - flat.offsets[0].as_py()
            sessions += np.split(flat.flatten().to_numpy(), stops[1:-1])
            ends.append(times.flatten().to_numpy()[stops[1:] - 1])
        order = np.argsort(np.concatenate(ends), kind="stable") if ends else np.empty(0, int)
        self.sessions_SV = self._sets([sessions[i] for i in order])
        self.of_item_VS: sp.csr_matrix = self.sessions_SV.T.tocsr()

    def _sets(self, sessions: Sequence[np.ndarray]) -> sp.csr_matrix:
        """1 where a session has an item of the vocabulary."""
        flat = np.concatenate([*sessions, np.empty(0, np.int64)])
        rows = np.repeat(np.arange(len(sessions)), [len(s) for s in sessions])
        return incidence(rows, flat, (len(sessions), self.items))

    def _weights(self, histories: Sequence[np.ndarray]) -> sp.csr_matrix:
        """Weight of each item of each request, float32 [B, V]."""
        parts = []
        for row, history in enumerate(histories):
            newest = {int(item): place for place, item in enumerate(history, 1) if item >= FIRST_ID}
            parts += [(row, item, place / len(history)) for item, place in newest.items()]
        rows, columns, values = zip(*parts, strict=True) if parts else ((), (), ())
        return sp.csr_matrix((np.array(values, np.float32), (rows, columns)), shape=(len(histories), self.items))

    def scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """Score of every item, float32 [B, V], after ``histories`` of item ids, oldest first; 0 where no neighbour has
        it."""
        shared = (self._weights(histories) @ self.of_item_VS).tocsr()
        shared.sort_indices()
        rows, columns, values = [], [], []
        for row in range(len(histories)):
            part = slice(shared.indptr[row], shared.indptr[row + 1])
            sessions, weight = shared.indices[part][-self.sample :], shared.data[part][-self.sample :]
            near = np.lexsort((-sessions, -weight))[: self.nearest]
            rows.append(np.full(len(near), row))
            columns.append(sessions[near])
            values.append(weight[near])
        index = (np.concatenate([*rows, []]).astype(int), np.concatenate([*columns, []]).astype(int))
        kept = sp.csr_matrix((np.concatenate([*values, []]), index), shape=shared.shape)
        summed: np.ndarray = np.asarray((kept @ self.sessions_SV).todense(), np.float32)
        return summed
