"""Configs refuse a wrong value when they are made, and say what is allowed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from vivace.checks import check_fields, check_minimum, check_positive, check_shares


@dataclass(frozen=True, kw_only=True)
class Config:
    colour: Literal["red", "blue"] = "red"
    steps: tuple[Literal["one", "two"], ...] = ("one",)
    count: int = 1
    rate: float = 0.5
    name: str = ""
    quiet: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_shares(self, "rate")
        check_minimum(self, 1, "count")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"colour": "green"}, r"Config.colour: expected one of \['red', 'blue'\], got 'green'"),
        ({"steps": ("one", "three")}, r"Config.steps: expected some of \['one', 'two'\], got \('one', 'three'\)"),
        ({"steps": "one"}, "Config.steps: expected some of"),
        ({"count": "3"}, "Config.count: expected a whole number, got '3'"),
        ({"count": 1.5}, "Config.count: expected a whole number"),
        ({"count": True}, "Config.count: expected a whole number"),
        ({"rate": None}, "Config.rate: expected a finite number"),
        ({"rate": float("nan")}, "Config.rate: expected a finite number"),
        ({"quiet": 1}, "Config.quiet: expected true or false"),
        ({"name": 3}, "Config.name: expected a text"),
        ({"rate": 1.0}, "Config.rate: expected 0 <= x < 1, got 1.0"),
        ({"count": 0}, "Config.count: expected at least 1, got 0"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_expected(values, message):
    with pytest.raises(ValueError, match=message):
        Config(**values)


def test_what_fits_is_taken():
    config = Config(colour="blue", steps=("two", "one"), count=3, rate=0, name="a", quiet=True)
    assert config.rate == 0 and Config(steps=()).steps == ()
    check_positive(config, "count")
    with pytest.raises(ValueError, match="expected a number above 0, got 0"):
        check_positive(config, "rate")
