"""Which events of a long history are read, for training, evaluation and serving alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def _mixed(ids_n: np.ndarray) -> np.ndarray:
    """A number of each id that says nothing of its size, uint64 (the finalizer of SplitMix64, Steele et al. 2014)."""
    x = ids_n.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Window:
    """What is read of a history: at most ``length`` of its newest events; ``slide`` as ``newest`` has it."""

    length: int
    slide: int = 1


def newest(ids_n: np.ndarray, length: int, slide: int = 1) -> int:
    """How many of the newest events of a history int64 [n], oldest first, are read: at most ``length``.

    ``slide`` above 1: of as long or a longer history at least ``length - slide + 1``, from the event of the ``slide``
    oldest that could be the first whose id has the least hash. Appended events leave that one the first until it is
    too old or a smaller one is near enough: the start moves once in about ``slide / 2`` events, however many older
    ones a caller or a store still has; a full store may have just ``length``. (A count of events would not do: it
    always has as many.)"""
    n, slide = len(ids_n), min(slide, length)
    if n < length or slide == 1:
        return min(n, length)
    first = _mixed(ids_n[n - length : n - length + slide])
    latest = slide - 1 - int(first[::-1].argmin())  # of equal ones, as an item may come again
    return length - latest
