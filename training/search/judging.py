"""What a search ranker is worth: on requests with a made query, and on what was clicked in a log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from search.features import personal
from search.hybrid import diversify
from search.log import SearchLog
from search.online import SearchResult
from training.metrics import bootstrap
from training.search.evaluate import ndcg
from training.search.ranker import Ensemble
from training.search.recommender import Recommended
from vivace import contract

DIVERSITIES = (0.0, 0.25, 0.5, 0.75)


@dataclass
class SearchRequests:
    """Requests with a query: what is recommended beside it and what the query found. ``gained``: gain by item id.
    ``hindsight`` bool [requests]: whether the recommendation has learned what was clicked (``in_hindsight``)."""

    gained: list[dict[int, float]]
    ids: list[np.ndarray]
    features: list[np.ndarray]
    recommended: Recommended
    hindsight: np.ndarray

    @classmethod
    def of(
        cls, gained: list[dict[int, float]], results: Sequence[SearchResult], recommended: Recommended,
        hindsight: np.ndarray | None = None,
    ) -> SearchRequests:  # fmt: skip
        """``hindsight``: None for requests of which none was learned."""
        ids, features, _ = zip(*results, strict=True)
        learned = np.zeros(len(gained), bool) if hindsight is None else hindsight
        return cls(gained, list(ids), list(features), recommended, learned)

    def with_history(self, i: int) -> np.ndarray:
        """Features float32 [N, X] as a server works them out for the request's user."""
        return self._beside(i, self.recommended.ids, self.recommended.scores)

    def without_history(self, i: int) -> np.ndarray:
        """The same for someone unknown, beside whose query a server recommends what is popular."""
        return self._beside(i, self.recommended.ids_of_nobody, self.recommended.scores_of_nobody)

    def _beside(self, i: int, ids_BM: np.ndarray, scores_BM: np.ndarray) -> np.ndarray:
        if not len(self.ids[i]):  # a logged query without a word
            return self.features[i]
        return personal(self.features[i], self.ids[i], ids_BM[i], scores_BM[i])[0]

    @property
    def places(self) -> range:
        return range(len(self.gained))

    def gains(self, i: int) -> np.ndarray:
        return np.array([self.gained[i].get(item, 0.0) for item in self.ids[i].tolist()])

    def ndcg(self, i: int, order: np.ndarray) -> float:
        """NDCG@10 of the found items in ``order``; what was not found counts."""
        return ndcg(self.gains(i)[order], sorted(self.gained[i].values(), reverse=True))


def judge(requests: SearchRequests, ranker: Ensemble, history: bool) -> np.ndarray:
    """NDCG@10 of each request."""
    return np.array([requests.ndcg(i, order_of(requests, ranker, i, history)) for i in requests.places])


def judged_log(log: SearchLog, requests: SearchRequests, ranker: Ensemble) -> dict[str, Any]:
    """NDCG@10 of the items that were shown, gains by inverse propensity: in the order shown, in the fused one, in the
    ranker's without and with history. Of other items nobody knows whether they would have been clicked. Lists whose
    click the recommendation has learned are left out and counted; {} where those are all."""
    orders: dict[str, list[float]] = {"shown": [], "fused": [], "ranked": [], "with_history": []}
    if requests.hindsight.all():
        return {}
    for i, list_items in enumerate(np.split(log.frame[contract.ITEM].to_numpy(), log.starts[1:-1])):
        if requests.hindsight[i]:
            continue
        ids, gains, displayed = requests.ids[i], requests.gained[i], list_items.tolist()
        positions = {
            "fused": np.arange(len(ids)),
            "ranked": order_of(requests, ranker, i, False),
            "with_history": order_of(requests, ranker, i, True),
        }
        lists = {"shown": displayed} | {
            name: [item for item in ids[order].tolist() if item in displayed] for name, order in positions.items()
        }
        for name, items in lists.items():
            ordered = items + [item for item in displayed if item not in items]
            best = sorted(gains.values(), reverse=True)
            orders[name].append(ndcg([gains.get(item, 0.0) for item in ordered], best))
    shown, fused, without, with_history = (np.array(v) for v in orders.values())
    gain = with_history - shown
    return {
        "searches": len(gain), "in_hindsight": int(requests.hindsight.sum()),
        "shown": float(shown.mean()), "fused": float(fused.mean()),
        "ranked": float(without.mean()), "with_history": float(with_history.mean()),
        "over_shown": float(gain.mean()), "over_shown_interval": bootstrap(gain),
    }  # fmt: skip


def order_of(requests: SearchRequests, ranker: Ensemble, i: int, history: bool) -> np.ndarray:
    if not len(requests.ids[i]):
        return np.empty(0, int)
    features_NX = requests.with_history(i) if history else requests.without_history(i)
    return np.argsort(-ranker.score(features_NX), kind="stable")


def diversity_costs(requests: SearchRequests, ranker: Ensemble, vectors_VE: np.ndarray) -> dict[str, dict[str, float]]:
    """By DIVERSITY: NDCG@10 with the history, and how alike the ten items are (mean cosine of their text's vectors)."""
    out = {}
    for diversity in DIVERSITIES:
        gained, alike = [], []
        for i in requests.places:
            n = len(requests.ids[i])
            if n < 2:
                continue
            vectors = vectors_VE[requests.ids[i] - contract.FIRST_ID]
            best = diversify(ranker.score(requests.with_history(i)), vectors, min(n, 10), diversity)
            gained.append(requests.ndcg(i, best))
            cosines = vectors[best] @ vectors[best].T
            alike.append((cosines.sum() - np.trace(cosines)) / (len(best) * (len(best) - 1)))
        out[f"{diversity:g}"] = {"NDCG@10": float(np.mean(gained)), "alike": float(np.mean(alike))}
    return out


def kinds_of(requests: SearchRequests, by_attributes: np.ndarray, ranker: Ensemble) -> dict[str, Any]:
    """By how the query was made: NDCG@10 of the fused order, of the ranker, of the ranker with the history and what
    that adds, with its interval."""
    fused = np.array([requests.ndcg(i, np.arange(len(requests.ids[i]))) for i in requests.places])
    without, with_history = judge(requests, ranker, False), judge(requests, ranker, True)
    target_found = np.array([requests.gains(i).any() for i in requests.places])
    out = {}
    for name, of_kind in (("words", ~by_attributes), ("attributes", by_attributes)):
        if of_kind.any():
            gain = (with_history - without)[of_kind]
            out[name] = {
                "requests": int(of_kind.sum()), "found": float(target_found[of_kind].mean()),
                "fused": float(fused[of_kind].mean()),
                "ranked": float(without[of_kind].mean()), "with_history": float(with_history[of_kind].mean()),
                "gain": float(gain.mean()), "gain_interval": bootstrap(gain),
            }  # fmt: skip
    return out
