"""How far two answers are apart, by hand: ties may change places, nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from training.judge.parity import difference

NAMES = ["IDS", "SCORES"]


def compare(ids, scores):
    expected = [np.array([[3, 4, 5, 6]]), np.array([[9.0, 7.0, 7.0, 1.0]], np.float32)]
    return difference(expected, [np.array([ids]), np.array([scores], np.float32)], NAMES)


def test_ties_may_change_places_and_nothing_else():
    assert compare([3, 4, 5, 6], [9, 7, 7, 1]) == {"IDS": 1.0, "SCORES": 0.0}
    assert compare([3, 5, 4, 6], [9, 7, 7, 1])["IDS"] == 1.0  # of one score in the reference
    assert compare([4, 3, 5, 6], [9, 7, 7, 1])["IDS"] == 0.75  # 9 and 7 are no tie: the first place is wrong
    assert compare([3, 5, 4, 6], [9, 7.1, 7, 1])["IDS"] == 0.75  # not the score of the tie
    assert compare([3, 5, 4, 6], [9, 7, 7.1, 1])["SCORES"] == pytest.approx(0.1, abs=1e-6)  # item by item
