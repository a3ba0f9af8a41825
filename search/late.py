"""Late interaction (Khattab and Zaharia 2020): how well each word of a query is met by some word of an item's title,
by the states of a text tower. One vector a text says what it is about; this says whether each thing asked for is there.

Axis legend: V items, N candidates, L tokens of a title, S of a query, P width of a token's state.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

FILE = "title_states.npy"
SCALE = 127.0  # of a state's int8
NAMES = ("met", "least met", "two least met", "last met", "first met", "met unevenly")


class LateInteraction:
    """``states_VLP`` int8: unit states of the titles' tokens times SCALE; a row of zeros is no token."""

    def __init__(self, states_VLP: np.ndarray) -> None:
        self.states_VLP = states_VLP

    @classmethod
    def load(cls, folder: Path) -> LateInteraction | None:
        """Of a search's folder, read as rows are needed; None where its encoder has no states."""
        path = folder / FILE
        return cls(np.load(path, mmap_mode="r")) if path.exists() else None

    def __call__(self, states_SP: np.ndarray, rows_N: np.ndarray) -> np.ndarray:
        """float32 [N, NAMES]: of the cosines of each query token with its nearest title token, in -1..1, the mean, the
        least, the mean of the two least, that of the last and of the first token, the deviation. A title or a query
        without a token, or a row that was put in later, meets nothing: -1."""
        if not len(states_SP) or not len(rows_N):
            return np.tile(np.array([-1, -1, -1, -1, -1, 0], np.float32), (len(rows_N), 1))
        known_N = rows_N < len(self.states_VLP)
        titles_NLP = np.asarray(self.states_VLP[np.where(known_N, rows_N, 0)], np.float32) / np.float32(SCALE)
        titles_NLP[~known_N] = 0
        cosine_NLS = titles_NLP @ states_SP.T
        cosine_NLS[~titles_NLP.any(2)] = -1
        met_NS = cosine_NLS.max(1)
        least_NS = np.sort(met_NS, axis=1)
        columns = (
            met_NS.mean(1), least_NS[:, 0], least_NS[:, :2].mean(1), met_NS[:, -1], met_NS[:, 0], met_NS.std(1),
        )  # fmt: skip
        return np.stack(columns, 1).astype(np.float32)
