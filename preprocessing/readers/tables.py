"""The general reader: CSV or Parquet tables of interactions, items and searches, described by a TOML mapping
(``readers.mapping``; docs/preprocessing.md shows one). CSV and Parquet of one table give the same rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from preprocessing.readers.base import Chunk
from preprocessing.readers.mapping import INTERACTIONS, ITEMS, NEEDED, SEARCHES, USERS, Section, read_mapping, texts
from preprocessing.readers.parts import Part, parts
from vivace.contract import CLICKED, EVENT, ITEM, POSITION, QUERY_TEXT, SEARCH, TIME, TITLE, USER, WEIGHT
from vivace.manifest import fingerprint_files

NO_WEIGHT, NO_TYPE = "event type {!r} without a weight: its labels are 0", "no event type, so no weight: labels are 0"
NAMED_TYPES = 20  # event types without a weight that are counted one by one
OTHER_TYPES = "other event types without a weight: their labels are 0"


class Tables:
    """A data set described by a mapping file."""

    def __init__(self, mapping: Path) -> None:
        read = read_mapping(mapping)
        self.mapping, self.schema, self.sections = read.path, read.schema, read.sections

    def fingerprint(self) -> str:
        return fingerprint_files([self.mapping, *(f for s in self.sections.values() for f in s.files())])

    def catalogue_ms(self) -> int:
        """When the files of the catalogue were written, the newest of them, Unix ms; 0 where there is none."""
        section = self.sections.get(ITEMS)
        times = [file.stat().st_mtime for file in section.files()] if section is not None else []
        return int(1000 * max(times, default=0.0))

    def _parts(self, section: Section, columns: list[str]) -> Iterator[tuple[Part, int]]:
        """Parts of all files of a section, each with the sum of the lines of the files before its own."""
        base, names = 0, list(dict.fromkeys(columns))
        for file in section.files():
            last = 0
            for part in parts(section, file, names):
                last = max(last, part.last_line())
                yield part, base
            base += last

    def items(self) -> list[Chunk] | None:
        """Raises ValueError for a catalogue without a row."""
        section = self.sections.get(ITEMS)
        if section is None:
            return None
        return self._described(section, ITEM, "item", "a catalogue needs items")

    def _described(self, section: Section, name: str, key: str, needs: str) -> list[Chunk]:
        """Rows of the id ``name``, of the column that ``key`` gives, a title where the section has any, and attributes.
        Raises ValueError for none."""
        titles, keys = texts(section.keys.get("title")), section.keys
        categorical, continuous = section.columns("categorical"), section.columns("continuous")
        lists, separators, chunks = section.columns("lists"), section.separators(), []
        attributes = [*categorical.values(), *lists.values(), *continuous.values()]
        for part, base in self._parts(section, [keys[key], *titles, *attributes]):
            rows = pd.DataFrame({name: part.ids(keys[key])})
            if section.name == ITEMS:
                rows[TITLE] = _joined([part.text(t) for t in titles], rows.index)
            for attribute, column in categorical.items():
                rows[attribute] = part.category(column)
            for attribute, column in lists.items():
                rows[attribute] = part.lists(column, separators[attribute])
            for attribute, column in continuous.items():
                rows[attribute] = part.numbers(column)
            chunks.append(part.chunk(rows, base))
        if not sum(chunk.read for chunk in chunks):
            names = ", ".join(str(f) for f in section.files())
            raise ValueError(f"{section.where} no row in {names}: {needs}; or leave [{section.name}] out")
        return chunks

    def users(self) -> list[Chunk] | None:
        section = self.sections.get(USERS)
        return None if section is None else self._described(section, USER, "user", "a table of users needs users")

    def interactions(self) -> Iterator[Chunk]:
        section = self.sections[INTERACTIONS]
        keys, context, amounts = section.keys, section.columns("context"), section.columns("context_continuous")
        optional = [keys[k] for k in ("event_type", "weight") if k in keys]
        timed = [keys["time"]] if "time" in keys else []
        columns = [keys["user"], keys["item"], *timed, *optional, *context.values(), *amounts.values()]
        weigh = _Weights(section)
        base = 0
        for part, base in self._parts(section, columns):
            rows = pd.DataFrame({USER: part.ids(keys["user"]), ITEM: part.ids(keys["item"])})
            rows[TIME] = part.times(keys["time"]) if timed else (base + part.lines).astype(float)
            rows[EVENT] = part.category(keys["event_type"]) if "event_type" in keys else "event"
            for name, column in context.items():
                rows[name] = part.category(column)
            for name, column in amounts.items():
                rows[name] = part.numbers(column)
            rows[WEIGHT] = weigh(part, rows[EVENT])
            yield part.chunk(rows, base)
        yield Chunk(pd.DataFrame(columns=[USER, ITEM, TIME]), base=base, notes=tuple(weigh.unused()))

    def searches(self) -> Iterator[Chunk] | None:
        section = self.sections.get(SEARCHES)
        return None if section is None else self._searches(section)

    def _searches(self, section: Section) -> Iterator[Chunk]:
        keys = section.keys
        for part, base in self._parts(section, [keys[k] for k in NEEDED[SEARCHES] if k != "files"]):
            rows = pd.DataFrame({
                SEARCH: part.ids(keys["search"]), USER: part.ids(keys["user"]), QUERY_TEXT: part.text(keys["query"]),
                ITEM: part.ids(keys["item"]), POSITION: part.numbers(keys["position"]),
                CLICKED: part.text(keys["clicked"]), TIME: part.times(keys["time"]),
            })  # fmt: skip
            part.changed.clear()  # what is wrong in a row of searches rejects it
            yield part.chunk(rows, base)


def _joined(titles: list[pd.Series], index: pd.Index) -> pd.Series:
    """Titles joined by a blank."""
    if not titles:
        return pd.Series("", index=index, dtype=object)
    whole = titles[0].fillna("")
    for more in titles[1:]:
        whole = whole + " " + more.fillna("")
    return whole.str.strip() if len(whole) else whole


class _Weights:
    """Weights of events: a column, a table by event type, or 1. Remembers which types of the table occurred."""

    def __init__(self, section: Section) -> None:
        self._section = section
        self._by_type: dict[str, float] = {
            str(kind).strip(): float(weight) for kind, weight in section.keys.get("weights", {}).items()
        }
        self._shown = texts(section.keys.get("shown_types"))  # no head is judged by what was only shown
        self._seen: Counter[str] = Counter()
        self._named: set[str] = set()

    def __call__(self, part: Part, event: pd.Series) -> np.ndarray:
        keys = self._section.keys
        if "weight" in keys:
            return part.numbers(keys["weight"])
        if "weights" not in keys:
            return np.ones(len(event))
        self._seen.update(event.dropna().value_counts().to_dict())
        weights = event.map(self._by_type).astype(float).to_numpy()
        part.change(NO_TYPE, event.isna().to_numpy())
        unknown = event[event.notna() & np.isnan(weights) & ~event.isin(self._shown)]
        others = np.zeros(len(event), bool)
        for kind in unknown.unique():
            mask = (event == kind).to_numpy()
            if kind in self._named or len(self._named) < NAMED_TYPES:
                self._named.add(kind)
                part.change(NO_WEIGHT.format(kind), mask)
            else:
                others |= mask
        part.change(OTHER_TYPES, others)
        return weights

    def unused(self) -> list[str]:
        """A note on each type of the table that no event has."""
        there = sorted(self._seen)[:NAMED_TYPES]
        return [
            f"{self._section.where} weights: no event has the type {kind!r}; the types are {there}"
            for kind in self._by_type
            if not self._seen[kind]
        ]
