"""Which items must not be answered, for training, evaluation and serving alike.

Axis legend: B rows, V item ids, S seen items.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vivace.contract import FIRST_ID, PADDING_ID


def excluded(histories: Sequence[np.ndarray], items: int) -> np.ndarray:
    """bool [B, V], True at the special ids and at those of each row's history."""
    out_BV = np.zeros((len(histories), items), bool)
    out_BV[:, :FIRST_ID] = True
    for row, history in zip(out_BV, histories, strict=True):
        row[history] = True
    return out_BV


def seen_ids(histories: Sequence[np.ndarray], count: int) -> np.ndarray:
    """int64 [B, count]: the newest distinct items of each row, newest last, padded on the left."""
    out_BS = np.full((len(histories), count), PADDING_ID, np.int64)
    for row, history in zip(out_BS, histories, strict=True):
        distinct = list(dict.fromkeys(history[::-1].tolist()))[:count][::-1]
        row[count - len(distinct) :] = distinct
    return out_BS
