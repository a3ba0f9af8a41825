"""The small shop replayed: models as evaluated, and no event of the future."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.support import quiet
from training.judge import evaluate, replay
from training.judge.evaluate import RANKED, RETRIEVAL, Models
from training.presets import tiny
from vivace.contract import FIRST_ID, ITEM, TIME, USER
from vivace.run import RANKING


@pytest.fixture(scope="module")
def models(root, features) -> Models:
    return Models(features, tiny(), root, [RANKING])


def test_replay_writes_figures_and_the_models_answer_as_evaluated(root, features):
    results = replay.replay(features, tiny(), root, quiet)
    written = json.loads((root / "evaluation" / replay.FILE).read_text())
    assert written["rows"] == results["rows"] and (root / "evaluation" / replay.PLOT).stat().st_size > 1000
    table = json.loads((root / "evaluation" / "metrics.json").read_text())["table"]
    for method in (RETRIEVAL, RANKED):
        for figure in ("NDCG@10", "HR@10"):
            assert results["rows"][method][figure] == pytest.approx(table[method][figure])
    popular = results["rows"][replay.TRAINED]["NDCG@10"]
    assert popular == pytest.approx(table[evaluate.POPULARITY]["NDCG@10"])
    chosen = results["chosen"]
    best = {name: blend["validation NDCG@10"] for name, blend in chosen["blends"].items()}
    assert set(best) == {replay.COUNTED, replay.RENEWED, replay.MODELLESS} <= set(results["rows"])
    tried = next(value for name, value in chosen.items() if "by half-life and weight" in name)
    assert best[replay.COUNTED] == max(value for row in tried.values() for value in row.values())
    assert sum(results["by_hour"]["requests"]) == results["requests"]


def test_a_planted_future_changes_no_rank(features, models):
    """What is planted at the moment of a request, or after, is not known to it; to the later ones it is."""
    stream = features.events()
    requests, moments = replay.by_moment(features, models, "test")
    middle = len(moments) // 2
    planted = np.full(2000, int(requests.target_B[middle]))
    at = np.full(2000, moments[middle])
    where = np.searchsorted(stream[TIME], at, side="right")
    with_plant = {
        ITEM: np.insert(stream[ITEM], where, planted),
        TIME: np.insert(stream[TIME], where, at),
        USER: np.insert(stream[USER], where, 0),
    }
    chosen = {replay.COUNTED: replay.Blend("30 min", 2.0), replay.RENEWED: replay.Blend("2 h", 2.0, 1.0)}
    before, _ = replay.walk(models, stream, chosen, quiet)
    after, _ = replay.walk(models, with_plant, chosen, quiet)
    until = int(np.searchsorted(moments, moments[middle], side="right"))
    assert planted[0] >= FIRST_ID and until < len(moments)
    for method, rank in before.ranks().items():
        np.testing.assert_array_equal(rank[:until], after.ranks()[method][:until], err_msg=method)
    counted = replay.COUNTED
    assert (before.ranks()[counted] != after.ranks()[counted]).any()
