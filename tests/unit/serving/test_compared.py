"""From workers' answers over the real socket to what two versions answer side by side, and what a trial ends for."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from serving.compared import Clicks, Compared, Side, as_metrics, shift, stability
from serving.door.rollout import Split
from serving.judgement import Plan, disliked, unlike
from serving.runtime.answer_samples import MOST, AnswerSamples, Listener
from tests.support import wait_until
from vivace.impressions.queue import Drafts
from vivace.sequential import Plan as ClickPlan, Rate, compare, preferred
from vivace.store.interface import Event
from vivace.store.lmdb_store import LmdbStore

SPLIT = Split("s", 0.5)
USERS = [f"user {n}" for n in range(60)]
PLAN = Plan(version=2, salt="s", least=20)


@pytest.fixture
def listening(tmp_path):
    """(Compared, sampler of the served version, of the one on trial, store with the live events)."""
    store = LmdbStore(tmp_path / "store")
    path = tmp_path / "answers"
    samplers = [AnswerSamples(Listener(str(path), on_trial).to_json()) for on_trial in (False, True)]
    assert not samplers[0].on(), "nobody listens yet"
    put(samplers[0], "early", "u", "ab", 1.0)  # and nobody is hurt
    with Compared(path, SPLIT, 2, lambda: store, ClickPlan(0.1, 0.01)) as compared:
        wait_until(samplers[0].on, "a listener")
        yield compared, *samplers, store
    put(samplers[0], "late", "u", "ab", 1.0)


def put(sampler: AnswerSamples, request_id: str, who: str, items: str, score: float, teams: str = "") -> None:
    """One answer, handed over at once."""
    shown = np.array([[i.encode() for i in items] or [b""]], object)
    of = Drafts(np.array([list(teams)], object), (shown, shown)) if teams else None
    row = (who, "", b"", 1_000.0, "")
    sampler.put(request_id, [row], shown, np.full(shown.shape, score, np.float32), [b"ok"], 1_004.0, of)
    sampler.hand_over(at_once=True)
    time.sleep(0.005)  # of a datagram a few times a second none waits


def test_copies_are_compared_with_what_was_shown_and_users_answers_are_counted(listening):
    compared, served, trial, _ = listening
    for n, user in enumerate(USERS):
        if SPLIT.takes(user):
            put(trial, f"r{n}", user, "abcd" if n % 4 else "", 3.0)
        else:
            first, second = ((served, "abcd", 2.0), (trial, "abxy", 2.0 + n % 2))[:: 1 - 2 * (n % 2)]
            for sampler, items, score in (first, second):  # a copy may be answered before what it is of
                put(sampler, f"r{n}", user, items, score)
    others = [n for n, user in enumerate(USERS) if not SPLIT.takes(user)]
    copies = wait_until(lambda: compared.copies().compared == len(others) and compared.copies(), "all copies")
    assert (copies.overlap, copies.served_ms, copies.tried_ms) == (0.5, 4.0, 4.0)
    wait_until(lambda: compared.side(True).users == len(USERS), "all answers")
    assert compared.side(False).users == len(others) and compared.side(False).median == 2.0
    assert compared.side(True).empty == sum(SPLIT.takes(user) and not n % 4 for n, user in enumerate(USERS))
    put(trial, "again", USERS[0], "abcd", 3.0)  # the last answer of a user counts
    wait_until(lambda: compared.side(True).empty < 9 and compared.side(True).users == len(USERS), "an answer more")
    registry = CollectorRegistry()
    registry.register(type("One", (), {"collect": lambda self: as_metrics(compared)})())
    page = generate_latest(registry).decode()
    assert 'vivace_rollout_users{variant="trial"} 60.0' in page and "vivace_rollout_overlap 0.5" in page


def test_clicks_count_for_what_was_shown_to_those_who_saw_it(listening):
    compared, served, trial, store = listening
    mine, other = (next(u for u in USERS if SPLIT.takes(u) == takes) for takes in (True, False))
    put(trial, "r1", mine, "abcd", 1.0, teams="1221")
    put(served, "r2", other, "abcd", 1.0)
    put(trial, "r2", other, "xbcd", 1.0)  # a copy: nobody saw it
    put(served, "r3", mine, "abcd", 1.0)  # whom the trial's server could not answer
    wait_until(lambda: compared.copies().compared == 1, "answers")
    time.sleep(1.2)  # from now on events count
    clicks = [(mine, "r1", "b"), (mine, "r1", "b"), (mine, "r1", "z"), (other, "r2", "x"), (other, "r2", "a"),
              (mine, "r3", "a"), (mine, "r0", "a")]  # fmt: skip
    store.append([Event(u, i, "click", 1, f"e{n}", request_id=r) for n, (u, r, i) in enumerate(clicks)])
    seen = wait_until(lambda: compared.clicks().tried.value > 0 and compared.clicks(), "clicks")
    assert (seen.served.value, seen.tried.value) == (1 / 4, 1 / 4)
    assert compared._sums[2:, 1].sum(1).tolist() == [1, 1]  # a request that either version won, and this one did
    store.append([Event(mine, "a", "click", 2, "e8", request_id="r1")])
    wait_until(lambda: compared._sums[2:, 1].sum(1).tolist() == [0, 0], "a tie")
    store.append([Event(other, "c", "click", 3, "e9", request_id="r9")])
    time.sleep(1.2)  # a worker with little to do hands its answers over later than a click may come
    put(served, "r9", other, "abcd", 1.0)
    wait_until(lambda: compared.clicks().served.value == 2 / 8, "a click that came early")
    compared.step(Split("s", 0.9))
    assert compared.clicks().served.value == 2 / 8, "who counts on a side stays there at another step"


def test_two_servers_choose_the_same_requests_where_there_are_too_many(tmp_path):
    samplers = [AnswerSamples(Listener(str(tmp_path / "none"), on_trial).to_json()) for on_trial in (False, True)]
    chosen: list[set[str]] = []
    for sampler in samplers:
        items, scores = np.array([[b"a"]], object), np.ones((1, 1), np.float32)
        for turn in range(4):
            for n in range(200):
                sampler.put(f"{turn} {n}", [("u", "", b"", 1.0, "")], items, scores, [b"ok"], 2.0, None)
            assert len(sampler._waiting) <= MOST
            chosen.append({a.request_id for a in sampler._waiting})
            sampler.hand_over(at_once=True)
    assert chosen[3] == chosen[7] and 5 < len(chosen[3]) < MOST  # one in eight by now


SERVED = Side(users=1000, empty=2, scores=np.random.default_rng(1).normal(5, 2, 998))


def scored(mean: float, spread: float, users: int = 60) -> Side:
    return Side(users, 0, 0, np.random.default_rng(2).normal(mean, spread, users))


@pytest.mark.parametrize(
    ("trial", "why"),
    [
        (scored(5, 2), ""),
        (scored(9, 3), ""),  # another model, another scale
        (scored(14, 2), "the median score of the first item is"),
        (scored(-4, 0.1), "the median score of the first item is"),
        (scored(500, 1, users=19), ""),  # too few to judge by
        (replace(scored(5, 2), empty=4), "4 of 60 users' answers were empty, of the served version 2 of 1000"),
        (replace(scored(5, 2, 300), empty=1), ""),  # chance
        (replace(scored(5, 2), no_numbers=9), "9 of 60 users' answers had scores that are no numbers"),
    ],
    ids=["alike", "another scale", "higher", "lower", "few", "empty", "one empty", "no numbers"],
)
def test_what_answers_a_trial_ends_for(trial, why):
    assert unlike(PLAN, trial, SERVED).startswith(why) and bool(unlike(PLAN, trial, SERVED)) == bool(why)
    assert "score" not in unlike(replace(PLAN, drift=0.0), replace(trial, no_numbers=0), SERVED)


def test_shift_and_stability_by_hand():
    served, tried = Side(scores=np.arange(1.0, 101)), Side(scores=np.arange(11.0, 111))
    assert shift(tried, served) == pytest.approx(10 / (49.5 / 1.349))
    assert stability(served, served) == 0
    # none in the first tenth, twenty in the last, ten in each other; half a count in each for smoothing
    expected = (0.5 - 10.5) / 105 * math.log(0.5 / 10.5) + (20.5 - 10.5) / 105 * math.log(20.5 / 10.5)
    assert stability(tried, served) == pytest.approx(expected)
    alike = Side(scores=np.full(9, 2.0))
    assert shift(alike, alike) == 0 and abs(shift(Side(scores=np.full(9, 3.0)), alike)) > 100
    assert math.isnan(shift(Side(), served)) and math.isnan(stability(Side(), served))


@pytest.mark.parametrize(("rate", "interleave"), [(0.05, False), (0.1, False), (0.35, True), (0.5, True)])
def test_a_trial_ends_for_clicks_only_where_they_are_clearly_fewer(rate, interleave):
    rng, plan = np.random.default_rng(4), ClickPlan(0.1, 0.01)
    shown = np.full(2_000, 10.0)
    served, tried = (Rate.of(rng.binomial(10, p, 2_000).astype(float), shown) for p in (0.1, rate))
    won = preferred(rng.binomial(1, rate, 2_000).astype(float), np.ones(2_000), plan)
    why = disliked(replace(PLAN, interleave=interleave), Clicks(served, tried, compare(served, tried, plan), won))
    assert bool(why) == (rate in (0.05, 0.35)) and ("it won" in why) == (rate == 0.35)
