"""What a query means: normalised text, words with typing errors mended, synonyms, and which attributes it asks for.

Everything is learned from the catalogue and, where there are any, from queries that led to items; nothing is hidden:
``Understood.to_json`` is what a client is shown. An error is mended by words of the catalogue within one edit (two for
words of eight letters and more), the most frequent of the nearest (SymSpell, W. Garbe), and both spellings are asked
for: a rare brand that looks like an error still finds itself.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from symspellpy import SymSpell, Verbosity

from search.text import STOP, normalise, term, words

FILE = "understanding.json"
LONGEST_WORD = 40
MEND_FROM, TWO_FROM = 4, 8  # letters of a word that may have one error, two
MENDED, SYNONYM = 0.9, 0.5  # how much a word counts that the query does not have
SYNONYMS_MOST = 3
_LETTERS = re.compile(r"[^\W\d_]+\Z")


@dataclass(frozen=True)
class Intent:
    """A value of an attribute that the query asks for: its probability, and whether its name stands in the query."""

    attribute: str
    value: str
    probability: float
    named: bool


@dataclass(frozen=True)
class Understood:
    """``terms`` and ``weights``: what the lexical search is asked. ``corrected``: word to its mended form."""

    text: str
    words: tuple[str, ...]
    terms: tuple[str, ...]
    weights: tuple[float, ...]
    corrected: dict[str, str] = field(default_factory=dict)
    synonyms: dict[str, list[str]] = field(default_factory=dict)
    intents: tuple[Intent, ...] = ()

    @property
    def mended(self) -> str:
        """The text with its errors mended: what the query encoder reads."""
        return " ".join(self.corrected.get(w, w) for w in self.words)

    def with_intents(self, intents: Sequence[Intent]) -> Understood:
        """With those that are likely beside those that are named."""
        named = {(i.attribute, i.value) for i in self.intents}
        rest = tuple(i for i in intents if (i.attribute, i.value) not in named)
        return replace(self, intents=(*self.intents, *rest))

    def to_json(self) -> str:
        """For a client: compact, in a fixed order."""
        return json.dumps({
            "text": self.text, "corrected": self.corrected, "synonyms": self.synonyms,
            "intents": [{"attribute": i.attribute, "value": i.value, "probability": round(i.probability, 3),
                         "named": i.named} for i in self.intents],
        }, ensure_ascii=False, separators=(",", ":"))  # fmt: skip


def spans(attributes: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, list[str], slice]]:
    """Of each attribute: its values (the logit before the first is "none of them") and where its logits are."""
    start = 0
    for name, values in attributes.items():
        yield name, list(values), slice(start, start + 1 + len(values))
        start += 1 + len(values)


def likely(attributes: Mapping[str, Sequence[str]], logits_K: np.ndarray, least: float = 0.3) -> list[Intent]:
    """Attribute values of probability at least ``least``, per attribute by softmax, the likeliest first."""
    out = []
    for name, values, span in spans(attributes):
        p = np.exp(logits_K[span] - logits_K[span].max())
        p /= p.sum()
        out += [Intent(name, values[i], float(p[i + 1]), False) for i in np.flatnonzero(p[1:] >= least)]
    return sorted(out, key=lambda i: -i.probability)


def read_synonyms(path: Path) -> dict[str, list[str]]:
    """A file of lines "sofa, couch, settee": each word of a line for each other. "tv => television": one way."""
    out: dict[str, list[str]] = defaultdict(list)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        left, arrow, right = line.partition("=>")
        sides = [[normalise(w) for w in side.split(",") if w.strip()] for side in (left, right)]
        if (arrow and not all(sides)) or (not arrow and len(sides[0]) < 2):
            raise ValueError(f"{path}:{number}: expected 'a, b' or 'a => b', got {line!r}")
        for word in sides[0]:
            out[word] += [w for w in (sides[1] if arrow else sides[0]) if w != word]
    return dict(out)


def coclick_synonyms(
    queries: Sequence[str], clicked: Sequence[Mapping[str, float]], least: int = 3, similarity: float = 0.5
) -> dict[str, list[str]]:
    """Words of queries that lead to the same items: cosine of their items' weights of at least ``similarity``, in at
    least ``least`` queries each, and never in the same query (those add to each other)."""
    vectors: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    together, counts = set[tuple[str, str]](), Counter[str]()
    for query, items in zip(queries, clicked, strict=True):
        distinct = sorted({w for w in words(normalise(query)) if w not in STOP})
        counts.update(distinct)
        together |= {(a, b) for a in distinct for b in distinct}
        for w in distinct:
            for item, gain in items.items():
                vectors[w][item] += gain
    known = sorted(w for w in counts if counts[w] >= least)
    norm = {w: math.sqrt(sum(v * v for v in vectors[w].values())) for w in known}
    of_item: dict[str, list[str]] = defaultdict(list)
    for w in known:
        for item in vectors[w]:
            of_item[item].append(w)
    dots: dict[tuple[str, str], float] = defaultdict(float)
    for item, its_words in of_item.items():
        for i, a in enumerate(its_words):
            for b in its_words[i + 1 :]:
                dots[a, b] += vectors[a][item] * vectors[b][item]
    out: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for (a, b), dot in dots.items():
        close = dot / max(norm[a] * norm[b], 1e-12)
        if close >= similarity and (a, b) not in together:
            out[a].append((close, b))
            out[b].append((close, a))
    return {w: [b for _, b in sorted(near, reverse=True)[:SYNONYMS_MOST]] for w, near in sorted(out.items())}


class QueryUnderstanding:
    """Understands queries by one catalogue.

    Args:
        frequency: of each word of the catalogue's text.
        synonyms: word to others that mean the same.
        attributes: of each attribute, the values that exist.
    """

    def __init__(
        self, frequency: Mapping[str, int], synonyms: Mapping[str, Sequence[str]],
        attributes: Mapping[str, Sequence[str]],
    ) -> None:  # fmt: skip
        self.frequency, self.synonyms = dict(frequency), {w: list(s) for w, s in synonyms.items()}
        self.attributes = {a: list(v) for a, v in attributes.items()}
        self._spelling = SymSpell(max_dictionary_edit_distance=2, prefix_length=7)
        for word, count in self.frequency.items():
            if MEND_FROM - 1 <= len(word) <= LONGEST_WORD and _LETTERS.match(word):
                self._spelling.create_dictionary_entry(word, count)
        self._stems = {t for w in self.frequency for t in term(w)}
        self._named: dict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
        self._longest = 0
        for attribute, values in self.attributes.items():
            for value in values:
                self._name(attribute, value)

    def _name(self, attribute: str, value: str) -> None:
        key = tuple(words(normalise(value)))
        if key:
            self._named[key].append((attribute, value))
            self._longest = max(self._longest, len(key))

    def learn_more(self, texts: Sequence[str], attributes: Mapping[str, Sequence[str]]) -> None:
        """Words and values of items that came later: they are no errors, and are known when they are named."""
        for word in {w for text in texts for w in words(normalise(text))} - self.frequency.keys():
            self.frequency[word] = 1
            self._stems.update(term(word))
            if MEND_FROM - 1 <= len(word) <= LONGEST_WORD and _LETTERS.match(word):
                self._spelling.create_dictionary_entry(word, 1)
        for attribute, values in attributes.items():
            for value in sorted({v for v in values if v} - set(self.attributes[attribute])):
                self.attributes[attribute].append(value)
                self._name(attribute, value)

    @classmethod
    def learn(
        cls, texts: Sequence[Sequence[str]], attributes: Mapping[str, Sequence[str]],
        synonyms: Mapping[str, Sequence[str]] | None = None,
    ) -> QueryUnderstanding:  # fmt: skip
        """From the catalogue: ``texts`` by field, ``attributes``: of each, its values for all items."""
        frequency = Counter(w for rows in texts for row in rows for w in words(normalise(row)))
        return cls(frequency, synonyms or {}, {a: sorted({v for v in values if v}) for a, values in attributes.items()})

    def _mend(self, word: str) -> str:
        if not MEND_FROM <= len(word) <= LONGEST_WORD or not _LETTERS.match(word) or word in self.frequency:
            return word
        if all(t in self._stems for t in term(word)):
            return word
        distance = 2 if len(word) >= TWO_FROM else 1
        suggestions = self._spelling.lookup(word, Verbosity.TOP, max_edit_distance=distance)
        return str(suggestions[0].term) if suggestions else word

    def __call__(self, query: str) -> Understood:
        text = normalise(query)
        query_words = words(text)
        corrected = {w: m for w in query_words if (m := self._mend(w)) != w}
        mended = [corrected.get(w, w) for w in query_words]
        synonyms = {w: s for w in mended if (s := self.synonyms.get(w))}
        weight: dict[str, float] = {}

        def ask(word: str, much: float) -> None:
            for t in term(word):
                weight[t] = max(weight.get(t, 0.0), much)

        for w in query_words:
            ask(w, 1.0)
            if w in corrected:
                ask(corrected[w], MENDED)
        for others in synonyms.values():
            for other in others:
                for w in words(other):
                    ask(w, SYNONYM)
        named = tuple(self.named(mended))
        return Understood(text, tuple(query_words), tuple(weight), tuple(weight.values()), corrected, synonyms, named)

    def named(self, mended: Sequence[str]) -> list[Intent]:
        """Attribute values whose whole name stands in the words, the longest names first; each word once."""
        out: list[Intent] = []
        i = 0
        while i < len(mended):
            for n in range(min(self._longest, len(mended) - i), 0, -1):
                hits = self._named.get(tuple(mended[i : i + n]))
                if hits:
                    share = 1 / len(hits)
                    out += [Intent(a, v, share, True) for a, v in hits]
                    i += n - 1
                    break
            i += 1
        return out

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {
            "frequency": self.frequency, "synonyms": self.synonyms, "attributes": self.attributes,
        }  # fmt: skip
        (folder / FILE).write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> QueryUnderstanding:
        return cls(**json.loads((folder / FILE).read_text(encoding="utf-8")))


def with_typos(query: str, share: float, seed: int) -> str:
    """One edit (a letter lost, doubled, replaced or two exchanged) in ``share`` of the words of three letters and more,
    by chance: for tests of tolerance."""
    rng = np.random.default_rng(seed)
    out = query.split(" ")
    for i, word in enumerate(out):
        if len(word) < 3 or not word.isalpha() or rng.random() >= share:
            continue
        w, at = out[i], int(rng.integers(0, len(out[i])))
        letter = "abcdefghijklmnopqrstuvwxyz"[int(rng.integers(26))]
        kind = int(rng.integers(4))
        if kind == 0:
            out[i] = w[:at] + w[at + 1 :]
        elif kind == 1:
            out[i] = w[:at] + w[at] + w[at:]
        elif kind == 2:
            out[i] = w[:at] + letter + w[at + 1 :]
        else:
            at = min(at, len(w) - 2)
            out[i] = w[:at] + w[at + 1] + w[at] + w[at + 2 :]
    return " ".join(out)
