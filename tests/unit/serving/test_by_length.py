"""Rows are cut into runs of a graph at the least cost."""

from __future__ import annotations

import itertools

import numpy as np

from serving.runtime.by_length import CHUNK, RUN_EVENTS, cuts, padded


def cost(lengths: list[int], ends: tuple[int, ...] | list[int]) -> int:
    return sum(RUN_EVENTS + (end - start) * lengths[end - 1] for start, end in zip([0, *ends], ends, strict=False))


def test_no_other_cuts_cost_less():
    random = np.random.default_rng(5)
    for rows in (1, 2, 5, 9, 11):
        lengths = sorted(padded(int(n)) for n in random.integers(1, 201, rows))
        others = ((*inner, rows) for count in range(rows) for inner in itertools.combinations(range(1, rows), count))
        allowed = [e for e in others if all(b - a <= CHUNK for a, b in zip((0, *e), e, strict=False))]
        found = cuts(lengths)
        assert tuple(found) in allowed and cost(lengths, found) == min(cost(lengths, e) for e in allowed)


def test_lengths_are_few_and_hold_what_is_read():
    lengths = [padded(n) for n in range(1, 201)]
    assert all(0 <= p - n < 16 for n, p in enumerate(lengths, 1)) and len(set(lengths)) == 17
