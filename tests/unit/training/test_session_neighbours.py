"""V-SKNN worked out by hand on four sessions, and what must hold for any."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training.judge.session_neighbours import SessionNeighbours
from vivace.contract import FIRST_ID, ITEM, OOV_ID, TIME

A, B, C, D, E = range(FIRST_ID, FIRST_ID + 5)
ITEMS = FIRST_ID + 5
SESSIONS = [[A, B], [B, C, B], [A, C, D], [D, E]]  # the oldest first


def files(folder, sessions):
    """Two files, in which the sessions lie in another order than that of their times."""
    out = []
    for part in (1, 0):
        rows = list(range(part, len(sessions), 2))[::-1]
        ids = [sessions[i] for i in rows]
        times = [[1000 * i + place for place in range(len(sessions[i]))] for i in rows]
        out.append(folder / f"part-{part}.parquet")
        pq.write_table(pa.table({ITEM: pa.array(ids, pa.list_(pa.int64())), TIME: times}), out[-1])
    return out


def test_the_scores_of_four_sessions(tmp_path):
    # the request A, B: A weighs 1/2, B 2/2
    # [A, B] shares 1/2 + 1, [B, C, B] 1, [A, C, D] 1/2, [D, E] nothing
    neighbours = SessionNeighbours(files(tmp_path, SESSIONS), ITEMS)
    expected = {A: 1.5 + 0.5, B: 1.5 + 1, C: 1 + 0.5, D: 0.5, E: 0}
    scores = neighbours.scores([np.array([A, B])])
    assert scores.shape == (1, ITEMS) and not scores[:, :FIRST_ID].any()
    assert scores[0, FIRST_ID:].tolist() == [expected[i] for i in (A, B, C, D, E)]


def test_only_the_nearest_of_the_newest_speak(tmp_path):
    written = files(tmp_path, SESSIONS)
    of_two = SessionNeighbours(written, ITEMS, nearest=2).scores([np.array([A, B])])[0]
    assert of_two[FIRST_ID:].tolist() == [1.5, 1.5 + 1, 1, 0, 0], "[A, B] and [B, C, B]"
    newest = SessionNeighbours(written, ITEMS, nearest=2, sample=2).scores([np.array([A, B])])[0]
    assert newest[FIRST_ID:].tolist() == [0.5, 1, 1 + 0.5, 0.5, 0], "[B, C, B] and [A, C, D] are newer"
    one = SessionNeighbours(written, ITEMS, nearest=1).scores([np.array([C])])[0]
    assert one[FIRST_ID:].tolist() == [1, 0, 1, 1, 0], "of two that share as much the newer one"


def test_an_item_that_came_twice_weighs_as_its_newest_place(tmp_path):
    neighbours = SessionNeighbours(files(tmp_path, SESSIONS), ITEMS)
    # E, D, E: D weighs 2/3, E 3/3; [A, C, D] shares 2/3, [D, E] 5/3
    scores = neighbours.scores([np.array([E, D, E])])[0]
    np.testing.assert_allclose(scores[FIRST_ID:], [2 / 3, 0, 2 / 3, 7 / 3, 5 / 3], rtol=1e-6)


def test_a_batch_answers_as_each_request_alone_and_the_unknown_as_none(tmp_path):
    rng = np.random.default_rng(3)
    sessions = [rng.integers(FIRST_ID, ITEMS, rng.integers(1, 6)).tolist() for _ in range(40)]
    neighbours = SessionNeighbours(files(tmp_path, sessions), ITEMS, nearest=7, sample=20)
    requests = [rng.integers(OOV_ID, ITEMS, rng.integers(1, 6)) for _ in range(15)]
    alone = np.concatenate([neighbours.scores([r]) for r in requests])
    np.testing.assert_array_equal(neighbours.scores(requests), alone)
    assert not neighbours.scores([np.array([OOV_ID]), np.array([], np.int64)]).any()
    assert SessionNeighbours([], ITEMS).scores([np.array([A])]).tolist() == [[0.0] * ITEMS]


def test_sizes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="1 <= nearest <= sample, got 5 and 4"):
        SessionNeighbours([], ITEMS, nearest=5, sample=4)
