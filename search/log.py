"""A log of searches: which items were shown where, and which of them were clicked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from search.propensity import inverse_propensity, propensities
from search.text import normalise
from vivace import contract


@dataclass(frozen=True)
class SearchLog:
    """A log of searches, list by list in the order of time: rows ``starts[i]`` to ``starts[i + 1]`` of ``frame``."""

    frame: pd.DataFrame
    starts: np.ndarray

    @classmethod
    def of(cls, frame: pd.DataFrame) -> SearchLog:
        first = np.sort(np.unique(pd.factorize(frame[contract.SEARCH])[0], return_index=True)[1])
        return cls(frame, np.append(first, len(frame)))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def part(self, start: int, stop: int) -> SearchLog:
        rows = self.frame.iloc[self.starts[start] : self.starts[stop]]
        return SearchLog(rows, self.starts[start : stop + 1] - self.starts[start])

    def with_clicks(self) -> SearchLog:
        sums = np.add.reduceat(self.frame[contract.CLICKED].to_numpy(int), self.starts[:-1])
        return SearchLog.of(self.frame[np.repeat(sums > 0, np.diff(self.starts))])

    def column(self, name: str) -> list[Any]:
        """Of each list the value of its first row."""
        return self.frame[name].to_numpy()[self.starts[:-1]].tolist()

    def clicked(self) -> list[list[int]]:
        """Item ids that were clicked, of each list."""
        ids, hit = self.frame[contract.ITEM].to_numpy(), self.frame[contract.CLICKED].to_numpy(bool)
        cuts = self.starts[1:-1]
        return [i[h].tolist() for i, h in zip(np.split(ids, cuts), np.split(hit, cuts), strict=True)]

    def passed_over(self) -> list[list[int]]:
        """Item ids without a click above the last one that has one."""
        ids, hit = self.frame[contract.ITEM].to_numpy(), self.frame[contract.CLICKED].to_numpy(bool)
        out = []
        for i, h in zip(np.split(ids, self.starts[1:-1]), np.split(hit, self.starts[1:-1]), strict=True):
            last = int(np.flatnonzero(h).max(initial=-1))
            out.append(i[: last + 1][~h[: last + 1]].tolist())
        return out

    def gains(self, seen: np.ndarray) -> list[dict[int, float]]:
        """Of each list the clicked items' gains: the inverse of the chance ``seen`` of their places."""
        place = np.minimum(self.frame[contract.POSITION].to_numpy() - 1, len(seen) - 1)
        weight = inverse_propensity(self.frame[contract.CLICKED].to_numpy(bool), place, seen)
        ids = self.frame[contract.ITEM].to_numpy()
        cuts = self.starts[1:-1]
        parts = zip(np.split(ids, cuts), np.split(weight, cuts), strict=True)
        return [
            {int(i): float(w) for i, w in zip(ids_of_list, weights, strict=True) if w} for ids_of_list, weights in parts
        ]

    def seen(self) -> np.ndarray:
        """Chance that each place is looked at, relative to the first, from what was shown at several."""
        names = self.frame[contract.QUERY_TEXT].map(normalise) + "\0" + self.frame[contract.ITEM].astype(str)
        place = self.frame[contract.POSITION].to_numpy() - 1
        return propensities(pd.factorize(names)[0], place, self.frame[contract.CLICKED].to_numpy(bool))
