"""Requests of one session count as one where chance is measured."""

from __future__ import annotations

import numpy as np

from benchmarks.sessions import interval, of_ranks, rows_of, sessions_of
from training.judge.evaluate import FINAL_FIT, RETRIEVAL
from training.judge.session_neighbours import SESSIONS


def test_a_request_belongs_to_the_longest_it_is_a_beginning_of():
    histories, targets = [[1, 2, 3], [1, 2], [1], [1], [4, 2]], [4, 3, 2, 5, 3]
    assert sessions_of(histories, targets).tolist() == [0, 0, 0, 1, 2]


def test_the_figures_of_a_request():
    found = of_ranks(np.array([0, 19, 20]))
    assert found["P@20"].tolist() == [1, 1, 0] and found["MRR@20"].tolist() == [1, 1 / 20, 0]


def test_the_interval_is_over_sessions():
    values, session = np.array([1.0] * 50 + [0.0] * 50), np.repeat([0, 1], 50)
    assert interval(values, session) == (0.0, 1.0), "two sessions say little, a hundred requests or not"
    low, high = interval(values, np.arange(100))
    assert 0.38 < low < 0.42 and 0.58 < high < 0.62


def test_each_row_is_compared_with_neighbours_over_as_many_events():
    ranks = {SESSIONS: np.array([0, 30]), FINAL_FIT + SESSIONS: np.array([1, 0]), RETRIEVAL: np.array([0, 1])}
    ranks[FINAL_FIT + RETRIEVAL] = np.array([0, 0])
    gains = {row["method"]: row["MRR@20 gain"] for row in rows_of(ranks, np.array([0, 1]))}
    assert gains == {SESSIONS: 0, FINAL_FIT + SESSIONS: 0, RETRIEVAL: 0.25, FINAL_FIT + RETRIEVAL: 0.25}
