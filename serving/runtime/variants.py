"""Answers to one request with parts of it left out, by the models that answer the request itself.

Nothing is approximated: a variant is what the served graphs answer to the request without those parts, with the same
live counters, business rules and filters. What the user has seen stays left out, so that a removed item does not come
up itself, and events older than those that are read do not move up.
Axis legend: B variants, N candidates, C values of a candidate (its score, then a probability a head), X match features.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from serving.runtime.pipeline import Pipeline
from serving.runtime.ruled import Rules
from serving.runtime.stages import Row
from vivace import contract
from vivace.contract import FIRST_ID, OOV_ID, PADDING_ID
from vivace.explain_contract import (
    ATTRIBUTES,
    CONTEXT,
    COUNTERS,
    HISTORY,
    MEANING,
    QUERY,
    QUERY_PARTS,
    TIMES,
    TYPES,
    WORDS,
)

if TYPE_CHECKING:
    from search.online import SearchOptions, SearchResult

UNITS = 12  # newest distinct items of a history that are asked about
AT_ONCE = 32  # variants that go through the graphs together
Left = frozenset[int]  # parts that are left out, by their place among ``Variants.parts``
WHOLE: Left = frozenset()


@dataclass(frozen=True)
class Part:
    """What a request can be made without. ``name``: the item of ``events`` events of the history, a column of the
    context, or a part of a query; ``value``: of the column; ``unknown``: which training never saw, so that all the
    models read is that there is one."""

    kind: str
    name: str = ""
    value: str = ""
    events: int = 0
    unknown: bool = False


@dataclass(frozen=True)
class Answer:
    """Ids int64 [N], best first, as they would be shown, and their scores float32 [N]; by the models alone, before
    business rules: ids int64 [N] and their values float32 [C, N]. ``popular``: no known history is left, so scores are
    how popular items are."""

    shown: np.ndarray
    scores: np.ndarray
    ranked: np.ndarray
    values: np.ndarray
    popular: bool = False

    @cached_property
    def places(self) -> dict[int, int]:
        """From 1, of ids as they would be shown."""
        return {id_: place for place, id_ in enumerate(self.shown.tolist(), 1) if id_ != PADDING_ID}

    @cached_property
    def at(self) -> dict[int, int]:
        """Places from 0 among ``ranked``."""
        return {id_: place for place, id_ in enumerate(self.ranked.tolist()) if id_ != PADDING_ID}


class Variants:
    """Each variant is computed once.

    Attributes: ``parts``: what can be left out, first the ``of_history`` parts of the history, the newest first;
    ``status`` of the request itself."""

    def __init__(
        self, pipeline: Pipeline, row: Row, options: SearchOptions | None = None, rules: Rules | None = None,
        units: int = UNITS,
    ) -> None:  # fmt: skip
        self._pipeline, self._row, self._options, self._rules = pipeline, row, options, rules
        self._known = pipeline.transform.known([row])
        stored = self._known.stored.get(0)
        if row.history is None:
            items, types, times = stored or ([], [], [])
        else:
            items, types, times = row.history, list(row.types or ()), list(row.times or ())
        read = pipeline.shapes.history
        types, times = types or [""] * len(items), times or [0] * len(items)
        self._events = list(zip(items[-read:], types[-read:], times[-read:], strict=True))
        counted = Counter(item for item, _, _ in reversed(self._events))
        self.parts = [Part(HISTORY, item, events=n) for item, n in itertools.islice(counted.items(), units)]
        self.of_history = len(self.parts)
        self._answers: dict[Left, Answer] = {}
        self._base, (self.status,) = pipeline.transform([row], self._known)  # inputs of retrieval and ranking
        self._found: SearchResult | None = None
        if row.query and pipeline.search is not None:
            self._found = pipeline.search([row.query], [options], pipeline.unwanted([row], [options], self._known))[0]
        self.parts += self._others()

    def __getitem__(self, left: Left) -> Answer:
        self.ask([left])
        return self._answers[left]

    def ask(self, lefts: Sequence[Left]) -> None:
        """Computes those that were not asked for before, together."""
        new = [left for left in dict.fromkeys(lefts) if left not in self._answers]
        for start in range(0, len(new), AT_ONCE):
            self._compute(new[start : start + AT_ONCE])

    def _others(self) -> list[Part]:
        """Parts that are no history: what the models read of this request beside it."""
        pipeline, values = self._pipeline, self._known.values[0] if self._known.values else {}
        columns, parts = pipeline.transform.moment.columns, list[Part]()
        if pipeline.shapes.types and any(kind for _, kind, _ in self._events):
            parts.append(Part(TYPES))
        if pipeline.shapes.timed and any(moment for *_, moment in self._events):
            parts.append(Part(TIMES))
        given, ids = [name for name in columns.names if values.get(name, "") != ""], dict[str, int]()
        if given and columns.categoricals:
            encoded_BC = pipeline.transform.moment.encoded(self._known.values)[0]
            ids = dict(zip(columns.categoricals, encoded_BC[0].tolist(), strict=True))
        parts += [Part(CONTEXT, name, str(values[name]), unknown=ids.get(name) == OOV_ID) for name in given]
        if any(self._base[i].any() for i in self._live):
            parts.append(Part(COUNTERS))
        if self._found is not None and self._found[2]:
            parts += [Part(QUERY, name) for name in QUERY_PARTS if len(self._of_query[name])]
        return parts

    @cached_property
    def _live(self) -> list[int]:
        """Places of the live counters among the inputs."""
        s = self._pipeline.shapes
        if not s.rising:
            return []
        live = {s.rising_ids.name, s.rising_features.name, *(t.name for t in s.rising_of_fresh)}
        return [i for i, t in enumerate(contract.feature_transform_outputs(s)) if t.name in live]

    @cached_property
    def _of_query(self) -> dict[str, list[int]]:
        """Match features by the part of the query that they are of."""
        from search.features import RELATIVE, feature_names
        from search.hybrid import DENSE, LEXICAL, MATCHED
        from search.late import NAMES
        from search.lexical import PLACES

        assert self._pipeline.search is not None
        names = feature_names(self._pipeline.search.index)
        starts = {
            WORDS: ("bm25", "in title", "in text", "fused", f"rank {LEXICAL}", f"rank {MATCHED}", *PLACES[:-2]),
            MEANING: ("dense", "fused", f"rank {DENSE}", *NAMES, *RELATIVE),
            ATTRIBUTES: ("named ", "likely "),
        }
        return {part: [i for i, n in enumerate(names) if n.startswith(of_part)] for part, of_part in starts.items()}

    def _without(self, left: Left) -> Row:
        """The request with its history sent along, without parts of it."""
        if left == WHOLE:
            return self._row
        parts = [self.parts[i] for i in left]
        gone, kinds = {p.name for p in parts if p.kind == HISTORY}, {p.kind for p in parts}
        kept = [event for event in self._events if event[0] not in gone]
        return replace(
            self._row,
            history=[item for item, _, _ in kept],
            types=tuple("" if TYPES in kinds else kind for _, kind, _ in kept),
            times=tuple(0 if TIMES in kinds else moment for *_, moment in kept),
        )

    def _compute(self, lefts: Sequence[Left]) -> None:
        pipeline, rows = self._pipeline, [self._without(left) for left in lefts]
        known = self._known
        values = []
        for left in lefts if known.values else ():
            names = {self.parts[i].name for i in left if self.parts[i].kind == CONTEXT}
            values.append({name: value for name, value in known.values[0].items() if name not in names})
        stored = {i: known.stored[0] for i, left in enumerate(lefts) if left == WHOLE and 0 in known.stored}
        inputs, _ = pipeline.transform(rows, replace(known, stored=stored, values=values))
        for seen in (1, len(inputs) - 1) if pipeline.shapes.fresh else (1,):
            inputs[seen] = np.repeat(self._base[seen], len(lefts), 0)
        for i in self._live:
            stale = [place for place, left in enumerate(lefts) if any(self.parts[p].kind == COUNTERS for p in left)]
            inputs[i][stale] = 0
        retrieved = pipeline.retrieve(inputs)
        ids_BN, values_BCN = pipeline.rank(inputs[0], retrieved, pipeline.count_of([self._row]))
        ids_BN, values_BCN = self._searched(lefts, ids_BN, values_BCN)
        ids_BN, values_BCN = pipeline.respond.without_gone(ids_BN, values_BCN)
        shown_BN, scores_BN = ids_BN, values_BCN[:, 0]
        if self._rules is not None:
            shown_BN, scores_BN = self._ruled(ids_BN, values_BCN, lefts)
        answers = zip(shown_BN, scores_BN, ids_BN, values_BCN, (inputs[0] < FIRST_ID).all(1).tolist(), strict=True)
        self._answers.update((left, Answer(*of)) for left, of in zip(lefts, answers, strict=True))

    def _searched(
        self, lefts: Sequence[Left], ids_BN: np.ndarray, values_BCN: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and values by the query, where there is one: what it found once, ranked anew for each variant. A part
        that is left out matches each item no better than the least of those that were found."""
        found, ranking = self._found, self._pipeline.search_ranking
        if found is None or ranking is None:
            return ids_BN, values_BCN
        results: list[SearchResult] = []
        for left in lefts:
            features_NX = found[1]
            for part in (self.parts[i] for i in left if self.parts[i].kind == QUERY):
                features_NX = features_NX.copy()
                columns = self._of_query[part.name]
                features_NX[:, columns] = features_NX[:, columns].min(0, keepdims=True)
            results.append((found[0], features_NX, found[2]))
        return ranking.rows(results, ids_BN, values_BCN, [self._options] * len(lefts))

    def _ruled(
        self, ids_BN: np.ndarray, values_BCN: np.ndarray, lefts: Sequence[Left]
    ) -> tuple[np.ndarray, np.ndarray]:
        assert self._rules is not None
        b, status = len(lefts), self.status.encode()
        queried = [self._found is not None and bool(self._found[2])] * b
        top_k_B, status_B = np.full(b, self._row.top_k), np.array([status] * b, object)
        shown_BN, of_shown_BCN, told_B = self._rules(ids_BN, values_BCN, top_k_B, queried, status_B)
        if WHOLE in lefts:
            self.status = told_B[lefts.index(WHOLE)].decode()
        return shown_BN, of_shown_BCN[:, 0]
