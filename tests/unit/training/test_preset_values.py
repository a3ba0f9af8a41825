"""Odd settings of a preset never pass in silence: every field refuses what it does not take, and a setting that nothing
reads is refused with what would read it."""

from __future__ import annotations

import json
import types
from dataclasses import fields, replace
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import optuna
import pytest

from training.learn.hpo import SPACE, check_values, default_space, drawn
from training.models.task_heads import check_weighting
from training.preset_rules import READ_WITH, unread
from training.presets import PRESETS, Preset, flat, preset, shop, with_values
from vivace.checks import Range
from vivace.cli.optimize import write_best

PARTS = {part.name: type(getattr(Preset(), part.name)) for part in fields(Preset)}
FIELDS = [(part, f.name) for part, of in PARTS.items() for f in fields(of)]
NO_NUMBERS: list[Any] = ["3", None, [1], {}, float("nan"), float("inf"), -float("inf"), 2**70, -(2**70), 1e30, True]
ODD: dict[type, list[Any]] = {
    int: [*NO_NUMBERS, 1.5, -1],
    float: [*NO_NUMBERS, 10**400, -1e9],
    bool: [0, 1, "true", "false", None, [], 2**70, float("nan")],
    str: ["", " ", 3, None, True, ["static"], float("nan"), 2**70],
}


def annotation(part: str, name: str) -> Any:
    return get_type_hints(PARTS[part], include_extras=True)[name]


def odd_values(kind: Any) -> list[Any]:
    """What a field of that annotation must not take."""
    if get_origin(kind) is Literal:
        return ["no-such", get_args(kind)[0].upper(), "", 3, None, True, [get_args(kind)[0]], float("nan"), 2**70]
    return ODD[get_args(kind)[0] if get_origin(kind) is Annotated else kind]


@pytest.mark.parametrize(("part", "name"), FIELDS, ids=map(".".join, FIELDS))
def test_a_field_refuses_what_it_does_not_take(part, name):
    kind = annotation(part, name)
    for value in odd_values(kind):
        with pytest.raises(ValueError) as refused:
            with_values(Preset(), {f"{part}.{name}": value})
        message = str(refused.value)
        assert f"{PARTS[part].__name__}.{name}: expected " in message and ", got " in message, message
        assert len(message) < 400


@pytest.mark.parametrize(("part", "name"), FIELDS, ids=map(".".join, FIELDS))
def test_a_number_has_a_range_and_takes_its_ends(part, name):
    kind = annotation(part, name)
    if kind in (int, float):
        pytest.fail(f"{part}.{name}: expected a number with its range, such as vivace.checks.Size")
    if get_origin(kind) is Annotated:
        (number, within), default = get_args(kind), getattr(PARTS[part](), name)
        assert isinstance(within, Range) and default in within
        for value, step in ((within.least, -1), (within.most, 1)):
            inside = not (within.above if step < 0 else within.below)
            assert (number(value) in within) is inside and number(value) + step not in within


@pytest.mark.parametrize("weighting", ["Static", "only-", "only--1", "only-1.0", "only-٣", "only-01", "only-1 ", "sum"])
def test_an_odd_weighting_is_refused(weighting):
    with pytest.raises(ValueError, match=r"RankerTraining.weighting: expected one of .*, got "):
        with_values(Preset(), {"ranking.weighting": weighting})


def test_a_weighting_of_a_head_there_is_not_is_refused():
    check_weighting("only-1", heads=2)
    with pytest.raises(ValueError, match="only-0 to only-1, of 2 heads, got 'only-2'"):
        check_weighting("only-2", heads=2)


# -- what nothing reads ----------------------------------------------------------------------------------------
OTHER: dict[str, Any] = {
    "tower": "another",
    "position_bias": "relative",
    "neighbours_by": "linear",
    "by_context": False,
}
UNREAD_IN = {  # where a preset as it is would read them
    "encoder.ffn_factor": {"encoder.family": "gru"}, "encoder.ffn_width": {"encoder.family": "hstu"},
    "encoder.head_width": {"encoder.family": "lstm"}, "encoder.adapter": {"encoder.family": "hstu"},
    "encoder.position_bias": {"encoder.family": "gru"}, "retrieval.patience": {"retrieval.probe_users": 0},
    "ranker.experts": {"ranker.mixture": "shared"}, "ranking.patience": {"ranking.held_out": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("name", READ_WITH)
def test_a_setting_that_nothing_reads_is_refused(name):
    default, key = flat(Preset())[name], name.partition(".")[2]
    other = OTHER.get(key, "request" if key == "nearest_to" else default / 2 if isinstance(default, float) else None)
    value = default + 1 if other is None else other or 0.5
    value = other if isinstance(other, bool) else value
    values = {**UNREAD_IN.get(name, {}), name: value}
    with pytest.raises(
        ValueError, match=rf"^{name} .* is read by nothing here: expected \S+ .*, got .*leave {name} out"
    ):
        with_values(Preset(), values)
    with_values(Preset(), {**values, name: default})


def test_what_is_inherited_may_lose_its_reader(tmp_path):
    live = PRESETS["news-live"]()
    assert with_values(live, {"ranker.rising": 0}).ranker.rising_same_item_s == 1800
    with pytest.raises(ValueError, match=r"ranker.rising_newcomers 3.0 is read by nothing"):
        with_values(live, {"ranker.rising": 0, "ranker.rising_newcomers": 3.0})
    unlike = with_values(live, {"ranker.rising": 0, "ranker.candidates": 60})
    written = write_best(tmp_path / "best.json", unlike, {"encoder.dropout": 0.25})
    read = preset(str(written))
    assert read.encoder == replace(unlike.encoder, dropout=0.25) and read.ranker.rising_same_item_s == 0


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_set_nothing_that_nothing_reads(name, tmp_path):
    sizes = PRESETS[name]()
    whole, defaults = flat(sizes), flat(Preset())
    dead = {key for key, value in whole.items() if value != defaults[key] and unread(key, whole) is not None}
    assert not dead
    file = tmp_path / "whole.json"
    file.write_text(json.dumps(whole))
    assert preset(str(file)) == sizes


# -- files -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"encoder.width": 64, "encoder.width": 32}', "expected each key once, got 'encoder.width' several times"),
        ('{"retrieval.calibration": NaN}', "expected finite numbers, got NaN"),
        ('{"retrieval.learning_rate": -Infinity}', "expected finite numbers, got -Infinity"),
        ('{"retrieval.learning_rate": 1e999}', "RetrievalTraining.learning_rate: expected .*, got inf"),
        ('{"encoder.widht": 64}', "encoder.widht: no such field of a preset; expected for example 'encoder.width'"),
        ('{"encoder": {"width": 64}}', "encoder: no such field of a preset"),
        ('{"encoder.width": 64', "expected a JSON file of a preset"),
        ('{"retrieval.calibration": 1.5}', "RetrievalTraining.calibration: expected a finite number, 0 <= x <= 1"),
        ('{"ranker.rising_user_events": 3}', "expected ranker.rising set beside it, got ranker.rising 0"),
        ('{"preset": "no-such.json"}', "no-such.json: .*No such file"),
        ('{"preset": "nope"}', 'mine.json: "preset": expected one of'),
        ('{"ranker.heads": 5}', "expected ranker.heads that divide encoder.width 64, got 5"),
        ("[" * 100_000, "nested"),
    ],
)  # fmt: skip
def test_a_preset_file_is_refused_by_name(text, named, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"^--preset: .*{named}") as refused:
        preset(str(file))
    assert ".json: " in str(refused.value)


# -- hyper-parameters ------------------------------------------------------------------------------------------
def test_a_search_draws_only_what_its_preset_takes():
    assert default_space(shop()) == SPACE
    assert set(SPACE) - set(default_space(PRESETS["news"]())) == {"retrieval.label_smoothing"}
    for values, message in (
        ([1, 3], "whole number"),
        ([1, 2**30, "int"], "x <= "),
        ([1, 2, 0, "choice"], "got 0"),
        ([False, True], "numbers"),
    ):
        with pytest.raises(ValueError, match=f"hyper-parameter space: encoder.layers.*{message}"):
            check_values("encoder.layers", values, shop())


def test_a_drawn_value_that_nothing_reads_is_left_out():
    space = {"encoder.family": ["gru", "choice"], "encoder.ffn_factor": [1, 3, "int"]}
    trial = optuna.trial.FixedTrial({"encoder.family": "gru", "encoder.ffn_factor": 3})
    made = drawn(trial, space, shop())  # type: ignore[arg-type]
    assert (made.encoder.family, made.encoder.ffn_factor) == ("gru", shop().encoder.ffn_factor)


def test_a_part_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"Preset.encoder: expected EncoderConfig, got namespace\(width=3"):
        Preset(encoder=types.SimpleNamespace(width=3))  # type: ignore[arg-type]
