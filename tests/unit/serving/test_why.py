"""Reasons in words and as a record."""

from __future__ import annotations

import json
import math

import pytest

from serving.runtime.variants import Part
from serving.runtime.why import Because, Reason, record, sentence
from vivace.explain_contract import CONTEXT, HISTORY, QUERY, TYPES, WORDS

TITLES = {"a": "Lamp", "b": "Desk", "c": ""}


@pytest.mark.parametrize(
    ("drops", "smallest", "english", "chinese"),
    [
        ({}, (), "no single part of the request decides", "并非由请求中的某一项决定"),
        ({"a": -2.0}, (), "no single part of the request decides", "并非由请求中的某一项决定"),
        ({"a": 2.0, "b": 0.1}, (), "because of Lamp", "因为您看过Lamp"),
        ({"a": 2.0, "b": 0.6, "c": 0.6}, (), "because of Lamp and Desk", "因为您看过Lamp和Desk"),
        ({"x": 2.0, "a": 1.0}, (), "because of x itself and Lamp", "因为您看过x和Lamp"),
        (
            {"c": math.inf, "b": 1.0}, ("c",), "because of c; would not be shown without c",
            "因为您看过c; 若没有c则不会推荐",
        ),
        (
            {"a": 2.0}, ("a", "b", "c"), "because of Lamp; would not be shown without Lamp, Desk and c",
            "因为您看过Lamp; 若没有Lamp、Desk和c则不会推荐",
        ),
    ],
)  # fmt: skip
def test_words_say_what_was_computed(drops, smallest, english, chinese):
    reasons = tuple(Reason(Part(HISTORY, item, events=1), drop, 2) for item, drop in drops.items())
    of = Because("x", 1, 1.0, reasons, smallest)
    assert sentence(of, TITLES) == english
    assert sentence(of, TITLES, "zh") == chinese


def test_words_name_what_is_no_history():
    phone, words = Reason(Part(CONTEXT, "device", "phone"), 2.0, 3), Reason(Part(QUERY, WORDS), 1.9, 2)
    of = Because("x", 1, 1.0, (phone, words), ())
    assert sentence(of, {}) == "because of device phone and the words of the query"
    assert sentence(of, {}, "zh") == "因为device为phone和搜索词本身"
    assert sentence(Because("x", 1, 1.0, (phone,), (), ruled=True), {}) == "shown by a business rule"
    fridge = Because("x", 1, 1.0, (Reason(Part(CONTEXT, "device", "fridge", unknown=True), 2.0, 3),), ())
    assert sentence(fridge, {}) == "because of a device that training did not know"
    assert sentence(fridge, {}, "zh") == "因为训练中没有的device"
    assert record(fridge, [], {})["reasons"][0]["unknown"] and "unknown" not in record(of, [], {})["reasons"][0]
    assert sentence(Because("x", 1, 1.0, (), (), popular=True), {}) == "it is popular"


def test_a_record_is_json_whatever_was_computed():
    lost = Reason(Part(HISTORY, "a", events=3), math.inf, 0)
    kind = Reason(Part(TYPES), -0.5, 1, (0.25, -0.125))
    of = json.loads(json.dumps(record(Because("x", 1, 1.0, (lost, kind), ("a",)), ["click", "buy"], TITLES)))
    assert of == {
        "reasons": [
            {"kind": "history", "events": ["a"], "count": 3, "effect": None, "heads": {}, "rank": None},
            {"kind": "types", "effect": -0.5, "heads": {"click": 0.25, "buy": -0.125}, "rank": 1},
        ],
        "smallest": ["a"],
        "sentence": "because of Lamp; would not be shown without Lamp",
    }
