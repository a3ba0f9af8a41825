"""The search ranker as boosted trees: it learns a planted order, and its ONNX form is the same to the last split."""

from __future__ import annotations

import numpy as np
import pytest

from training.search.trees import TreesConfig, _at_most, train_trees
from vivace.onnx_session import open_session

SMALL = TreesConfig(trees=40, leaves=6, leaf_candidates=10, members=2, columns=1.0)


def planted(queries, seed):
    """Lists of 30 candidates with three features; what gains has the first two above 0.6, the third is noise."""
    rng = np.random.default_rng(seed)
    lists = [rng.random((30, 3)).astype(np.float32) for _ in range(queries)]
    return lists, [((x[:, 0] > 0.6) & (x[:, 1] > 0.6)).astype(float) for x in lists]


def test_it_learns_what_only_two_features_together_say():
    ranker = train_trees(*planted(60, 1), SMALL, 3)
    right = 0
    for x, gain in zip(*planted(40, 2), strict=True):
        right += gain[np.argsort(-ranker.score(x), kind="stable")[: int(gain.sum())]].sum() / max(gain.sum(), 1)
    assert right / 40 > 0.9  # either feature alone: below .6
    assert ranker.score(np.empty((0, 3), np.float32)).shape == (0,)


def test_onnx_is_the_same_on_both_sides_of_every_threshold(tmp_path):
    ranker = train_trees(*planted(60, 1), SMALL, 3)
    ranker.export(3, tmp_path / "ranker.onnx")
    session = open_session(tmp_path / "ranker.onnx")
    nodes = np.concatenate([stage[0].nodes for m in ranker.members for stage in m._predictors])
    edges = nodes["num_threshold"][nodes["is_leaf"] == 0].astype(np.float32)[:90]
    lists = [np.nextafter(edges, np.float32(way)).reshape(-1, 3) for way in (-9, 9)] + [edges.reshape(-1, 3)]
    for x in [*lists, *planted(3, 5)[0]]:
        assert session.run(None, {"FEATURES": x[None]})[0][0] == pytest.approx(ranker.score(x), abs=1e-6)
    both = np.stack(planted(2, 6)[0])
    assert session.run(None, {"FEATURES": both})[0][1] == pytest.approx(ranker.score(both[1]), abs=1e-6)


def test_thresholds_round_down_to_float32():
    exact = np.array([0.1, 0.5, 1 / 3, 16777217.0])
    near = _at_most(exact)
    assert near.astype(np.float32).tolist() == near.tolist() and (near <= exact).all()
    assert (np.nextafter(near.astype(np.float32), np.float32(np.inf)).astype(np.float64) > exact).all()


def test_queries_without_a_gain_teach_nothing():
    lists, gains = planted(20, 1)
    alone = train_trees(lists, gains, SMALL, 3).score(lists[0])
    beside = train_trees([*lists, lists[0]], [*gains, np.zeros(30)], SMALL, 3).score(lists[0])
    assert np.array_equal(alone, beside)
    with pytest.raises(ValueError, match="at least one query with a candidate that gains"):
        train_trees(lists[:1], [np.zeros(30)], SMALL, 3)
