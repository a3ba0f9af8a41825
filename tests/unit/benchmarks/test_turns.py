"""Turns, spreads and agreements of answers, by hand."""

from __future__ import annotations

import contextlib

import pytest

from benchmarks.answers import agreement, differing
from benchmarks.peers import compare
from benchmarks.peers.compare import Row, by_system, systems_of, take_turns
from benchmarks.turns import in_turns, medians, spread, with_spread


def test_every_system_has_its_turn_and_each_begins_once():
    assert list(in_turns(3, ["a", "b", "c"])) == [
        (0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a"), (2, "c"), (2, "a"), (2, "b"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="--turns"):
        list(in_turns(0, ["a"]))


def test_the_spread_is_of_the_turns():
    rates = spread([885, 1142, 618])
    assert rates == {"median": 885, "least": 618, "largest": 1142, "turns": [885, 1142, 618]}
    assert with_spread(rates) == "885 (618 to 1142)"
    assert medians([{"a": 1.0, "b": 9.0}, {"a": 3.0, "b": 7.0}]) == {"a": 2.0, "b": 8.0}


def test_places_are_compared_in_order_and_ties_may_change():
    items, scores = ["a", "b", "c", "d"], [4.0, 3.0, 3.00001, 1.0]
    assert differing(items, scores, ["a", "b", "c"]) == (0, 0)
    assert differing(items, scores, ["a", "c", "b"]) == (2, 0)  # one score
    assert differing(items, scores, ["b", "a", "c"]) == (0, 2)  # the same set, and wrong
    assert differing(items, scores, ["a", "b", "x"]) == (0, 1)
    assert differing(items, [4.0, 3.0, 1.0, 1.0], ["a", "b", "d"]) == (1, 0)  # a tie across the end
    assert differing(items, scores, ["a", "a", "c"])[1] == 2  # an item twice: not in its place, and one too many


def test_the_same_sets_in_another_order_do_not_agree():
    expected = [(["a", "b", "c"], [3.0, 2.0, 1.0])] * 4
    same = agreement(expected, [["a", "b"], ["b", "a"], ["a"], ["a", "b", "c"]], 2)
    assert (same.answers, same.answers_equal, same.places, same.places_tied, same.places_wrong) == (4, 2, 8, 0, 3)
    assert same.share == pytest.approx(5 / 8)
    assert agreement(expected[:1], [[]], 2).places_wrong == 2


def row(system: str, turn: int, knee: float, cpu_ms: float) -> Row:
    return Row(system, turn, 1.0, 2.0, knee, cpu_ms, 100.0, [])


def test_ratios_are_of_the_same_turn():
    ours = "Vivace, fused"
    rows = [row(ours, 0, 100, 1), row("peer", 0, 100, 1), row("peer", 1, 50, 4), row(ours, 1, 80, 2)]
    figures = by_system([*rows, row("lame", 0, 0, float("nan"))], ours)
    assert figures["peer"]["rate_ratio"]["turns"] == [1.0, 1.6] and figures["peer"]["cpu_ratio"]["turns"] == [1.0, 2.0]
    assert figures["peer"]["knee"]["median"] == 75 and "rate_ratio" not in figures["lame"]


def test_a_peer_that_fails_costs_its_own_row_alone(monkeypatch):
    measured = []
    monkeypatch.setattr(compare, "measure", lambda system, turn, served, slo, seconds, last: (
        measured.append((system, last)) or row(system, turn, 100 + turn, 1)
    ))  # fmt: skip

    @contextlib.contextmanager
    def starts():
        yield None

    @contextlib.contextmanager
    def fails():
        raise OSError("no such peer")
        yield

    checks = []
    systems = {"Vivace, fused": starts, "lame": fails, "peer": starts}
    rows, failed = take_turns(systems, 2, lambda system, served: checks.append(system), 20, 1)
    assert {(r.system, r.turn) for r in rows} == {(s, t) for s in ("Vivace, fused", "peer") for t in (0, 1)}
    assert failed == {"lame": "OSError: no such peer"} and checks == ["Vivace, fused", "peer"]
    assert measured[2:] == [("peer", 100.0), ("Vivace, fused", 100.0)]  # the second turn begins with another
    with pytest.raises(OSError, match="no such peer"):
        take_turns({"Vivace, fused": fails}, 1, lambda system, served: None, 20, 1)


def test_systems_are_chosen_by_name(tmp_path):
    names = list(systems_of(tmp_path, ["fused"], [], tmp_path))
    assert names[:2] == ["Vivace, untuned ensemble", "Vivace, fused"]
    assert "Merlin Systems, its export with a Python stage in libtorch's place" in names
    assert list(systems_of(tmp_path, ["fused"], ["fused", "by hand"], tmp_path)) == ["Vivace, fused", "Merlin, by hand"]
    with pytest.raises(ValueError, match=r"--only.*Merlin, by hand.*got 'merlyn'"):
        systems_of(tmp_path, ["fused"], ["merlyn"], tmp_path)
    with pytest.raises(ValueError, match="one of ours"):
        systems_of(tmp_path, ["fused"], ["by hand"], tmp_path)
