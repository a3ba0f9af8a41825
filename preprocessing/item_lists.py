"""List attributes of items, such as genres, in ids: which of an item's values models read, in which order.

A pure function of what NVTabular's vocabulary says of each value, so that a row that is sent to a server gets the ids
that ``vivace prepare`` would give it. Axis legend: I items, A list attributes, K values (MAX_VALUES).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vivace.contract import FIRST_ID, MAX_VALUES, NULL_ID, OOV_ID, PADDING_ID


def list_ids(ids: Iterable[int], values: int) -> list[int]:
    """The ids that stand for an item's list: each once, the most frequent first, MAX_VALUES at most. Values that the
    vocabulary lacks say nothing beside known ones, and OOV_ID where all are such; a list without ``values`` (how many
    it has) is NULL_ID."""
    if not values:
        return [NULL_ID]
    known = sorted({int(i) for i in ids if i >= FIRST_ID})  # ids are by falling frequency
    return known[:MAX_VALUES] or [OOV_ID]


def object_column(values: Sequence[Any]) -> np.ndarray:
    """Lists as an array of objects [n], none of which NumPy takes apart."""
    column = np.empty(len(values), object)
    for i, value in enumerate(values):
        column[i] = value
    return column


def padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """int32 [I, K]: the ids of each list, then PADDING_ID."""
    out = np.full((len(rows), MAX_VALUES), PADDING_ID, np.int32)
    for i, ids in enumerate(rows):
        out[i, : len(ids)] = ids[:MAX_VALUES]
    return out


def stacked(lists: Sequence[Sequence[Sequence[int]]], items: int) -> np.ndarray:
    """int32 [I, A, K] of the lists of each attribute."""
    return np.stack([padded(rows) for rows in lists], 1) if lists else np.zeros((items, 0, MAX_VALUES), np.int32)
