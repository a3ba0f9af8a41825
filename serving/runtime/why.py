"""Why an item is recommended: what of the user's history it hangs on, by asking the same models again without it.

Nothing is approximated: an answer without events is what the served graphs answer to the shorter history. Events of one
item count together, as one reason; what the user has seen stays left out, so that a removed item does not come up
itself. Counterfactuals of recommenders: Tran, Ghazimatin and Saha Roy, "Counterfactual Explanations for Neural
Recommenders", SIGIR 2021.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from serving.runtime.pipeline import Pipeline
from serving.runtime.stages import Row
from vivace.contract import PADDING_ID

UNITS = 12  # newest distinct items of a history that are asked about
LARGEST = 3  # events of a set that is looked for
TRIED = 48  # sets of each size, the likeliest first
TOLD = 0.25  # of the largest drop: what weighs less is not told
AT_ONCE = 16  # histories that go through the graphs together
Left = frozenset[int]  # units that are left out


@dataclass(frozen=True)
class Reason:
    """One item of the history. ``drop``: what the recommended item's score loses without it (inf: it is no candidate
    any more); ``place``: from 1, where the item then stands, 0 for none."""

    item: str
    drop: float
    place: int


@dataclass(frozen=True)
class Because:
    """Of one recommended item: its place from 1 and score; ``reasons``, the largest drop first; ``smallest``: the least
    items of the history without which it would not be among the first TOP_K, () where no set up to LARGEST does that
    of those that were tried."""

    item: str
    place: int
    score: float
    reasons: tuple[Reason, ...]
    smallest: tuple[str, ...]


class Counterfactuals:
    """Answers to one row with parts of its history left out; each is computed once.

    Attributes: ``units``: distinct items of the history that are asked about, newest first."""

    def __init__(self, pipeline: Pipeline, row: Row, units: int = UNITS) -> None:
        """Raises ValueError for a user without a history, or a query."""
        if row.query:
            raise ValueError("query: an answer to a query is explained by what it was taken for; leave the query out")
        known = pipeline.transform.known([row])
        stored = known.stored.get(0)
        if row.history is None:
            items, types, times = stored or ([], [], [])
        else:
            empty = [""] * len(row.history), [0] * len(row.history)
            items, types, times = row.history, list(row.types or empty[0]), list(row.times or empty[1])
        if not items:
            raise ValueError("history: expected events to explain the answer by, got none: it is what is popular")
        read = pipeline.shapes.history
        self._events = list(itertools.zip_longest(items[-read:], types[-read:], times[-read:], fillvalue=""))
        self.units = list(dict.fromkeys(item for item, _, _ in reversed(self._events)))[:units]
        self._pipeline, self._row, self._known = pipeline, row, known
        self._typed, self._timed = any(types), any(times)
        self._answers: dict[Left, tuple[np.ndarray, np.ndarray]] = {}
        self._seen: np.ndarray | None = None
        self._ask([frozenset()])

    def _without(self, left: Left) -> Row:
        gone = {self.units[i] for i in left}
        kept = [event for event in self._events if event[0] not in gone]
        return replace(
            self._row,
            history=[item for item, _, _ in kept],
            types=tuple(str(kind) for _, kind, _ in kept) if self._typed else None,
            times=tuple(int(moment or 0) for *_, moment in kept) if self._timed else None,
        )

    def _ask(self, lefts: Sequence[Left]) -> None:
        new = [left for left in dict.fromkeys(lefts) if left not in self._answers]
        for start in range(0, len(new), AT_ONCE):
            part = new[start : start + AT_ONCE]
            rows = [self._without(left) for left in part]
            values = list(self._known.values) * len(part)
            known = replace(self._known, stored={}, values=values)
            inputs, _ = self._pipeline.transform(rows, known)
            if self._seen is None:
                self._seen = inputs[1][:1]
            inputs[1] = np.repeat(self._seen, len(part), 0)
            retrieved = self._pipeline.retrieve(inputs)
            ids_BN, values_BCN = self._pipeline.rank(
                inputs[0], retrieved, self._pipeline.count_to_rank(self._row.top_k)
            )
            for left, ids, scores in zip(part, ids_BN, values_BCN[:, 0], strict=True):
                self._answers[left] = (ids, scores)

    def at(self, id_: int, left: Left = frozenset()) -> tuple[int, float]:
        """(place from 1, score) of an item; (0, -inf) where it is no candidate."""
        self._ask([left])
        ids, scores = self._answers[left]
        places = np.flatnonzero(ids == id_)
        return (int(places[0]) + 1, float(scores[places[0]])) if len(places) else (0, float("-inf"))

    def shown(self) -> np.ndarray:
        """Ids of the answer, best first."""
        ids: np.ndarray = self._answers[frozenset()][0][: self._row.top_k]
        return ids[ids != PADDING_ID]

    def drops(self, id_: int) -> np.ndarray:
        """float [units]: what the item's score loses without each, inf where it is no candidate then."""
        self._ask([frozenset([i]) for i in range(len(self.units))])
        _, score = self.at(id_)
        return np.array([score - self.at(id_, frozenset([i]))[1] for i in range(len(self.units))])

    def is_gone(self, id_: int, left: Left) -> bool:
        """Whether the item is not among the first TOP_K then."""
        place, _ = self.at(id_, left)
        return not 0 < place <= self._row.top_k

    def smallest(self, id_: int, largest: int = LARGEST, tried: int = TRIED) -> Left | None:
        """The least units without which the item is not shown, of several the one whose drops add up to most; None
        where none of those that were tried is such. Of each size ``tried`` sets are, by their drops."""
        drops = np.minimum(self.drops(id_), 1e6)
        for size in range(1, min(largest, len(self.units)) + 1):
            sets = self._likeliest(drops, size, tried)
            self._ask(sets)
            if gone := next((left for left in sets if self.is_gone(id_, left)), None):
                return gone
        return None

    @staticmethod
    def _likeliest(drops: np.ndarray, size: int, tried: int) -> list[Left]:
        sets: Iterable[tuple[int, ...]] = itertools.combinations(np.argsort(-drops, kind="stable").tolist(), size)
        by_drop = sorted(sets, key=lambda units: -float(drops[list(units)].sum()))
        return [frozenset(units) for units in by_drop[:tried]]


def because(pipeline: Pipeline, row: Row, items: Sequence[int] | None = None) -> list[Because]:
    """Why each of the first TOP_K items of a row's answer is there; ``items``: their places alone, from 0. Raises
    ValueError as ``Counterfactuals`` does."""
    asked = Counterfactuals(pipeline, row)
    name = lambda id_: pipeline.respond.names_of(np.array([id_]))[0].decode()  # noqa: E731
    found = []
    for place, id_ in enumerate(asked.shown().tolist()):
        if items is not None and place not in items:
            continue
        drops = asked.drops(id_)
        order = np.argsort(-np.minimum(drops, 1e6), kind="stable")
        reasons = tuple(
            Reason(asked.units[i], float(drops[i]), asked.at(id_, frozenset([i]))[0])
            for i in order.tolist()
            if drops[i] > 0
        )
        left = asked.smallest(id_)
        smallest = tuple(asked.units[i] for i in sorted(left)) if left else ()
        found.append(Because(name(id_), place + 1, asked.at(id_)[1], reasons, smallest))
    return found


# -- in words ----------------------------------------------------------------------------------------------
ENGLISH, CHINESE = LANGUAGES = ("en", "zh")
_WORDS = {
    ENGLISH: ("because of {}", "would not be shown without {}", "no single part of the history decides", " and ", ", "),
    CHINESE: ("因为您看过{}", "若没有{}则不会推荐", "并非由某一条历史决定", "和", "、"),
}


def sentence(of: Because, titles: dict[str, str], language: str = ENGLISH, most: int = 2) -> str:
    """What was computed, in words, and nothing else: the largest reason with up to ``most`` - 1 others that weigh at
    least TOLD of it, and the smallest set."""
    reason, without, nothing, last, comma = _WORDS[language]

    def listed(items: Sequence[str]) -> str:
        names = [titles.get(item) or item for item in items]
        return last.join(filter(None, [comma.join(names[:-1]), names[-1]]))

    if not of.reasons:
        return nothing
    told = [r.item for r in of.reasons[:most] if r.drop >= TOLD * of.reasons[0].drop or r is of.reasons[0]]
    text = reason.format(listed(told))
    return f"{text}; {without.format(listed(of.smallest))}" if of.smallest else text
