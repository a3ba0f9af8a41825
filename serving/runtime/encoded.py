"""What retrieval does beside scoring items, where those lie in an index or in shards: the history to the user's state,
and popular items where there is no history to go by.

Axis legend: B rows, T history events, M encoded events, D width, N candidates, S seen items.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from serving.runtime.by_length import chunks, together
from vivace.contract import FIRST_ID, StageTensors
from vivace.onnx_session import open_session

EXCLUDED = -1e30  # as in the exact graph: the score of a place that no item takes
ENCODER, POPULAR = "encoder.onnx", "popular.npz"
ROWS = "encoder.rows"  # with int8 tables: the embeddings that ENCODER reads, which ONNX Runtime maps into memory
STATE = "STATE"  # output of the encoder graph before the encoded history, where a run reads context


class Encoder:
    """Histories to states by the graph ENCODER of ``folder``. ``whole``: they are read padded to their full length, as
    the graph that scores every item reads them; the states are the same but for rounding."""

    def __init__(self, folder: Path, shapes: StageTensors, threads: int = 1, whole: bool = False) -> None:
        self._graph, self._shapes, self._whole = open_session(folder / ENCODER, threads), shapes, whole

    def __call__(self, inputs: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(state float32 [B, D], encoded history float32 [B, M, D]) of what ``contract.retrieval_inputs`` names."""
        history_BT, _, *more = inputs
        s, names, parts = self._shapes, [i.name for i in self._graph.get_inputs()], []
        of_events = (s.history_ids.name, s.history_times.name, s.history_types.name)
        for places, t in chunks(history_BT, self._whole):
            named = zip(names, (history_BT, *more), strict=True)
            tensors = {n: v[places, -t:] if n in of_events else v[places] for n, v in named}
            parts.append((places, self._graph.run(None, tensors)))
        *state, encoded = together(parts, len(history_BT), s.memory or history_BT.shape[1])
        return state[0] if state else encoded[:, -1], encoded


class Popular:
    """The file POPULAR of ``folder``: ``ids`` by falling popularity and their ``scores``, more than may be seen."""

    def __init__(self, folder: Path) -> None:
        with np.load(folder / POPULAR) as saved:
            self.ids, self.scores = saved["ids"], saved["scores"]

    def fill(self, places: np.ndarray, seen_BS: np.ndarray, ids_BN: np.ndarray, scores_BN: np.ndarray) -> None:
        """Puts the most popular that were not seen into the rows ``places``."""
        for i in places:
            keep = np.flatnonzero(~np.isin(self.ids, seen_BS[i]))[: ids_BN.shape[1]]
            ids_BN[i, : len(keep)], scores_BN[i, : len(keep)] = self.ids[keep], self.scores[keep]


def without_history(history_BT: np.ndarray) -> np.ndarray:
    """Places of the rows that have no known item to go by."""
    return np.flatnonzero((history_BT < FIRST_ID).all(1))
