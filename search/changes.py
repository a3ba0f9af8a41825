"""Changes of the catalogue in a search index that is there: rows that were put in get places behind the others, rows
that were taken out or replaced are shut. Weights are those of the index's own catalogue, so that the order among the
others is unchanged.

Axis legend: V rows of the index, K changed rows, E width of the vectors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from search.data import Catalogue
from search.hybrid import HybridIndex
from search.listed import shown
from search.text import normalise
from vivace.contract import FIRST_ID

LEAST_S = 0.2  # between two indexes
SHARE = 4.0  # or so many times what the last one took
ENCODED = 64  # texts at once; the others are found by their words until the next time

Encode = Callable[[Sequence[str]], np.ndarray]


class LiveChanges(Protocol):
    """What is followed. ``rows``: of every item that changed, None where it must not be found; ``ids``: their ids."""

    @property
    def number(self) -> int: ...

    @property
    def rows(self) -> Mapping[str, Mapping[str, Any] | None]: ...

    @property
    def ids(self) -> Mapping[str, int]: ...

    def refresh(self) -> None: ...


class ChangingIndex:
    """An index with what changed.

    Args:
        base: of the compiled catalogue.
        encode: normalised texts of items to unit vectors float32 [K, E].
    """

    def __init__(self, base: HybridIndex, encode: Encode, live: LiveChanges) -> None:
        self._base, self._encode, self._live = base, encode, live
        self._number, self._whole = 0, True  # of the changes that ``index`` has; whether every text was encoded
        self._at, self._took = -np.inf, 0.0
        self._vectors: dict[str, tuple[str, np.ndarray]] = {}  # of an item: its text and the vector of it
        self.index = base
        self.added: dict[str, Mapping[str, Any]] = {}  # rows that are in it
        self._ids = np.arange(FIRST_ID, FIRST_ID + len(base.catalogue.items))
        self._row_of_id: dict[int, int] = {}

    def refresh(self) -> bool:
        """Reads what changed; whether the index is another one. What is taken out is shut at once; what is put in
        waits for LEAST_S since the last time, longer where an index takes long."""
        self._live.refresh()
        if self._number == self._live.number and self._whole:
            return False
        began = time.monotonic()
        if began - self._at < max(LEAST_S, SHARE * self._took):
            self._shut()
            return False
        self._number = self._live.number
        self._build({item: row for item, row in self._live.rows.items() if row is not None})
        self._at = time.monotonic()
        self._took = self._at - began
        return True

    def _build(self, rows: dict[str, Mapping[str, Any]]) -> None:
        base, items, values = self._base.catalogue, list(rows), list(rows.values())
        text = lambda name: [shown(row.get(name)) for row in values]  # noqa: E731
        number = lambda name: [np.nan if row.get(name) is None else row[name] for row in values]  # noqa: E731
        at = [self._base.row.get(item) for item in items]
        popularity = np.array([0.0 if a is None else self._base.popularity[a] for a in at], np.float32)
        texts = {field.name: text(field.name) for field in self._base.lexical.fields}
        changed = Catalogue(
            items, texts, {name: text(name) for name in base.attributes},
            {name: np.array(number(name), np.float32) for name in base.numbers}, popularity,
            {name: [list(row.get(name) or []) for row in values] for name in base.lists},
        )  # fmt: skip
        self.index, self.added = self._base.extended(changed, self._encoded(items, texts)), rows
        self._ids = np.concatenate([self._ids[: len(base.items)], [self._live.ids[item] for item in items]]).astype(
            np.int64
        )
        self._row_of_id = {int(id_): len(base.items) + k for k, id_ in enumerate(self._ids[len(base.items) :])}
        self._shut()

    def _encoded(self, items: list[str], texts: Mapping[str, list[str]]) -> np.ndarray:
        joined = [normalise(" ".join(parts)) for parts in zip(*texts.values(), strict=True)]
        nothing = "", np.zeros(self._base.vectors.shape[1], np.float32)
        new = [k for k, item in enumerate(items) if self._vectors.get(item, nothing)[0] != joined[k]]
        if new:
            for k, vector in zip(new, self._encode([joined[k] for k in new[:ENCODED]]), strict=False):
                self._vectors[items[k]] = joined[k], vector
        self._whole = len(new) <= ENCODED
        kept = [self._vectors.get(item, nothing) for item in items]
        vectors = [vector if text == joined[k] else nothing[1] for k, (text, vector) in enumerate(kept)]
        return np.stack(vectors) if vectors else np.zeros((0, len(nothing[1])), np.float32)

    def _shut(self) -> None:
        """Rows of items that were taken out, and of those that have another row since."""
        count = len(self._base.catalogue.items)
        shut_V = np.zeros(len(self._ids), bool)
        for item, row in self._live.rows.items():
            at = self._base.row.get(item)
            if at is not None and (row is None or item in self.added):
                shut_V[at] = True
        for k, item in enumerate(self.added):
            shut_V[count + k] = self._live.rows.get(item) is None
        self.index.shut_V = shut_V

    def ids(self, rows: np.ndarray) -> np.ndarray:
        """Item ids int64 of rows of the index."""
        return self._ids[rows]

    def rows_of(self, ids: Sequence[int]) -> list[int]:
        """Rows of the index of item ids; ids that have none are left out."""
        count = len(self._base.catalogue.items)
        rows = [self._row_of_id.get(id_, id_ - FIRST_ID if FIRST_ID <= id_ < FIRST_ID + count else -1) for id_ in ids]
        return [row for row in rows if row >= 0]
