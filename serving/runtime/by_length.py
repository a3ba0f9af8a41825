"""Batches cut into parts of about equal length, so that graphs need not work through the padding of the longest row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vivace.contract import PADDING_ID

CHUNK = 8  # rows that a graph takes at once: fewer are padded to the longest, and a batch of 64 needs less memory
PAIRS = CHUNK << 20  # pairs of events of the rows that a graph takes at once: attention's memory goes with them
STEP = 16  # events by which padded lengths differ: few shapes for ONNX Runtime to prepare for


def rows_at_once(length: int) -> int:
    """How many rows of so many events a graph takes at once: CHUNK up to 1,024, at 4,096 one."""
    return max(1, min(CHUNK, PAIRS // max(1, length) ** 2))


def chunks(history_BT: np.ndarray, whole: bool = False) -> list[tuple[np.ndarray, int]]:
    """(places of rows, newest events to read of them) for ids int64 [B, T], padded on the left: rows of about equal
    length together, at most CHUNK in each. ``whole``: all T events, in the order that the rows have."""
    rows, t = history_BT.shape
    known = history_BT != PADDING_ID
    length_B = np.where(known.any(1), t - known.argmax(1), 0)
    order = np.arange(rows) if whole else np.argsort(length_B, kind="stable")
    most = rows_at_once(t if whole else int(length_B.max(initial=1)))
    parts = []
    for places in np.array_split(order, max(1, -(-rows // most))):
        longest = t if whole else int(length_B[places].max(initial=1))
        parts.append((places, min(t, max(1, -(-longest // STEP)) * STEP)))
    return parts


def together(parts: Sequence[tuple[np.ndarray, Sequence[np.ndarray]]], rows: int, encoded: int = 0) -> list[np.ndarray]:
    """Outputs of all rows from those of the rows of each chunk. ``encoded``: M, to which the last output [B, <= M, D]
    is padded on the left with the zeros that an encoder gives padding."""
    out = [np.zeros((rows, *v.shape[1:]), v.dtype) for v in parts[0][1]]
    if encoded:
        out[-1] = np.zeros((rows, encoded, out[-1].shape[2]), out[-1].dtype)
    for places, outputs in parts:
        for number, (all_rows, part) in enumerate(zip(out, outputs, strict=True)):
            if encoded and number == len(out) - 1:
                all_rows[places, encoded - part.shape[1] :] = part
            else:
                all_rows[places] = part
    return out
