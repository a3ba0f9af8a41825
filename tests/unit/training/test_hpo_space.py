"""Spaces of hyper-parameters: what can be drawn from, and that a study keeps to one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from training.learn.hpo import SPACE, check_space, suggest
from training.presets import preset, tiny
from vivace.cli.optimize import write_best

FOLDER = Path("optimized")


@pytest.fixture
def study():
    """A study with one finished trial of the default space."""
    study = optuna.create_study()
    trial = study.ask()
    suggest(trial, SPACE)
    study.tell(trial, 0.1)
    return study


def test_the_same_space_goes_on(study):
    check_space(study, SPACE, tiny(), FOLDER)


@pytest.mark.parametrize(
    "changed",
    [
        {"encoder.dropout": [0.0, 0.4]},
        {"encoder.position_bias": ["none", "choice"]},
        {"encoder.layers": [1, 4, "int"]},
        {"retrieval.warmup_steps": [1, 9, "int"]},
    ],
)
def test_another_space_is_refused_with_what_differs(study, changed):
    with pytest.raises(ValueError, match=rf"{next(iter(changed))}.*rename {FOLDER}"):
        check_space(study, SPACE | changed, tiny(), FOLDER)


@pytest.mark.parametrize(
    "values", [0.5, "abc", [], [0.5], [0.5, 0.1], [0, 1, "ints"], ["a", "b"], {"a": 1}, [0.0, 1.0, "log"], ["choice"]]
)
def test_a_range_that_cannot_be_drawn_from_is_refused(values):
    with pytest.raises(ValueError, match=r"encoder\.dropout"):
        check_space(optuna.create_study(), {"encoder.dropout": values}, tiny(), FOLDER)


def test_what_a_search_does_not_train_is_refused():
    with pytest.raises(ValueError, match=r"ranker\.candidates: expected a field of encoder or retrieval"):
        check_space(optuna.create_study(), {"ranker.candidates": [50, 100, "int"]}, tiny(), FOLDER)


def test_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match=r"encoder\.depth"):
        check_space(optuna.create_study(), {"encoder.depth": [1, 2]}, tiny(), FOLDER)


def test_the_best_values_are_a_preset(tmp_path):
    """Sizes that fit each other and not those of the default preset: width 27 with 3 heads."""
    sizes = replace(tiny(), encoder=replace(tiny().encoder, width=27, heads=3), ranker=replace(tiny().ranker, heads=3))
    path = write_best(tmp_path / "preset.json", sizes, {"encoder.dropout": 0.25})
    assert json.loads(path.read_text())["encoder.width"] == 27
    assert preset(str(path)) == replace(sizes, encoder=replace(sizes.encoder, dropout=0.25))


def test_a_preset_file_builds_on_another_but_not_on_itself(tmp_path):
    wide, deep = tmp_path / "wide.json", tmp_path / "deep.json"
    wide.write_text('{"preset": "tiny", "encoder.width": 64, "encoder.layers": 2}')
    deep.write_text(json.dumps({"preset": wide.name, "encoder.layers": 3}))  # seen from its own folder
    assert (preset(str(deep)).encoder.width, preset(str(deep)).encoder.layers) == (64, 3)
    wide.write_text(json.dumps({"preset": str(deep)}))
    with pytest.raises(ValueError, match="builds on itself"):
        preset(str(deep))
    for text in ("[]", "null", '{"preset": 24}'):
        deep.write_text(text)
        with pytest.raises(ValueError, match="expected a JSON object such as"):
            preset(str(deep))
