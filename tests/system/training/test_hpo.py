"""The optimizer prunes, goes on with its study, and names a field that no preset has."""

from __future__ import annotations

import json

import optuna
import pytest

from tests.support import quiet
from training.learn.hpo import optimize
from training.presets import tiny, with_values


def test_a_study_is_taken_up_and_plotted(features, root, tmp_path):
    space = {"retrieval.learning_rate": [1e-4, 1e-2, "log"], "encoder.position_bias": ["none", "relative", "choice"]}
    study = optimize(features, tiny(), tmp_path, 3, 2, quiet, space)
    assert len(study.trials) == 2
    study = optimize(features, tiny(), tmp_path, 3, 1, quiet, space)
    assert len(study.trials) == 3 and {t.number for t in study.trials} == {0, 1, 2}
    best = json.loads((tmp_path / "optimized" / "best.json").read_text())
    finished = [t.value for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert best["value"] == max(finished) > 0 and set(best["values"]) == set(space)
    assert (tmp_path / "optimized" / "study.png").stat().st_size > 1000
    assert list((tmp_path / "optimized" / "trial-0" / "retrieval" / "tensorboard").glob("events*"))


def test_a_field_is_set_by_dotted_name_and_a_wrong_one_is_named():
    assert with_values(tiny(), {"encoder.dropout": 0.4}).encoder.dropout == 0.4
    with pytest.raises(ValueError, match=r"encoder\.dropuot: no such field"):
        with_values(tiny(), {"encoder.dropuot": 0.4})
