"""Which events no person sends, by hand, and what a log teaches of a person's minute."""

from __future__ import annotations

import numpy as np
import pytest

from vivace import suspects
from vivace.limits import CountLimits, Limiter
from vivace.suspects import AHEAD_MS, FLOOR, SUSPECT_MS, Suspects, most_a_minute

SECOND = 1_000
NOW = 1_700_000_000_000


def test_an_account_is_suspect_from_the_first_event_too_many_until_it_was_quiet():
    of = Suspects(3)
    assert [bool(of.why("a", NOW + n * SECOND)) for n in range(6)] == [False] * 3 + [True] * 3
    assert not of.why("b", NOW)
    assert of.why("a", NOW + 70 * SECOND)  # one a minute, but it is still suspect
    assert not of.why("a", NOW + 5 * SECOND + SUSPECT_MS)
    slow = Suspects(3)
    assert not any(slow.why("a", NOW + 20 * SECOND * n) for n in range(100))


def test_the_time_that_an_event_claims_buys_nothing():
    of, claimed = Suspects(3), NOW - 86_400 * SECOND * np.arange(6)
    assert [bool(of.why("a", int(time), NOW)) for time in claimed] == [False] * 3 + [True] * 3
    assert "ahead" in of.why("b", NOW + AHEAD_MS + SECOND, NOW) and not of.why("b", NOW + AHEAD_MS, NOW)
    assert "ahead" in Suspects(0).why("b", NOW + 2 * AHEAD_MS, NOW)


def test_a_suspect_event_does_not_count():
    limiter = Limiter(CountLimits(minute_events=2))
    assert limiter.mask("aaab", [1, 2, 3, 3], [NOW] * 4).tolist() == [True, True, False, True]
    assert not Limiter(CountLimits()).counts("a", 1, NOW + 2 * AHEAD_MS, NOW)


def test_a_person_s_minute_is_learned_from_the_log():
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(500), 40)
    times = NOW + rng.integers(0, 10**9, len(users))
    busy = np.concatenate([users, np.full(20, 7)]), np.concatenate([times, NOW + np.arange(20) * 2_999])
    shuffled = rng.permutation(len(busy[0]))
    assert most_a_minute(users, times) == FLOOR == most_a_minute(users[:0], times[:0])
    learned = most_a_minute(busy[0][shuffled], busy[1][shuffled])
    assert 3 * 19 <= learned <= 3 * 20  # nearly the busiest of 500
    one_bot = np.concatenate([np.repeat(np.arange(100_000), 2), np.zeros(5_000, int)])
    assert most_a_minute(one_bot, np.concatenate([NOW + np.arange(200_000) * 10**6, np.full(5_000, NOW)])) == FLOOR


@pytest.mark.parametrize("most", [0, 5])
def test_accounts_that_are_quiet_are_forgotten(monkeypatch, most):
    monkeypatch.setattr(suspects, "PRUNE", 50)
    of = Suspects(most)
    assert not any(of.why(n, NOW + n * 10 * SECOND) for n in range(2_000))
    assert len(of._accounts) <= 51
