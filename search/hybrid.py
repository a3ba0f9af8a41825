"""Candidates from words, meaning and popularity: each branch on its own, then fused; filters, facets, diversity.
Axis legend: V items, N candidates, E width of the vectors, F text fields.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from search.data import Catalogue
from search.late import LateInteraction
from search.lexical import Lexical
from search.listed import Listed
from search.understanding import Understood

LEXICAL, DENSE, MATCHED, POPULAR = "lexical", "dense", "matched", "popular"
WEIGHTS = {MATCHED: 2.0, POPULAR: 0.1}
RRF = 60.0  # Cormack et al. 2009
NOWHERE = np.float32(-np.inf)
BLOCK = 64
LEVEL = 1e-3  # of popularity beside a share of the query's terms: what shares differ by counts more


@dataclass(frozen=True)
class Filters:
    """What an answer must be: one of the ``values`` of each attribute (an item with a list of values has any of them),
    within the ``ranges`` of each number (ends included; None for open), not among the rows ``without``."""

    values: Mapping[str, Sequence[str]] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    without: Sequence[int] = ()


@dataclass(frozen=True)
class Candidates:
    """``rows`` of the catalogue, best first by ``fused``; ``rank``: of each branch, int64 [N], -1 where it did not
    find the item; ``fields_FN``: BM25 by field; ``matches``: all rows that have a term of the query and are allowed,
    which is what facets count."""

    rows: np.ndarray
    fused: np.ndarray
    rank: dict[str, np.ndarray]
    fields_FN: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    matches: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def found_by(self, place: int) -> list[str]:
        """Branches that found the candidate at ``place``."""
        return [b for b, r in self.rank.items() if r[place] >= 0]


def top(scores_V: np.ndarray, count: int) -> np.ndarray:
    """Rows of the ``count`` best finite scores, best first, equal ones by row."""
    near = np.arange(len(scores_V))
    blocks = len(scores_V) // BLOCK
    if 0 < count <= blocks:  # the count-th best of the blocks' best is at most the count-th best of all
        best = scores_V[: blocks * BLOCK].reshape(blocks, BLOCK).max(1)
        near = np.flatnonzero(scores_V >= np.partition(best, blocks - count)[blocks - count])
    near = near[np.isfinite(scores_V[near])]
    best_rows: np.ndarray = near[np.argsort(-scores_V[near], kind="stable")][:count]
    return best_rows


def fuse(
    branches: Mapping[str, np.ndarray], count: int, weights: Mapping[str, float] | None = None
) -> Candidates:  # fmt: skip
    """Reciprocal rank fusion of rows, best first, of each branch; an item that several found is there once."""
    rows = np.unique(np.concatenate([np.empty(0, np.int64), *branches.values()]))
    fused, rank = np.zeros(len(rows)), dict[str, np.ndarray]()
    for name, branch in branches.items():
        at, place = np.searchsorted(rows, branch), np.arange(len(branch))
        rank[name] = np.full(len(rows), -1, np.int64)
        rank[name][at] = place
        fused[at] += (weights or {}).get(name, 1.0) / (RRF + place + 1)
    order = np.argsort(-fused, kind="stable")[:count]  # equal ones by row
    return Candidates(rows[order], fused[order].astype(np.float32), {b: r[order] for b, r in rank.items()})


class HybridIndex:
    """What retrieval needs of a catalogue: term weights, vectors, attributes.

    Args:
        vectors: unit vectors of the items float32 [V, E].
        weights: of each branch in the fusion (WEIGHTS, else 1); MATCHED of weight 0 is left out.
        late: how queries' words meet titles, where the text encoder says so.
    """

    def __init__(
        self, catalogue: Catalogue, lexical: Lexical, vectors_VE: np.ndarray,
        weights: Mapping[str, float] | None = None, late: LateInteraction | None = None,
    ) -> None:  # fmt: skip
        if not len(catalogue.items) == lexical.items == len(vectors_VE):
            raise ValueError(
                f"HybridIndex: expected as many vectors and lexical rows as items, got {len(vectors_VE)} and "
                f"{lexical.items} for {len(catalogue.items)}"
            )
        self.catalogue, self.lexical, self.vectors = catalogue, lexical, np.ascontiguousarray(vectors_VE, np.float32)
        self.weights, self.late = WEIGHTS | dict(weights or {}), late
        self.row = {item: i for i, item in enumerate(catalogue.items)}
        self.values: dict[str, np.ndarray] = {}
        self.codes: dict[str, np.ndarray] = {}
        for name, column in catalogue.attributes.items():
            self.values[name], codes = np.unique(np.array(column, object).astype(str), return_inverse=True)
            self.codes[name] = codes.astype(np.int32)
        self.listed = {name: Listed.of(column) for name, column in catalogue.lists.items()}
        p = catalogue.popularity
        self.popularity = np.zeros(len(catalogue.items), np.float32) if p is None else np.asarray(p, np.float32)
        matched = p is not None and self.weights[MATCHED] > 0
        self.shut_V: np.ndarray | None = None  # rows that must not be found (``extended``)
        self.branches = (LEXICAL, DENSE, *([MATCHED] if matched else []), POPULAR)

    def extended(self, changed: Catalogue, vectors_KE: np.ndarray) -> HybridIndex:
        """This index with the rows of ``changed`` behind its own. Terms that are new to it, and values of attributes,
        are known to it alone."""
        index, base = copy.copy(self), self.catalogue
        index.lexical = self.lexical.extended(changed.texts)
        index.vectors = np.concatenate([self.vectors, vectors_KE]).astype(np.float32)
        index.popularity = np.concatenate([self.popularity, np.asarray(changed.popularity, np.float32)])
        index.values, index.codes = {}, {}
        for name, column in changed.attributes.items():
            known = {value: code for code, value in enumerate(self.values[name].tolist())}
            codes = [known.setdefault(value, len(known)) for value in column]
            index.values[name] = np.array(list(known), object).astype(str)
            index.codes[name] = np.concatenate([self.codes[name], np.array(codes, np.int32)])
        index.listed = {name: self.listed[name].extended(column) for name, column in changed.lists.items()}
        index.catalogue = Catalogue(
            [*base.items, *changed.items], {},
            {name: [*column, *changed.attributes[name]] for name, column in base.attributes.items()},
            {name: np.concatenate([column, changed.numbers[name]]) for name, column in base.numbers.items()},
            index.popularity, {name: [*column, *changed.lists[name]] for name, column in base.lists.items()},
        )  # fmt: skip
        index.row = self.row | {item: len(base.items) + k for k, item in enumerate(changed.items)}
        return index

    def allowed(self, filters: Filters) -> np.ndarray:
        """bool [V]. Raises ValueError for an attribute or number that the catalogue does not have."""
        out_V = np.ones(len(self.catalogue.items), bool) if self.shut_V is None else ~self.shut_V
        for name, values in filters.values.items():
            if name in self.listed:
                out_V &= self.listed[name].having(values)
                continue
            if name not in self.codes:
                there = sorted([*self.codes, *self.listed])
                raise ValueError(f"filters: expected an attribute of {there}, got {name!r}")
            known = np.isin(self.values[name], list(values))
            out_V &= known[self.codes[name]]
        for name, (low, high) in filters.ranges.items():
            if name not in self.catalogue.numbers:
                raise ValueError(f"filters: expected a number of {sorted(self.catalogue.numbers)}, got {name!r}")
            value = self.catalogue.numbers[name]
            if low is not None:
                out_V &= value >= low  # NaN is in no range
            if high is not None:
                out_V &= value <= high
        if len(filters.without):
            out_V[np.asarray(filters.without, np.int64)] = False
        return out_V

    def candidates(
        self,
        understood: Understood | None,
        vector_E: np.ndarray | None,
        count: int = 200,
        allowed_V: np.ndarray | None = None,
    ) -> Candidates:
        """Up to ``count`` items by words (``understood``), by meaning (``vector_E``) or by both.

        By both, where it is known what is popular, a branch of its own (MATCHED) has the popular ones of those with the
        most of the query's terms: a broad query matches thousands alike, and words alone choose among them by chance.
        Popular items of all kinds fill what is missing, so that a narrow filter still fills an answer."""
        shut = None if allowed_V is None else ~allowed_V
        branches: dict[str, np.ndarray] = {}
        matches, fields_FV = np.empty(0, np.int64), None
        if understood is not None and understood.terms:
            fields_FV = self.lexical.by_field(understood.terms, understood.weights)
            scores_V = self.lexical.boosted(fields_FV)
            hit_V = scores_V > 0
            matches = np.flatnonzero(hit_V if allowed_V is None else hit_V & allowed_V)
            branches[LEXICAL] = matches[top(scores_V[matches], count)]
            if MATCHED in self.branches and vector_E is not None:
                cover_V = self.lexical.covered(understood.terms, understood.weights)
                value_N = cover_V[matches] + LEVEL * self.popularity[matches] / max(float(self.popularity.max()), 1e-9)
                branches[MATCHED] = matches[top(value_N, count)]
        if vector_E is not None:
            branches[DENSE] = top(self._shut(self.vectors @ vector_E, shut), count)
        if max(map(len, branches.values()), default=0) < count:
            branches[POPULAR] = top(self._shut(self.popularity.copy(), shut), count)
        fused = fuse(branches, count, self.weights)
        none_FN = np.zeros((len(self.lexical.fields), len(fused.rows)), np.float32)
        return replace(fused, fields_FN=none_FN if fields_FV is None else fields_FV[:, fused.rows], matches=matches)

    @staticmethod
    def _shut(scores_V: np.ndarray, shut_V: np.ndarray | None) -> np.ndarray:
        if shut_V is not None:
            scores_V[shut_V] = NOWHERE
        return scores_V

    def facets(self, rows: np.ndarray, most: int = 10) -> dict[str, list[tuple[str, int]]]:
        """Of each attribute, its most frequent values among ``rows`` with their counts."""
        out, counted = {}, dict[str, tuple[np.ndarray, np.ndarray]]()
        for name, codes in self.codes.items():
            counted[name] = self.values[name], np.bincount(codes[rows], minlength=len(self.values[name]))
        counted |= {name: (of.values, of.counts(rows)) for name, of in self.listed.items()}
        for name, (values, counts) in counted.items():
            order = np.argsort(-counts, kind="stable")[: most + 1]  # equal ones by value, as the values are in order
            named = [(str(values[i]), int(counts[i])) for i in order if counts[i] and values[i]]
            out[name] = named[:most]
        return out


def diversify(scores_N: np.ndarray, vectors_NE: np.ndarray, count: int, diversity: float) -> np.ndarray:
    """Places of ``count`` candidates by maximal marginal relevance (Carbonell and Goldstein 1998): each next one has
    the most of (1 - diversity) * score - diversity * similarity to the nearest chosen; scores are first put between
    0 and 1. ``diversity`` 0: by score."""
    if not 0 <= diversity <= 1:
        raise ValueError(f"diversity: expected 0..1, got {diversity}")
    count = min(count, len(scores_N))
    spread = float(np.ptp(scores_N)) if len(scores_N) else 0.0
    relevance_N = (scores_N - scores_N.min()) / spread if spread else np.zeros(len(scores_N))
    nearest_N, free_N = np.zeros(len(scores_N)), np.ones(len(scores_N), bool)
    out = []
    for _ in range(count):
        value_N = np.where(free_N, (1 - diversity) * relevance_N - diversity * nearest_N, -np.inf)
        best = int(value_N.argmax())
        out.append(best)
        free_N[best] = False
        nearest_N = np.maximum(nearest_N, vectors_NE @ vectors_NE[best])
    return np.array(out, np.int64)
