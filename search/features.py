"""What a query and an item have in common, as numbers for the search ranker; the same code when it is trained and when
it serves. Axis legend: N candidates of the query, M of the recommendation, X features.
"""

from __future__ import annotations

import numpy as np

from search.hybrid import Candidates, HybridIndex
from search.late import NAMES
from search.lexical import PLACES
from search.text import terms
from search.understanding import Understood
from vivace.contract import PADDING_ID

PERSONAL = ("rank by history", "affinity")
RELATIVE = ("dense below the best", "dense by deviations")
NEAR = 10.0  # a branch's rank r counts NEAR / (NEAR + r)


def feature_names(index: HybridIndex) -> list[str]:
    fields = [f"bm25 {f.name}" for f in index.lexical.fields]
    intents = [f"{kind} {a}" for a in index.codes for kind in ("named", "likely")]
    intents += [f"named {a}" for a in index.listed]
    ranks = [f"rank {b}" for b in index.branches]
    late = [*NAMES, *RELATIVE] if index.late is not None else []
    return [*fields, "bm25", "bm25 of the best", "dense", "in title", "in text", *PLACES, *intents, *ranks, "fused",
            "popular", "terms", *late, *PERSONAL]  # fmt: skip


def _chances(understood: Understood, attribute: str, named: bool, values_U: np.ndarray) -> np.ndarray:
    """float32 [U]: probability that the query asks for each value of the attribute."""
    chance_U = np.zeros(len(values_U), np.float32)
    for i in understood.intents:
        if i.attribute == attribute and i.named == named:
            chance_U[values_U == i.value] = i.probability
    return chance_U


def features(
    index: HybridIndex, understood: Understood, vector_E: np.ndarray, candidates: Candidates,
    states_SP: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """float32 [N, X] in the order of ``feature_names``; the last ones, PERSONAL, are 0 until ``personal`` fills them
    in: they are known where query and history meet. ``states_SP``: of the query's tokens, where the index has ``late``.
    """
    rows, n = candidates.rows, len(candidates.rows)
    whole_N = index.lexical.boosted(candidates.fields_FN)
    best = max(float(whole_N.max(initial=0.0)), 1e-6)
    columns = [*candidates.fields_FN, whole_N, whole_N / best, index.vectors[rows] @ vector_E]
    columns += list(index.lexical.coverage(understood.terms, rows, understood.weights))
    columns += list(index.lexical.places(terms(understood.mended), rows).T)
    for a, codes in index.codes.items():
        for named in (True, False):
            columns.append(_chances(understood, a, named, index.values[a])[codes[rows]])
    for a, listed in index.listed.items():
        columns.append(listed.largest(_chances(understood, a, True, listed.values), rows))
    for b in index.branches:
        r = candidates.rank.get(b, np.full(n, -1))
        columns.append(np.where(r >= 0, NEAR / (NEAR + r), 0.0))
    columns += [candidates.fused * 60, index.popularity[rows], np.full(n, len(understood.words))]
    if index.late is not None:
        columns += list(index.late(np.empty((0, 0)) if states_SP is None else states_SP, rows).T)
        dense_N = index.vectors[rows] @ vector_E
        columns.append(dense_N - dense_N.max(initial=-1.0))
        columns.append((dense_N - dense_N.mean()) / max(float(dense_N.std()), 1e-6) if n else dense_N)
    columns += [np.zeros(n)] * len(PERSONAL)
    return np.stack([np.asarray(x, np.float32) for x in columns], 1)


def personal(
    features_NX: np.ndarray, ids_N: np.ndarray, ranked_M: np.ndarray, scores_M: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(features with PERSONAL filled in, place of each candidate in the recommendation int64 [N], -1 for none).

    ``ids_N``: the query's candidates; ``ranked_M``, ``scores_M``: what the history recommends, best first. PERSONAL:
    how far up a candidate stands there, and its score between the recommendation's worst (0) and best (1)."""
    place = {int(i): m for m, i in enumerate(ranked_M) if i != PADDING_ID}
    at_N = np.array([place.get(int(i), -1) for i in ids_N], np.int64)
    live = max(len(place), 1)
    low, high = float(scores_M[:live].min()), float(scores_M[:live].max())
    out = features_NX.copy()
    known = at_N >= 0
    out[known, -2] = NEAR / (NEAR + at_N[known])
    out[known, -1] = (scores_M[at_N[known]] - low) / max(high - low, 1e-6)
    return out, at_N
