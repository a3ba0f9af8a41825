"""Team draft: who picks what, that the coin favours nobody, and that the clicks speak for the better ranking."""

from __future__ import annotations

import numpy as np
import pytest

from serving.runtime.interleaved import both_rules
from serving.runtime.team_draft import chances, coins, draft, winner


def test_a_draft_by_hand():
    begins = coins("r", 2)
    drafted = draft(list("abcd"), list("badx"), 4, "r")
    expected = {
        (0, 0): ("abcd", [0, 1, 0, 1], [0, 0, 2, 2]),
        (0, 1): ("abdc", [0, 1, 1, 0], [0, 0, 2, 2]),
        (1, 0): ("bacd", [1, 0, 0, 1], [0, 0, 2, 2]),
        (1, 1): ("badc", [1, 0, 1, 0], [0, 0, 2, 2]),
    }[begins[0], begins[1]]
    assert ("".join(drafted.items), drafted.teams, drafted.places) == expected
    assert draft(list("abcd"), list("badx"), 4, "r") == drafted  # the id alone says what was drawn
    assert draft(list("ab"), list("abcde"), 9, "r").items[2:] == list("cde")  # one is at its end, the other goes on
    assert draft(list("aab"), [], 9, "r").items == ["a", "b"] and draft([], [], 3, "r").items == []


@pytest.mark.parametrize("count", [1, 7, 10])
def test_each_pick_is_the_best_that_is_left_and_no_team_is_more_than_one_ahead(count):
    rng = np.random.default_rng(3)
    for number in range(300):
        rankings = [rng.permutation(12)[:count].tolist() for _ in range(2)]
        drafted = draft(*rankings, count, f"r{number}")
        assert len(set(drafted.items)) == len(drafted.items) == count
        for place, (item, team, at) in enumerate(zip(drafted.items, drafted.teams, drafted.places, strict=True)):
            left = [other for other in rankings[team] if other not in drafted.items[:place]]
            assert left[0] == item == rankings[team][at]
            ahead = drafted.teams[: place + 1].count(0) - drafted.teams[: place + 1].count(1)
            assert abs(ahead) <= 1 and (ahead == 0 or place % 2 == 0)


def test_each_team_picks_first_half_of_the_time_whatever_the_ids_and_the_place():
    drawn = np.array([coins(f"request-{number}", 5) for number in range(20_000)])
    assert drawn.mean(0) == pytest.approx(np.full(5, 0.5), abs=0.014)  # 4 standard errors
    assert np.abs(np.corrcoef(drawn.T) - np.eye(5)).max() < 0.03  # a round says nothing of the next
    other = np.array([coins(f"request-{number}", 5, "salt") for number in range(20_000)])
    assert (drawn == other).mean() == pytest.approx(0.5, abs=0.01)  # another rollout, other coins


def wins(first, second, requests, appeal, rng) -> np.ndarray:
    """(won by the first, by the second) when each item is clicked by its appeal and its place is looked at less and
    less."""
    won = np.zeros(3, int)
    for number in range(requests):
        drafted = draft(first, second, 10, f"{rng.integers(1 << 62)}-{number}")
        clicked = rng.random(10) < appeal[drafted.items] / np.sqrt(np.arange(1, 11))
        won[1 + winner(drafted.teams, clicked.tolist())] += 1
    return won[[0, 2]]


def test_rankings_that_are_alike_win_alike_and_one_that_is_better_wins():
    rng, appeal = np.random.default_rng(11), np.linspace(0.6, 0.02, 40)
    best = list(range(10))
    shuffled = [int(item) for item in rng.permutation(10)]
    for first, second in ((best, best), (shuffled, shuffled[:4] + shuffled[:3:-1])):
        same = wins(first, second, 4_000, np.full(40, 0.2), rng)
        assert abs(same[0] / same.sum() - 0.5) < 3.5 * 0.5 / np.sqrt(same.sum())
    worse = [0, 20, 1, 25, 2, 30, 3, 35, 4, 5]
    lost = wins(worse, best, 1_000, appeal, rng)
    assert lost[1] / lost.sum() > 0.5 + 4 * 0.5 / np.sqrt(lost.sum())
    gained = wins(best, worse, 1_000, appeal, rng)  # whichever team it is
    assert gained[0] / gained.sum() > 0.5 + 4 * 0.5 / np.sqrt(gained.sum())


def test_a_place_that_shows_the_same_whichever_way_its_coin_falls_tells_nothing():
    drafted = draft(list("abcd"), list("abdc"), 4, "r")
    assert drafted.tells == [False, False, True, True]
    assert draft(list("abc"), list("axy"), 3, "r").tells == [False, True, True]
    assert draft(list("ab"), list("ab"), 2, "r").tells == [False, False]


@pytest.mark.parametrize("second", ["bcxyz", "axbyc", "xabcy", "abcyx"])
def test_clicks_by_chance_speak_for_no_team_whatever_the_rankings(second):
    """By all coins there are: at each place each team picked half of what is counted there."""
    of_coins = {tuple(coins(f"r{n}", 3)): draft(list("abxcd"), list(second), 5, f"r{n}") for n in range(400)}
    assert len(of_coins) == 8
    for place in range(5):
        lead = [(2 * d.teams[place] - 1) * d.tells[place] for d in of_coins.values()]
        assert sum(lead) == 0, (place, lead)


@pytest.mark.parametrize(
    ("second", "count"), [("bcxyz", 5), ("axbyc", 5), ("xabcy", 6), ("abxcd", 5), ("ab", 5), ("", 5), ("dcxba", 1)]
)
def test_chances_are_those_of_all_coins(second, count):
    first = list("abxcd")
    of_coins = {tuple(coins(f"r{n}", 3)): draft(first, list(second), count, f"r{n}").items for n in range(400)}
    assert len(of_coins) == 8
    expected = {item: [0.0] * count for items in of_coins.values() for item in items}
    for items in of_coins.values():
        for place, item in enumerate(items):
            expected[item][place] += 1 / 8
    assert chances(first, list(second), count) == expected


def test_who_got_more_clicks_wins_and_a_tie_says_nothing():
    teams = ["1", "2", "2", "1"]
    assert winner(teams, [True, False, False, False], "1") == -1
    assert winner(teams, [True, True, True, False], "1") == 1
    assert winner(teams, [True, False, True, False], "1") == winner(teams, [False] * 4, "1") == 0


def test_a_draft_names_the_rules_that_changed_either_version():
    def of(*status: str) -> np.ndarray:
        return np.array([s.encode() for s in status], object)

    tried = of("ok", "ok; rules: pin", "load: 50 candidates; rules: a, b", "ok")
    served = of("ok; rules: pin", "ok; rules: pin, cap", "load: 50 candidates", "ok")
    assert both_rules(tried, served).tolist() == [
        b"ok; rules: pin", b"ok; rules: pin, cap", b"load: 50 candidates; rules: a, b", b"ok",
    ]  # fmt: skip
    assert tried[0] == b"ok"
