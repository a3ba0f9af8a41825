"""The last stage of the ensemble as a plain function on arrays.

Axis legend: B rows, N candidates, C values of a candidate, K answered items.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from serving.runtime.live_catalogue import LiveCatalogue
from vivace.contract import FIRST_ID, PADDING_ID, STATUS_ERROR


class ResponseStage:
    """Ranked ids to item ids, cut to TOP_K. ``names[id]`` is the raw item id as bytes; the catalogue names fresh
    items."""

    def __init__(self, names: np.ndarray, catalogue: LiveCatalogue | None = None) -> None:
        self.names, self.catalogue = names, catalogue

    @classmethod
    def from_file(cls, path: Path, catalogue: LiveCatalogue | None = None) -> ResponseStage:
        """``path``: JSON list of raw item ids; entry i has id FIRST_ID + i."""
        items = json.loads(path.read_text(encoding="utf-8"))
        return cls(np.array([b""] * FIRST_ID + [i.encode() for i in items], object), catalogue)

    def names_of(self, ids: np.ndarray) -> np.ndarray:
        """Raw ids of ids of any shape, object. Raises IndexError for an id that names no item."""
        fresh = ids >= len(self.names)
        if self.catalogue is None or not fresh.any():
            return self.names[ids]
        named = self.names[np.where(fresh, PADDING_ID, ids)]
        names = [self.catalogue.name(int(id_)) for id_ in ids[fresh]]
        if b"" in names:
            raise IndexError(f"item ids {ids[fresh].tolist()[:5]}: expected ids of the catalogue")
        named[fresh] = names
        return named

    def without_gone(self, ranked_BN: np.ndarray, values_BCN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What may still be answered: an index is told only so many ids, and a query finds what it finds."""
        if self.catalogue is None:
            return ranked_BN, values_BCN
        self.catalogue.refresh()
        if not self.catalogue.rows:
            return ranked_BN, values_BCN
        gone_BN = np.isin(ranked_BN, self.catalogue.gone)
        for row, place in np.argwhere(ranked_BN >= len(self.names)):
            item_id = self.catalogue.name(int(ranked_BN[row, place])).decode()
            gone_BN[row, place] = self.catalogue.rows.get(item_id) is None
        if not gone_BN.any():
            return ranked_BN, values_BCN
        order_BN = np.argsort(gone_BN, axis=1, kind="stable")
        ids = np.take_along_axis(np.where(gone_BN, PADDING_ID, ranked_BN), order_BN, 1)
        return ids, np.take_along_axis(values_BCN, order_BN[:, None], 2)

    def __call__(
        self, ranked_BN: np.ndarray, values_BCN: np.ndarray, top_k_B: np.ndarray, status_B: Sequence[bytes] | np.ndarray
    ) -> list[np.ndarray]:
        """ITEM_ID (object [B, K]) and each row c of ``values_BCN`` as float32 [B, K]; K is the largest TOP_K, short
        rows end in b"", 0.

        A row whose status is an error answers nothing.
        """
        ranked_BN, values_BCN = self.without_gone(ranked_BN, values_BCN)
        if len(ranked_BN) == 1:  # a single row answers exactly what there is
            live = np.count_nonzero(ranked_BN[0])  # PADDING_ID is 0 and stands at the end
            k = 0 if status_B[0].startswith(STATUS_ERROR.encode()) else max(0, min(int(top_k_B[0]), live))
            return [self.names_of(ranked_BN[:, :k]), *values_BCN[:, :, :k].swapaxes(0, 1)]
        failed_B = np.array([s.startswith(STATUS_ERROR.encode()) for s in status_B])
        limit_B = np.where(failed_B, 0, np.clip(top_k_B, 0, ranked_BN.shape[1]))
        k = int(limit_B.max(initial=0))
        valid_BK = (np.arange(k)[None] < limit_B[:, None]) & (ranked_BN[:, :k] != PADDING_ID)
        items = self.names_of(np.where(valid_BK, ranked_BN[:, :k], PADDING_ID))
        return [items, *np.where(valid_BK, values_BCN[:, :, :k].swapaxes(0, 1), np.float32(0))]
