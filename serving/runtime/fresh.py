"""Fresh items join what the trained tables gave: the best of them by the user's state are ranked beside the candidates
and take the places that their scores earn.

Axis legend: B rows, N candidates, M fresh items of a row, F all fresh items, T history events, D width, C values of a
candidate (its score, then a probability a head).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from serving.runtime.live_catalogue import LiveCatalogue
from vivace.contract import FIRST_ID, PADDING_ID
from vivace.onnx_session import open_session

GRAPH, STATE_GRAPH = "fresh.onnx", "fresh_state.onnx"  # the second where the retriever reads the context
# inputs: arrays of fresh items
ATTRIBUTES = {"FRESH_CATEGORIES": "categories", "FRESH_LISTS": "lists", "FRESH_NUMBERS": "numbers"}
NOWHERE = np.float32(-np.inf)
EXCLUDED = np.float32(-1e30)  # as the graphs score what must not be answered


class FreshRanking:
    """``folder``: with the graphs of ``training.data.fresh_ranking``."""

    def __init__(self, folder: Path, catalogue: LiveCatalogue, options: ort.SessionOptions | None = None) -> None:
        self._session = open_session(folder / GRAPH, options=options)
        shapes, self._state = catalogue.shapes, None
        self._context = [tensor.name for tensor in shapes.moment[shapes.types :]]
        if self._context:
            self._state = open_session(folder / STATE_GRAPH, options=options)
        self._inputs = [i.name for i in self._session.get_inputs()]
        self._attributes = [name for name in self._inputs if name in ATTRIBUTES]
        self.catalogue = catalogue

    def _states(self, newest_BD: np.ndarray, moment: Sequence[np.ndarray]) -> np.ndarray:
        """What items are scored against, float32 [B, D]: the newest encoded event in the context of its request."""
        if self._state is None:
            return newest_BD
        context = dict(zip(self._context, moment[len(moment) - len(self._context) :], strict=True))
        states: np.ndarray = self._state.run(None, {self._state.get_inputs()[0].name: newest_BD, **context})[0]
        return states

    def _chosen(
        self, history_BT: np.ndarray, state_BD: np.ndarray, seen_BM: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(places of the M best fresh items int64 [B, M], their retrieval scores float32 [B, M], NOWHERE where there
        are fewer). Of a row without a known item the newest ones, as popular as an item without an event."""
        fresh, shapes = self.catalogue.fresh, self.catalogue.shapes
        assert fresh is not None
        slope, intercept = self.catalogue.tables.names["score"]
        match_BF = np.einsum("bd,fd->bf", state_BD, fresh.of("vectors"))  # a product's last bit goes by an item's place
        score_BF = slope * (match_BF + fresh.of("biases")) + np.float32(intercept)
        slots_F = fresh.of("slots")
        cold_B = (history_BT < FIRST_ID).all(1)
        score_BF[cold_B] = slots_F
        score_BF[:, ~fresh.of("alive")] = NOWHERE
        for row in np.flatnonzero(seen_BM.any(1)):
            score_BF[row, np.isin(slots_F, seen_BM[row])] = NOWHERE
        m = min(shapes.fresh, fresh.count)
        places_BM = np.argpartition(-score_BF, m - 1, axis=1)[:, :m]
        newest_BM = np.argsort(-slots_F[places_BM], axis=1, kind="stable")  # of equal scores the newest comes first
        places_BM = np.take_along_axis(places_BM, newest_BM, 1)
        score_BM = np.take_along_axis(score_BF, places_BM, 1)
        score_BM[cold_B] = np.where(score_BM[cold_B] > NOWHERE, np.float32(0), NOWHERE)
        return places_BM, score_BM.astype(np.float32)

    def _ids(self, places_BM: np.ndarray, score_BM: np.ndarray) -> np.ndarray:
        fresh = self.catalogue.fresh
        assert fresh is not None
        ids_BM = fresh.of("slots")[places_BM] + self.catalogue.shapes.items
        return np.where(score_BM > NOWHERE, ids_BM, PADDING_ID)

    def ranked(
        self, history_BT: np.ndarray, scores_BN: np.ndarray, encoded_BTD: np.ndarray, seen_BM: np.ndarray,
        moment: Sequence[np.ndarray], ranked_BN: np.ndarray, values_BCN: np.ndarray,
    ) -> list[np.ndarray]:  # fmt: skip
        """Ids int64 [B, N], best first, and their values float32 [B, C, N], of the ranked candidates and the fresh
        items; as they came where there is no fresh item. ``scores_BN``: the candidates' retrieval scores; ``moment``:
        of ``contract.StageTensors.moment``."""
        fresh = self.catalogue.fresh
        if fresh is None or not fresh.alive:
            return [ranked_BN, values_BCN]
        places_BM, score_BM = self._chosen(history_BT, self._states(encoded_BTD[:, -1], moment), seen_BM)
        t = max(int((history_BT != PADDING_ID).sum(1).max()), 1)
        safe_BM = np.maximum(score_BM, EXCLUDED)
        tensors = [history_BT[:, -t:], scores_BN, encoded_BTD[:, -t:], safe_BM, fresh.of("vectors")[places_BM]]
        feed = dict(zip(self._inputs, tensors, strict=False))
        feed |= {name: fresh.of(ATTRIBUTES[name])[places_BM] for name in self._attributes}
        for tensor, values in zip(self.catalogue.shapes.moment, moment, strict=True):
            of_events = tensor.name == self.catalogue.shapes.history_types.name
            feed[tensor.name] = values[:, -t:] if of_events else values
        values_BCM = self._session.run(None, feed)[0]
        return self._merged(self._ids(places_BM, score_BM), values_BCM, ranked_BN, values_BCN)

    def unranked(
        self, history_BT: np.ndarray, encoded_BTD: np.ndarray, seen_BM: np.ndarray, moment: Sequence[np.ndarray],
        ids_BN: np.ndarray, values_BCN: np.ndarray,
    ) -> list[np.ndarray]:  # fmt: skip
        """The same by retrieval scores alone."""
        fresh = self.catalogue.fresh
        if fresh is None or not fresh.alive:
            return [ids_BN, values_BCN]
        places_BM, score_BM = self._chosen(history_BT, self._states(encoded_BTD[:, -1], moment), seen_BM)
        values_BCM = np.zeros((len(ids_BN), values_BCN.shape[1], score_BM.shape[1]), np.float32)
        values_BCM[:, 0] = score_BM
        return self._merged(self._ids(places_BM, score_BM), values_BCM, ids_BN, values_BCN)

    @staticmethod
    def _merged(
        ids_BM: np.ndarray, values_BCM: np.ndarray, ranked_BN: np.ndarray, values_BCN: np.ndarray
    ) -> list[np.ndarray]:
        n = ranked_BN.shape[1]
        ids, values = np.concatenate([ranked_BN, ids_BM], 1), np.concatenate([values_BCN, values_BCM], 2)
        score = np.where(ids == PADDING_ID, NOWHERE, values[:, 0])
        order = np.argsort(-score, axis=1, kind="stable")[:, :n]
        return [np.take_along_axis(ids, order, 1), np.take_along_axis(values, order[:, None], 2)]
