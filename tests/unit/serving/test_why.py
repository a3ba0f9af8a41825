"""Reasons in words."""

from __future__ import annotations

import math

import pytest

from serving.runtime.why import Because, Reason, sentence

TITLES = {"a": "Lamp", "b": "Desk", "c": ""}


@pytest.mark.parametrize(
    ("drops", "smallest", "english", "chinese"),
    [
        ({}, (), "no single part of the history decides", "并非由某一条历史决定"),
        ({"a": 2.0, "b": 0.1}, (), "because of Lamp", "因为您看过Lamp"),
        ({"a": 2.0, "b": 0.6, "c": 0.6}, (), "because of Lamp and Desk", "因为您看过Lamp和Desk"),
        ({"c": math.inf, "b": 1.0}, ("c",), "because of c; would not be shown without c", "因为您看过c; 若没有c则不会推荐"),
        (
            {"a": 2.0}, ("a", "b", "c"), "because of Lamp; would not be shown without Lamp, Desk and c",
            "因为您看过Lamp; 若没有Lamp、Desk和c则不会推荐",
        ),
    ],
)  # fmt: skip
def test_words_say_what_was_computed(drops, smallest, english, chinese):
    of = Because("x", 1, 1.0, tuple(Reason(item, drop, 2) for item, drop in drops.items()), smallest)
    assert sentence(of, TITLES) == english
    assert sentence(of, TITLES, "zh") == chinese
