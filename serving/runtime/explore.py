"""New items in the place of ranked ones, at a set share of the places, with the chance of what is shown.

What is known of a new item is the first head's calibrated probability alone, p of being taken. Thompson sampling then
draws each one's odds of being taken from the law that has p/(1-p) as its mean and knows nothing else, the exponential
one: the same as a rate of Beta(1, (1-p)/p), a prior worth one click. The largest draw is shown. What comes of it is
learned with the next version. Source: Thompson 1933; Chapelle and Li 2011.

Chances are exact. Places are dealt to blocks of 1/share places, and the new items to the blocks: a block explores one
of its places with as much chance as makes ``share`` of each, so what happens at two places of a block excludes itself
and nothing else depends on anything.

Axis legend: B rows, N candidates, C values of a candidate (its score, then a probability a head), K shown items,
M new items.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from serving.runtime.drift import is_counted
from serving.runtime.response import ResponseStage

ENVIRONMENT = "VIVACE_EXPLORE"  # what a server tells its workers: the share of places
COUNTS_FILE = "item_events.npy"  # of a version's response: training events by item id, up to 255, uint8 [V]
FEW = 5  # events below which an item is new
POOL = 16  # new items a block at most, the most probable
MOST_SHARE = 0.2
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(128)
Avoid = Callable[[np.ndarray], np.ndarray]  # bool of the ids' shape
NODES, WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2


def check_share(share: float) -> None:
    """Raises ValueError for a share of places that is none."""
    if not 0 <= share <= MOST_SHARE:
        raise ValueError(f"--explore: expected 0 % to {MOST_SHARE:.0%} of the places, got {share:.4g} of 1")


def chances(probability_M: np.ndarray) -> np.ndarray:
    """Chance float64 [M] that each one's draw is the largest: of exponential laws with the odds as means. With w the
    chance that the one of the largest mean stays below a draw's complement, the integral of r w^(r-1) prod (1 - w^r_j)
    over 0..1, r the ratios of the rates; by Gauss and Legendre."""
    p = np.clip(np.asarray(probability_M, np.float64), 1e-6, 1 - 1e-6)
    odds = p / (1 - p)
    ratio_M1 = (odds.max() / odds)[:, None]
    below_MG = 1 - NODES[None] ** ratio_M1
    all_G = below_MG.prod(0)
    chance_M = (ratio_M1 * NODES[None] ** (ratio_M1 - 1) * (all_G / below_MG) * WEIGHTS).sum(1)
    return chance_M / chance_M.sum()


def nothing(ids: np.ndarray) -> np.ndarray:
    """Avoids no id."""
    return np.zeros(ids.shape, bool)


class Explorer:
    """``share`` of the places; ``known_V``: whether an item of the tables has FEW events and more."""

    def __init__(self, share: float, known_V: np.ndarray, rng: np.random.Generator | None = None) -> None:
        check_share(share)
        self.share, self._known_V, self._rng = share, known_V, rng or np.random.default_rng()
        self._block = int(1 / share)

    @classmethod
    def of_worker(cls, response: Path) -> Explorer | None:
        """That of a worker whose server explores; None where it does not. ``response``: folder of the version's
        response stage. Raises FileNotFoundError for a version that does not know how often items were taken."""
        share = float(os.environ.get(ENVIRONMENT, "") or 0)
        if not share:
            return None
        file = response / COUNTS_FILE
        if not file.exists():
            raise FileNotFoundError(f"--explore: {file}: not there; 'vivace compile' makes a version that has it")
        return cls(share, np.load(file, allow_pickle=False) >= FEW)

    def is_new(self, ids: np.ndarray) -> np.ndarray:
        """bool of ids' shape; an id beyond the tables is of an item that came since."""
        known = self._known_V[np.minimum(ids, len(self._known_V) - 1)] & (ids < len(self._known_V))
        return ~known & (ids > 0)

    def __call__(
        self,
        ranked_BN: np.ndarray,
        values_BCN: np.ndarray,
        top_k_B: np.ndarray,
        may_B: list[bool],
        avoid: Avoid = nothing,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids and values with what is explored in its place; propensities float32 [B, N]: the chance that the place
        shows what it does, 1 behind what is shown). ``may_B``: rows that may explore; ``avoid``: which ids are never
        explored. The given arrays stay."""
        propensity_BN = np.ones(ranked_BN.shape, np.float32)
        if values_BCN.shape[1] < 2:  # without a head nothing is known of a new item
            return ranked_BN, values_BCN, propensity_BN
        new_BN = self.is_new(ranked_BN) & (values_BCN[:, 1] > 0) & ~avoid(ranked_BN)
        copied = False
        for row in np.flatnonzero(np.array(may_B) & new_BN.any(1)):
            k = min(int(top_k_B[row]), int(np.count_nonzero(ranked_BN[row])))
            pool = k + np.flatnonzero(new_BN[row, k:])
            if not k or not len(pool):
                continue
            chosen, propensity_BN[row, :k] = self._row(values_BCN[row, 1], pool, k)
            if chosen:
                if not copied:
                    ranked_BN, values_BCN, copied = ranked_BN.copy(), values_BCN.copy(), True
                for place, candidate in chosen:  # the displaced one takes the other's place, which is not shown
                    ranked_BN[row, [place, candidate]] = ranked_BN[row, [candidate, place]]
                    values_BCN[row][:, [place, candidate]] = values_BCN[row][:, [candidate, place]]
        return ranked_BN, values_BCN, propensity_BN

    def _row(self, probability_N: np.ndarray, pool: np.ndarray, k: int) -> tuple[list[tuple[int, int]], np.ndarray]:
        """((place, candidate) of what is explored, propensities float [K])."""
        starts = range(0, k, self._block)
        propensity_K, chosen = np.ones(k), list[tuple[int, int]]()
        for block, start in enumerate(starts[: len(pool)]):
            places = min(self._block, k - start)
            propensity_K[start : start + places] = 1 - self.share
            if self._rng.random() < self.share * places:
                best = pool[np.argsort(-probability_N[pool], kind="stable")]
                mine = best[block :: len(starts)][:POOL]
                place, chance_M = start + int(self._rng.integers(places)), chances(probability_N[mine])
                one = int(self._rng.choice(len(mine), p=chance_M))
                chosen.append((place, int(mine[one])))
                propensity_K[place] = self.share * chance_M[one]
        return chosen, propensity_K


def explored(
    explorer: Explorer, respond: ResponseStage, itself: bool, ranked_BN: np.ndarray, values_BCN: np.ndarray,
    top_k_B: np.ndarray, status_B: np.ndarray, queried: Sequence[bool], avoid: Avoid = nothing,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Ids, values and propensities (see ``Explorer``) of a request's rows: answers to a query, to someone without a
    history, and what is answered with less for load stay as they are, as does what a server asks ``itself``. ``avoid``:
    bool of which ids are never explored."""
    ranked_BN, values_BCN = respond.without_gone(ranked_BN, values_BCN)
    may_B = [not itself and is_counted(status) and not query for status, query in zip(status_B, queried, strict=True)]
    return explorer(ranked_BN, values_BCN, top_k_B, may_B, avoid)
