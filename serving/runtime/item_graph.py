"""What the catalogue says that two items have in common: a path from an item of the history to the recommended one.

The graph is that of any catalogue's attributes (item - relation - value) and of triples of a file (item - relation -
item or value). A path is read off it, nothing is estimated: it says what is related, not why a model answered.
No torch, no NVTabular. After Xian et al., "Reinforcement Knowledge Graph Reasoning for Explainable Recommendation",
SIGIR 2019, whose paths these are, of up to two steps.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vivace.explain_contract import CHINESE, ENGLISH

LARGEST_SHARE = 0.05  # of the items with a value: what is more common than that says nothing
FEW = 5  # items: what fewer share may be one person's whim, such as a tag given once
Triple = tuple[str, str, str]


@dataclass(frozen=True)
class Path:
    """``item`` of the history and ``recommended`` share ``value`` of ``relation``, as ``others`` further items do. A
    triple of the file that joins them directly has the relation and no ``value``."""

    item: str
    relation: str
    recommended: str
    value: str = ""
    others: int = 0

    @property
    def triples(self) -> tuple[Triple, ...]:
        """What must be in the raw data if the path is true; of a direct one either direction."""
        if not self.value:
            return ((self.item, self.relation, self.recommended),)
        return (self.item, self.relation, self.value), (self.recommended, self.relation, self.value)

    def sentence(self, titles: Mapping[str, str], language: str = ENGLISH) -> str:
        """In words; an item without a title is named by its id."""
        names = {
            "item": titles.get(self.item) or self.item,
            "recommended": titles.get(self.recommended) or self.recommended,
        }
        return WORDS[language][bool(self.value)].format(**names, relation=self.relation, value=self.value)

    def record(self, titles: Mapping[str, str], language: str = ENGLISH) -> dict[str, Any]:
        """For JSON; a direct one has no ``value``."""
        shared = {"value": self.value, "others": self.others} if self.value else {}
        return {"item": self.item, "relation": self.relation, **shared, "sentence": self.sentence(titles, language)}


WORDS = {
    ENGLISH: ("{recommended} is linked to {item} ({relation})", "{recommended} and {item} share {relation}: {value}"),
    CHINESE: ("{recommended}与{item}相关（{relation}）", "{recommended}与{item}的{relation}相同：{value}"),
}


class ItemGraph:
    """Relations of items, in both directions."""

    def __init__(self, triples: Iterable[Triple]) -> None:
        """Raises ValueError for an empty name."""
        self._values: dict[str, set[tuple[str, str]]] = defaultdict(set)
        for head, relation, tail in triples:
            if not (head and relation and tail):
                raise ValueError(f"ItemGraph: expected three names, got {(head, relation, tail)!r}")
            self._values[head].add((relation, tail))
        self._items = Counter(pair for pairs in self._values.values() for pair in pairs)  # how many have a value

    def __len__(self) -> int:
        """Items with a relation."""
        return len(self._values)

    def put(self, item: str, triples: Iterable[Triple]) -> None:
        """Takes ``triples``, whose head is ``item``, in the place of those it had; none: it is out of the graph."""
        self._items.subtract(self._values.pop(item, ()))
        if pairs := {(relation, tail) for _, relation, tail in triples}:
            self._values[item] = pairs
            self._items.update(pairs)

    def path(self, history: Sequence[str], recommended: str) -> Path | None:
        """The most telling path from ``history``, oldest first, to an item: a direct one before a shared value, of
        shared ones that of the fewest items, but less than FEW after all others, of equals to the newest item. None
        where there is none, or all it shares is common to more than LARGEST_SHARE of the items (and to more than
        two)."""
        best: tuple[tuple[bool, int, int], Path] | None = None
        most = max(2, int(LARGEST_SHARE * len(self)))
        of_recommended = self._values.get(recommended, set())
        for age, item in enumerate(dict.fromkeys(reversed(history))):
            if item == recommended:
                continue
            of_item = self._values.get(item, set())
            candidates = [(0, r, "") for r, tail in of_item if tail == recommended]
            candidates += [(0, r, "") for r, tail in of_recommended if tail == item]
            shared = ((self._items[pair], *pair) for pair in of_item & of_recommended)
            candidates += [pair for pair in shared if pair[0] <= most]
            for count, relation, value in sorted(candidates):
                order = 0 < count < FEW, count, age
                if best is None or order < best[0]:
                    best = order, Path(item, relation, recommended, value, max(count - 2, 0))
        return best[1] if best else None


def of_catalogue(items: Sequence[str], columns: Mapping[str, Sequence[object]]) -> Iterable[Triple]:
    """Triples of a catalogue: ``columns`` by name, a value or a list of values an item; what is missing is left out."""
    for relation, values in columns.items():
        for item, value in zip(items, values, strict=True):
            for one in value if isinstance(value, list | tuple | np.ndarray) else [value]:
                if one is not None and one == one and str(one):
                    yield item, relation, str(one)


def of_lines(lines: Iterable[str]) -> Iterable[Triple]:
    """Triples of a file of "head relation tail" lines, such as Retailrocket's ``kg.txt``. Raises ValueError with the
    line's number for another count of fields."""
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if len(fields) != 3:
            raise ValueError(f"graph, line {number}: expected head, relation and tail, got {line.strip()!r}")
        yield fields[0], fields[1], fields[2]
