"""Why an item is recommended: what of the request it hangs on, by asking the same models again without it.

Nothing is approximated, see ``variants``. Events of one item count together, as one reason. Counterfactuals of
recommenders: Tran, Ghazimatin and Saha Roy, "Counterfactual Explanations for Neural Recommenders", SIGIR 2021.
Axis legend: C values of a candidate, U parts of the history, S sets of K of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.runtime.item_graph import Path
from serving.runtime.pipeline import Pipeline
from serving.runtime.ruled import Rules
from serving.runtime.stages import Row
from serving.runtime.variants import AT_ONCE, UNITS, WHOLE, Left, Part, Variants
from vivace.contract import PADDING_ID, STATUS_DEGRADED
from vivace.explain_contract import (
    ATTRIBUTES,
    CHINESE,
    CONTEXT,
    COUNTERS,
    ENGLISH,
    HISTORY,
    MEANING,
    QUERY,
    TIMES,
    TYPES,
    WORDS,
)

if TYPE_CHECKING:
    from search.online import SearchOptions

LARGEST = 3  # events of a set that is looked for
TRIED = 48  # sets of each size and item, the likeliest first
SERVED_TRIED, SERVED_MOST = 2, 4  # the same of the served call, and sets of a request: it is to cost a few plain ones
TOLD = 0.25  # of the largest effect: what weighs less is not told
FAR = 1e6  # what an item's score is taken to lose that is no candidate any more
UNKNOWN = "unknown"
POPULAR = f"{STATUS_DEGRADED}popular items"


@dataclass(frozen=True)
class Reason:
    """One part of the request. ``drop``: what the recommended item's score loses without it (inf: it is no
    candidate any more, or nothing is left to go by; below 0: it gains); ``place``: from 1, where the item then
    stands, 0 for none; ``heads``: what each head's probability loses, () where it is no candidate."""

    part: Part
    drop: float
    place: int
    heads: tuple[float, ...] = ()

    @property
    def item(self) -> str:
        return self.part.name


@dataclass(frozen=True)
class Because:
    """Of one recommended item: its place from 1 and score; ``reasons``, the largest effect first; ``smallest``: the
    least items of the history without which it would not be among the first TOP_K, () where no set up to LARGEST does
    that of those that were tried. ``ruled``: no model proposed it, a business rule did. ``popular``: the answer is what
    is popular, as STATUS says."""

    item: str
    place: int
    score: float
    reasons: tuple[Reason, ...]
    smallest: tuple[str, ...]
    ruled: bool = False
    popular: bool = False


class Counterfactuals(Variants):
    """The variants of a request as they bear on the items of its answer."""

    @property
    def units(self) -> list[str]:
        """Distinct items of the history that are asked about, newest first."""
        return [part.name for part in self.parts[: self.of_history]]

    def place(self, id_: int, left: Left = WHOLE) -> int:
        """From 1, as the item would be shown; 0 where it would not."""
        return self[left].places.get(id_, 0)

    def values(self, id_: int, left: Left = WHOLE) -> np.ndarray | None:
        """float32 [C] of a candidate: its score, then a probability a head; None for none."""
        answer = self[left]
        at = answer.at.get(id_, -1)
        return answer.values[:, at] if at >= 0 else None

    def score(self, id_: int, left: Left = WHOLE) -> float:
        """-inf where it is no candidate."""
        values = self.values(id_, left)
        return -math.inf if values is None else float(values[0])

    def at(self, id_: int, left: Left = WHOLE) -> tuple[int, float]:
        """(place, score)."""
        return self.place(id_, left), self.score(id_, left)

    def shown(self) -> np.ndarray:
        """Ids of the answer, best first."""
        ids: np.ndarray = self[WHOLE].shown[: self._row.top_k]
        return ids[ids != PADDING_ID]

    def drops(self, id_: int) -> np.ndarray:
        """float [parts]: what the item's score loses without each; inf where it is no candidate then, or where nothing
        is left to go by and what is popular is answered, whose scores are of another kind."""
        lefts = [frozenset([i]) for i in range(len(self.parts))]
        self.ask(lefts)
        score, popular = self.score(id_), self[WHOLE].popular
        return np.array(
            [np.inf if self[left].popular and not popular else score - self.score(id_, left) for left in lefts]
        )

    def is_gone(self, id_: int, left: Left) -> bool:
        """Whether the item is not among the first TOP_K then."""
        return not 0 < self.place(id_, left) <= self._row.top_k

    def smallest(self, id_: int, largest: int = LARGEST, tried: int = TRIED) -> Left | None:
        """See ``smallest_of``."""
        return self.smallest_of([id_], largest, tried)[id_]

    def smallest_of(
        self, ids: Sequence[int], largest: int = LARGEST, tried: int = TRIED, most: int = 1 << 20
    ) -> dict[int, Left | None]:
        """Of each item the least parts of the history without which it is not shown; None where none of those that were
        tried is such. All single parts are tried, then of each size and item ``tried`` sets, those first whose parts
        lower the item's score most one by one; of all items and sizes together ``most``."""
        units = range(self.of_history)
        singles = [frozenset([i]) for i in units]
        self.ask([WHOLE, *singles])
        out: dict[int, Left | None] = {}
        for id_ in ids:
            gone = [left for left in singles if self.is_gone(id_, left)]
            out[id_] = min(gone, key=lambda left: self.score(id_, left), default=None)
        room = most
        for size in range(2, min(largest, self.of_history) + 1):
            likeliest = self._likeliest(out, size, tried)
            turns = [(id_, left) for turn in itertools.zip_longest(*likeliest.values())
                     for id_, left in zip(likeliest, turn, strict=True) if left is not None]  # fmt: skip
            while turns and room > 0:
                batch = list(dict.fromkeys(left for _, left in turns))[: min(AT_ONCE, room)]
                room -= sum(left not in self._answers for left in batch)
                self.ask(batch)
                for id_, left in turns:
                    if out[id_] is None and left in self._answers and self.is_gone(id_, left):
                        out[id_] = left
                turns = [(id_, left) for id_, left in turns if out[id_] is None and left not in self._answers]
        return out

    def _likeliest(self, found: dict[int, Left | None], size: int, tried: int) -> dict[int, list[Left]]:
        """Sets to try of the items without one."""
        left_over = [id_ for id_, left in found.items() if left is None and id_ in self[WHOLE].at]
        if not left_over or not tried:
            return {}
        sets_SK = np.array(list(itertools.combinations(range(self.of_history), size)))
        out = {}
        for id_ in left_over:
            drops_U = np.minimum(self.drops(id_)[: self.of_history], FAR)
            order = np.argsort(-drops_U[sets_SK].sum(1), kind="stable")[:tried]
            out[id_] = [frozenset(units) for units in sets_SK[order].tolist()]
        return out


def _reasons(asked: Counterfactuals, id_: int) -> Iterable[Reason]:
    values = asked.values(id_)
    if values is None:
        return
    drops = asked.drops(id_)
    for i in np.argsort(-np.minimum(drops, FAR), kind="stable").tolist():
        part, left = asked.parts[i], frozenset([i])
        if drops[i] > 0 or (part.kind != HISTORY and drops[i] < 0):
            then = asked.values(id_, left) if np.isfinite(drops[i]) else None
            heads = () if then is None else tuple((values[1:] - then[1:]).tolist())
            yield Reason(part, float(drops[i]), asked.place(id_, left), heads)


def because(
    pipeline: Pipeline, row: Row, items: Sequence[int] | None = None, options: SearchOptions | None = None,
    rules: Rules | None = None, units: int = UNITS, tried: int = TRIED, most: int = 1 << 20,
) -> tuple[list[Because], str]:  # fmt: skip
    """(why each of the first TOP_K items of a row's answer is there, STATUS). ``items``: their places alone, from 0;
    ``tried`` and ``most``: see ``Counterfactuals.smallest_of``."""
    with pipeline.transform.still():
        asked = Counterfactuals(pipeline, row, options, rules, units)
        asked.ask([WHOLE, *(frozenset([i]) for i in range(len(asked.parts)))])
        shown = asked.shown()
        places = range(len(shown)) if items is None else [place for place in items if place < len(shown)]
        smallest = asked.smallest_of([int(shown[place]) for place in places], tried=tried, most=most)
        names, popular = pipeline.respond.names_of(shown), asked.status.startswith(POPULAR)
        found = []
        for place in places:
            id_ = int(shown[place])
            left = smallest[id_]
            without = tuple(asked.units[i] for i in sorted(left)) if left else ()
            reasons, ruled = tuple(_reasons(asked, id_)), asked.values(id_) is None
            score = float(asked[WHOLE].scores[place])
            of = Because(names[place].decode(), place + 1, score, reasons, without, ruled, popular)
            found.append(of)
    return found, asked.status


# -- in words ----------------------------------------------------------------------------------------------
_WORDS = {
    ENGLISH: {
        "because": "because of {}",
        "itself": "{} itself", "other": "{}",
        "without": "would not be shown without {}",
        "nothing": "no single part of the request decides",
        "ruled": "shown by a business rule",
        "popular": "it is popular",
        "and": " and ", "comma": ", ", "then": "; ",
        CONTEXT: "{} {}", UNKNOWN: "a {} that training did not know",
        TYPES: "what kinds of events these were", TIMES: "when these events were",
        COUNTERS: "what is clicked most just now", WORDS: "the words of the query",
        MEANING: "the meaning of the query", ATTRIBUTES: "what the query names",
    },
    CHINESE: {
        "because": "因为{}",
        "itself": "{}", "other": "{}",
        "without": "若没有{}则不会推荐",
        "nothing": "并非由请求中的某一项决定",
        "ruled": "由业务规则展示",
        "popular": "这是热门商品",
        "and": "和", "comma": "、", "then": "; ",
        HISTORY: "您看过{}",
        CONTEXT: "{}为{}", UNKNOWN: "训练中没有的{}",
        TYPES: "这些行为的类型", TIMES: "这些行为的时间",
        COUNTERS: "当前的热门点击", WORDS: "搜索词本身",
        MEANING: "搜索的含义", ATTRIBUTES: "搜索中提到的属性",
    },
}  # fmt: skip


def _listed(names: Sequence[str], words: dict[str, str]) -> str:
    return words["and"].join(filter(None, [words["comma"].join(names[:-1]), names[-1]]))


def sentence(of: Because, titles: dict[str, str], language: str = ENGLISH, most: int = 2) -> str:
    """What was computed, in words, and nothing else: the largest reason with up to ``most`` - 1 others that weigh at
    least TOLD of it, and the smallest set. An item may be its own reason, where what was seen may be answered."""
    words = _WORDS[language]
    if of.ruled:
        return words["ruled"]
    first = [reason for reason in of.reasons[:most] if reason.drop > 0]
    told = [reason.part for reason in first if reason.drop >= TOLD * first[0].drop]
    if not told:
        return words["popular"] if of.popular else words["nothing"]
    of_history = [part.name for part in told if part.kind == HISTORY]
    seen = [words["itself" if name == of.item else "other"].format(titles.get(name) or name) for name in of_history]
    parts = [words.get(HISTORY, "{}").format(_listed(seen, words))] if seen else []
    parts += [
        words[part.name if part.kind == QUERY else UNKNOWN if part.unknown else part.kind].format(part.name, part.value)
        for part in told
        if part.kind != HISTORY
    ]
    text = words["because"].format(_listed(parts, words))
    if of.smallest:
        without = _listed([titles.get(item) or item for item in of.smallest], words)
        text += words["then"] + words["without"].format(without)
    return text


def record(
    of: Because, heads: Sequence[str], titles: dict[str, str], language: str = ENGLISH, path: Path | None = None
) -> dict[str, Any]:
    """An item's EXPLANATION, for JSON: numbers that are not finite are null, a place of 0 too. ``path``: what joins it
    to a reason in the catalogue, if anything does."""
    reasons = []
    for reason in of.reasons:
        part, one = reason.part, dict[str, Any](kind=reason.part.kind)
        if part.kind == HISTORY:
            one |= {"events": [part.name], "count": part.events}
        elif part.name:
            one |= {"name": part.name, **({"value": part.value} if part.value else {})}
            one |= {UNKNOWN: True} if part.unknown else {}
        one["effect"] = round(reason.drop, 6) if math.isfinite(reason.drop) else None
        one["heads"] = {head: round(drop, 6) for head, drop in zip(heads, reason.heads, strict=False)}
        reasons.append(one | {"rank": reason.place or None})
    return {
        "reasons": reasons, "smallest": list(of.smallest), "sentence": sentence(of, titles, language),
        **({"rule": True} if of.ruled else {}),
        **({"path": path.record(titles, language)} if path else {}),
    }  # fmt: skip


def titled(found: Sequence[Because]) -> list[str]:
    """Items that sentences name: of the history, and those that are joined to them."""
    items = {of.item for of in found}
    items |= {reason.part.name for of in found for reason in of.reasons if reason.part.kind == HISTORY}
    return sorted(items | {item for of in found for item in of.smallest})
