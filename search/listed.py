"""Attributes of several values an item, such as genres, as an index holds them. Axis legend: V items, U values that
exist, P pairs of an item and a value of it, N rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def shown(value: Any) -> str:
    """What search reads of a cell of the catalogue: the values of a list joined by blanks, "" for none."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value or "")


class Listed:
    """``values`` [U] that exist; the codes of row r lie in ``codes`` int32 [P] from ``starts[r]`` to ``starts[r + 1]``,
    none twice."""

    def __init__(self, values: np.ndarray, codes: np.ndarray, starts: np.ndarray) -> None:
        self.values, self.codes, self.starts = values, codes, starts

    @classmethod
    def of(cls, column: Sequence[Sequence[str]]) -> Listed:
        """``column``: the values of each item."""
        known = sorted({value for row in column for value in row})
        none = cls(np.array(known, object).astype(str), np.zeros(0, np.int32), np.zeros(1, np.int64))
        return none.extended(column)

    def extended(self, column: Sequence[Sequence[str]]) -> Listed:
        """With items behind those that are there; values that are new stand behind the others."""
        known = {value: code for code, value in enumerate(self.values.tolist())}
        codes = [sorted({known.setdefault(value, len(known)) for value in row}) for row in column]
        flat = np.array([code for row in codes for code in row], np.int32)
        starts = self.starts[-1] + np.cumsum([len(row) for row in codes], dtype=np.int64)
        values = np.array(list(known), object).astype(str)
        return Listed(values, np.concatenate([self.codes, flat]), np.concatenate([self.starts, starts]))

    def _pairs(self, rows_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(codes of all ``rows_N``, one row's after the other; the place in ``rows_N`` of each)."""
        first, counts = self.starts[rows_N], self.starts[rows_N + 1] - self.starts[rows_N]
        place = np.repeat(np.arange(len(rows_N)), counts)
        within = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.codes[first[place] + within], place

    def having(self, values: Iterable[str]) -> np.ndarray:
        """bool [V]: whether an item has any of ``values``."""
        hits = np.concatenate([[0], np.cumsum(np.isin(self.values, list(values))[self.codes])])
        out: np.ndarray = hits[self.starts[1:]] > hits[self.starts[:-1]]
        return out

    def counts(self, rows_N: np.ndarray) -> np.ndarray:
        """int64 [U]: how many of the rows have each value."""
        return np.bincount(self._pairs(rows_N)[0], minlength=len(self.values))

    def largest(self, chance_U: np.ndarray, rows_N: np.ndarray) -> np.ndarray:
        """float32 [N]: the largest of ``chance_U`` among the values of each row, 0 where it has none."""
        codes, place = self._pairs(rows_N)
        out = np.zeros(len(rows_N), np.float32)
        np.maximum.at(out, place, chance_U[codes])
        return out
