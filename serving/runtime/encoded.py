"""What retrieval does beside scoring items, where those lie in an index or in shards: the history to the user's state,
and popular items where there is no history to go by.

Rising items (``live_feed``) join what was found as they join in the graph that scores every item: the others are
found without them, and they stand before those, each item once.

Axis legend: B rows, T history events, E encoded events, D width, N candidates, S seen items, M rising items, V item
ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from serving.runtime.by_length import chunks, together
from vivace.contract import FIRST_ID, PADDING_ID, StageTensors
from vivace.onnx_session import open_session

EXCLUDED = -1e30  # as in the exact graph: the score of a place that no item takes
ENCODER, POPULAR = "encoder.onnx", "popular.npz"
OF_ITEMS = "of_items"  # in POPULAR
ROWS = "encoder.rows"  # with int8 tables: the embeddings that ENCODER reads, which ONNX Runtime maps into memory
STATE = "STATE"  # output of the encoder graph before the encoded history, where a run reads context
RISING = "RISING_SCORES"  # the same between the two, where a run has live counters: retrieval scores of RISING_IDS


class Encoder:
    """Histories to states by the graph ENCODER of ``folder``. ``whole``: they are read padded to their full length, as
    the graph that scores every item reads them; the states are the same but for rounding."""

    def __init__(self, folder: Path, shapes: StageTensors, threads: int = 1, whole: bool = False) -> None:
        self._graph, self._shapes, self._whole = open_session(folder / ENCODER, threads), shapes, whole

    def __call__(self, inputs: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(state float32 [B, D], encoded history float32 [B, E, D], retrieval scores of the rising items float32
        [B, M]) of what ``contract.retrieval_inputs`` names; M is 0 without live counters."""
        history_BT, _, *more = inputs
        s, names, parts = self._shapes, [i.name for i in self._graph.get_inputs()], []
        of_events = (s.history_ids.name, s.history_times.name, s.history_types.name)
        for places, t in chunks(history_BT, self._whole):
            named = zip(names, (history_BT, *more), strict=True)
            tensors = {n: v[places, -t:] if n in of_events else v[places] for n, v in named}
            parts.append((places, self._graph.run(None, tensors)))
        *others, encoded = together(parts, len(history_BT), s.memory or history_BT.shape[1])
        of_rising = others.pop() if s.rising else np.empty((len(history_BT), 0), np.float32)
        return others[0] if others else encoded[:, -1], encoded, of_rising


class Popular:
    """The file POPULAR of ``folder``: ``ids`` by falling popularity and their ``scores``, more than may be seen; with
    live counters the scores of all items by id, float32 [V], as any may rise."""

    def __init__(self, folder: Path) -> None:
        with np.load(folder / POPULAR) as saved:
            self.ids, self.scores = saved["ids"], saved["scores"]
            self._of_items = saved.get(OF_ITEMS)

    def fill(self, places: np.ndarray, seen_BS: np.ndarray, ids_BN: np.ndarray, scores_BN: np.ndarray) -> None:
        """Puts the most popular that were not seen into the rows ``places``."""
        for i in places:
            keep = np.flatnonzero(~np.isin(self.ids, seen_BS[i]))[: ids_BN.shape[1]]
            ids_BN[i, : len(keep)], scores_BN[i, : len(keep)] = self.ids[keep], self.scores[keep]

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Scores float32 of items by id, of any shape."""
        assert self._of_items is not None
        scores: np.ndarray = self._of_items[ids]
        return scores


def rising_of(shapes: StageTensors, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """RISING_IDS int64 [B, M] among what ``contract.retrieval_inputs`` names; M is 0 without live counters."""
    return inputs[-1] if shapes.rising else np.empty((len(inputs[0]), 0), np.int64)


def with_rising(
    rising_BM: np.ndarray, of_rising_BM: np.ndarray, seen_BS: np.ndarray, ids_BN: np.ndarray, scores_BN: np.ndarray
) -> list[np.ndarray]:
    """(ids int64 [B, M + N], scores float32 [B, M + N]): rising items that were not seen, in their order, then what was
    found without them; PADDING_ID and EXCLUDED at the end where there are fewer. Source:
    ``training.models.retrieval.propose``."""
    if not rising_BM.shape[1]:
        return [ids_BN, scores_BN]
    out_BM = rising_BM < FIRST_ID
    for out, rising, seen in zip(out_BM, rising_BM, seen_BS, strict=True):
        out |= np.isin(rising, seen[seen != PADDING_ID])
    scores = np.concatenate([np.where(out_BM, np.float32(EXCLUDED), of_rising_BM), scores_BN], 1)
    ids = np.where(scores > EXCLUDED / 2, np.concatenate([rising_BM, ids_BN], 1), PADDING_ID)
    order = np.argsort(ids == PADDING_ID, axis=1, kind="stable")
    return [np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)]


def without_history(history_BT: np.ndarray) -> np.ndarray:
    """Places of the rows that have no known item to go by."""
    return np.flatnonzero((history_BT < FIRST_ID).all(1))
