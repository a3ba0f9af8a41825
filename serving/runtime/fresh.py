"""Fresh items join what the trained tables gave: the best of them by the user's state are ranked beside the candidates
and take the places that their scores earn.

Axis legend: B rows, N candidates, M fresh items of a row, R those that are rising, F all fresh items, T history events,
D width, C values of a candidate (its score, then a probability a head), L live features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from serving.runtime.live_catalogue import LiveCatalogue
from vivace.contract import FIRST_ID, PADDING_ID
from vivace.live import order_of
from vivace.onnx_session import open_session

GRAPH, STATE_GRAPH = "fresh.onnx", "fresh_state.onnx"  # the second where the retriever reads the context
# inputs: arrays of fresh items
ATTRIBUTES = {"FRESH_CATEGORIES": "categories", "FRESH_LISTS": "lists", "FRESH_NUMBERS": "numbers"}
NOWHERE = np.float32(-np.inf)
EXCLUDED = np.float32(-1e30)  # as the graphs score what must not be answered
LIVE = "FRESH_LIVE"  # input: what live counters say of fresh items
COLD_STEP = np.float32(0.01)  # between two rising items of a cold user, as the ranking graph has it


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
        self, history_BT: np.ndarray, state_BD: np.ndarray, seen_BM: np.ndarray, rising_BR: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(places of the M best fresh items int64 [B, M], their retrieval scores float32 [B, M], NOWHERE where there
        are fewer): those that are rising, by their slots, then the user's best. Of a row without a known item the
        newest ones, as popular as an item without an event."""
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
        m, order_BF = min(shapes.fresh, fresh.count), score_BF
        if rising_BR is not None and rising_BR.any():
            is_rising_BF = (slots_F[None, :, None] == rising_BR[:, None, :]).any(2)
            order_BF = np.where(is_rising_BF & (score_BF > NOWHERE), np.float32(np.inf), score_BF)
        places_BM = np.argpartition(-order_BF, m - 1, axis=1)[:, :m]
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
        moment: Sequence[np.ndarray], rising: Sequence[np.ndarray], ranked_BN: np.ndarray, values_BCN: np.ndarray,
    ) -> list[np.ndarray]:  # fmt: skip
        """Ids int64 [B, N], best first, and their values float32 [B, C, N], of the ranked candidates and the fresh
        items; as they came where there is no fresh item. ``scores_BN``: the candidates' retrieval scores; ``moment``:
        of ``contract.StageTensors.moment``; ``rising``: features of the rising candidates and its ``rising_of_fresh``,
        none where they are not counted."""
        fresh = self.catalogue.fresh
        if fresh is None or not fresh.alive:
            return [ranked_BN, values_BCN]
        state_BD = self._states(encoded_BTD[:, -1], moment)
        places_BM, score_BM = self._chosen(history_BT, state_BD, seen_BM, rising[1] if rising else None)
        feed: dict[str, np.ndarray] = {}
        if rising:
            feed[LIVE] = self._live(places_BM, *rising[1:])
            score_BM = self._before_popular(history_BT, scores_BN, rising[0], score_BM, feed[LIVE])
        t = max(int((history_BT != PADDING_ID).sum(1).max()), 1)
        safe_BM = np.maximum(score_BM, EXCLUDED)
        tensors = [history_BT[:, -t:], scores_BN, encoded_BTD[:, -t:], safe_BM, fresh.of("vectors")[places_BM]]
        feed |= zip(self._inputs, tensors, strict=False)
        feed |= {name: fresh.of(ATTRIBUTES[name])[places_BM] for name in self._attributes}
        for tensor, values in zip(self.catalogue.shapes.moment, moment, strict=True):
            of_events = tensor.name == self.catalogue.shapes.history_types.name
            feed[tensor.name] = values[:, -t:] if of_events else values
        values_BCM = self._session.run(None, feed)[0]
        return self._merged(self._ids(places_BM, score_BM), values_BCM, ranked_BN, values_BCN)

    def _live(self, places_BM: np.ndarray, rising_BR: np.ndarray, features_BRL: np.ndarray) -> np.ndarray:
        """What live counters say of the fresh items in those places, float32 [B, M, L]; zeros of those that are not
        rising."""
        fresh = self.catalogue.fresh
        assert fresh is not None
        same_BMR = fresh.of("slots")[places_BM][:, :, None] == rising_BR[:, None, :]
        live: np.ndarray = same_BMR.astype(np.float32) @ features_BRL
        return live

    def _before_popular(
        self, history_BT: np.ndarray, scores_BN: np.ndarray, rising_BKL: np.ndarray, score_BM: np.ndarray,
        live_BML: np.ndarray,
    ) -> np.ndarray:  # fmt: skip
        """The scores with those of a cold user's rising items among those of the rising candidates, by what counts say
        of both: those have ``RankingGraph``'s scores, a step for each place above all that was popular in training."""
        counted = self.catalogue.shapes.counted
        order_BM, order_BK = order_of(live_BML, counted), order_of(rising_BKL, counted)
        before_BM = (order_BK[:, None, :] >= order_BM[:, :, None]).sum(2)
        place_BM = scores_BN.shape[1] - before_BM + order_BM / (1 + order_BM)  # between two places
        cold_BM = (history_BT < FIRST_ID).all(1)[:, None] & (order_BM > 0) & (score_BM > NOWHERE)
        above_BM = scores_BN.max(1, keepdims=True) + COLD_STEP * place_BM
        return np.where(cold_BM, above_BM, score_BM).astype(np.float32)

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
