"""Evidence of an experiment: figures by hand, and how often its intervals err on clicks whose truth is known."""

import math

import numpy as np
import pandas as pd
import pytest

from training.judge.clicks.places import examined, examined_in
from training.judge.counterfactual import UNIT, counterfactual
from vivace.columns import CLICKED, ITEM, POSITION, TIME, USER
from vivace.impressions.files import CONTEXT, QUERY, REQUEST_ID, VARIANT
from vivace.impressions.joined import PROPENSITY
from vivace.sequential import Plan, Rate, compare, preferred

SEEDS = 100


def test_a_rate_by_hand():
    rate = Rate.of(np.array([1.0, 0.0, 2.0, 0.0]), np.array([2.0, 2.0, 4.0, 0.0]))
    assert (rate.value, rate.users, rate.above_zero) == (3 / 8, 3, 2)
    # residuals 1 - 2r, -2r, 2 - 4r at r = 3/8: 0.25, -0.75, 0.5; their squares over 8 squared, times 3/2
    assert rate.variance == pytest.approx((0.0625 + 0.5625 + 0.25) / 64 * 1.5)


def test_an_interval_by_hand():
    plan = Plan(effect=0.03, alpha=0.05, power=0.8)
    tuning = 5.9915 + math.log(6.9915)  # -2 log 0.05 = 5.9915
    assert plan.scale == pytest.approx(plan.information / tuning, rel=1e-4)
    at_plan = plan.radius(1 / plan.information)  # there it is 3.036 standard errors, and power asks 0.842 more
    assert at_plan * math.sqrt(plan.information) == pytest.approx(3.036, abs=2e-3)
    assert at_plan + 0.8416 / math.sqrt(plan.information) == pytest.approx(math.log(1.03), rel=1e-4)
    # what the interval just tells from 0 has the p-value alpha, whatever was accumulated
    for variance in (1e-3, 1e-5):
        assert plan.p_value(plan.radius(variance), variance) == pytest.approx(0.05)


def clicks(rng: np.random.Generator, users: int, shown: np.ndarray, rate: float) -> np.ndarray:
    """Of users whose tastes differ: the chance of a click is theirs, Beta with the mean ``rate``."""
    return rng.binomial(shown, rng.beta(20 * rate, 20 * (1 - rate), users))


def test_looking_every_hour_calls_a_difference_where_there_is_none_in_at_most_5_of_100():
    users, hours, plan, called, naive = 600, 24 * 4, Plan(effect=0.1), 0, 0
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        taste = rng.beta(0.4, 3.6, (2, users))  # each comes again and again, with a taste that stays
        came = rng.poisson(0.4, (hours, 2, users))
        clicked = rng.binomial(5 * came, taste).cumsum(0).astype(float)
        shown = (5 * came).cumsum(0).astype(float)
        arms = [[Rate.of(clicked[h, arm], shown[h, arm]) for arm in (0, 1)] for h in range(hours)]
        called += any(compare(a, b, plan).differs for a, b in arms)
        naive += any(a.is_enough and b.is_enough and abs(a.value - b.value) > 1.96 * math.sqrt(a.variance + b.variance)
                     for a, b in arms)  # fmt: skip
    print(called, naive)
    assert called <= 5
    assert naive >= 15  # what a usual interval does to who looks every hour


def test_three_per_cent_are_seen_at_the_size_that_is_planned():
    plan, seen, shown = Plan(effect=0.03), 0, np.full(30_000, 20)
    for seed in range(50):
        rng = np.random.default_rng(seed)
        arms = [Rate.of(clicks(rng, len(shown), shown, rate), shown) for rate in (0.1, 0.103)]
        look = compare(*arms, plan)
        seen += look.verdict == "better"
        wrong = look.verdict == "worse"
        assert not wrong
    needed = look.users_needed + 2 * len(shown)
    assert 0.9 < needed / (2 * len(shown)) < 1.15  # the size that the plan asks for, with users like these
    print(needed, seen)
    assert seen >= 35, seen


def test_an_arm_that_nobody_clicks_is_called_worse_and_a_small_one_is_not():
    plan, shown = Plan(effect=0.1), np.full(400, 10.0)
    control = Rate.of(np.tile([0.0, 1.0, 0.0, 1.0], 100), shown)
    nothing = compare(control, Rate.of(np.zeros(400), shown), plan)
    # residuals of +-1/2 at a rate of 1/20: sqrt(400 / 399) / 200 of it, twice, as both are taken to vary so
    radius = plan.radius(2 * (20 * 0.5) ** 2 * 400 / 4000**2 * 400 / 399)
    assert nothing.lift == -1 and nothing.high == pytest.approx(-1 + radius) and nothing.verdict == "worse"
    assert compare(control, Rate.of(np.zeros(30), shown[:30]), plan).verdict == "no difference seen"  # few users
    rare = Rate.of(np.tile([0.0] * 19 + [1.0], 20), shown)
    assert rare.above_zero == 20
    few = compare(rare, Rate.of(np.zeros(300), shown[:300]), plan)  # 15 of the control's would have clicked
    assert math.isnan(few.lift)


def test_a_preference_by_hand():
    won = np.concatenate([np.full(60, 1.0), np.zeros(40), [0.0]])
    decided = np.concatenate([np.ones(100), [0.0]])  # who decided nothing counts for nothing
    seen, plan = preferred(won, decided, Plan(effect=0.1)), Plan(effect=1.1**4 - 1)  # of the odds
    variance = 0.6 * 0.4 / 99
    assert seen.share == 0.6 and seen.high - 0.6 == pytest.approx(plan.radius(16 * variance) / 4)
    assert seen.p_value == pytest.approx(plan.p_value(0.4, 16 * variance)) and seen.verdict == "no difference seen"
    assert seen.users_needed == math.ceil(100 * (plan.information * 16 * variance - 1))
    assert math.isnan(preferred(won[:99], decided[:99], Plan()).share)  # too few


@pytest.mark.parametrize("share", [0.5, 0.55], ids=["A/A", "better"])
def test_interleaving_looked_at_every_hour_errs_in_at_most_5_of_100_and_sees_what_is_better(share):
    users, plan, better, worse = 800, Plan(effect=0.1), 0, 0
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        taste = rng.beta(20 * share, 20 * (1 - share), users)  # each comes again and again, and prefers one of the two
        came = rng.poisson(0.2, (48, users))
        won = rng.binomial(came, taste).cumsum(0).astype(float)
        seen = [preferred(w, d, plan) for w, d in zip(won, came.cumsum(0).astype(float), strict=True)]
        better += any(look.low > 0.5 for look in seen)
        worse += any(look.high < 0.5 for look in seen)
    print(better, worse)
    assert better + worse <= 5 if share == 0.5 else (better >= 95 and worse == 0)


def test_how_often_a_place_is_looked_at_is_within_5_per_cent_of_what_was_planted():
    rng, looked = np.random.default_rng(1), np.array([1.0, 0.7, 0.5, 0.35])
    taste = rng.beta(1, 3, 60_000)  # of each user for each item, shown four times; the better it is the higher
    pair = np.repeat(np.arange(len(taste)), 4)
    place = np.clip(np.round(3 * (1 - taste[pair]) + rng.normal(0, 1, len(pair))), 0, 3).astype(int)
    clicked = rng.random(len(pair)) < looked[place] * taste[pair]
    assert examined(pair, place, clicked, 5)[:4] == pytest.approx(looked, rel=0.05)
    assert math.isnan(examined(pair, place, clicked, 5)[4])  # nothing was shown there


def test_places_are_compared_within_a_moment_alone(tmp_path):
    """A ranker that reads the device puts an item first where it is wanted, and second where it is not."""
    rng, looked, rows = np.random.default_rng(2), np.array([1.0, 0.5]), []
    for number in range(12_000):
        wanted, is_first = number % 2 == 0, rng.random() < (0.8 if number % 2 == 0 else 0.2)
        appeal = 0.5 if wanted else 0.1
        rows.append({
            REQUEST_ID: f"r{number}", VARIANT: "a", USER: f"u{number // 8}", TIME: 1000, QUERY: "",
            CONTEXT: '{"device": "phone"}' if wanted else "", ITEM: "x", POSITION: 2 - is_first,
            CLICKED: rng.random() < appeal * looked[1 - is_first],
        })  # fmt: skip
    pd.DataFrame(rows).to_parquet(tmp_path / "joined.parquet")
    assert examined_in(tmp_path / "joined.parquet", 2) == pytest.approx(looked, rel=0.06)
    of_one = pd.DataFrame(rows).assign(**{CONTEXT: ""})
    of_one.to_parquet(tmp_path / "joined.parquet")
    assert examined_in(tmp_path / "joined.parquet", 2)[1] < 0.4  # without the context it is off by far


def log_of(rng: np.random.Generator, requests: int) -> tuple[pd.DataFrame, pd.DataFrame, float]:
    """(what was shown, what another version would show, its clicks a shown item): eight items, two places; the log
    shows an item at a place by chance, the other version the two best in turn."""
    items, effect = 8, np.array([1.0, 0.6])
    appeal = np.linspace(0.05, 0.4, items)
    strength = np.exp(3 * appeal)
    order = np.argsort(-(3 * appeal + rng.gumbel(size=(requests, items))), axis=1)[:, :2]  # Plackett-Luce
    first = strength / strength.sum()
    joint = first[:, None] * first[None] / (1 - first[:, None])
    np.fill_diagonal(joint, 0)
    propensity = np.stack([first[order[:, 0]], joint.sum(0)[order[:, 1]]], 1)
    clicked = rng.random((requests, 2)) < appeal[order] * effect
    ids = np.repeat([f"r{i}" for i in range(requests)], 2)
    place = np.tile([1, 2], requests)
    shown = pd.DataFrame({REQUEST_ID: ids, UNIT: [f"u{i // 2 % (requests // 3)}" for i in range(2 * requests)],
                          ITEM: [f"i{i}" for i in order.ravel()], POSITION: place, CLICKED: clicked.ravel(),
                          PROPENSITY: propensity.ravel()})  # fmt: skip
    best = np.where(np.arange(requests)[:, None] % 2 == 0, [[7, 6]], [[6, 7]])
    other = pd.DataFrame({REQUEST_ID: ids, ITEM: [f"i{i}" for i in best.ravel()], POSITION: place})
    return shown, other, float((appeal[best] * effect).mean())


def test_the_other_version_by_hand():
    shown = pd.DataFrame({REQUEST_ID: ["a", "a", "b", "b"], UNIT: ["u", "u", "v", "v"], ITEM: list("xyyx"),
                          POSITION: [1, 2, 1, 2], CLICKED: [True, False, True, True],
                          PROPENSITY: [0.5, 0.5, 0.5, 0.25]})  # fmt: skip
    other = pd.DataFrame({REQUEST_ID: ["a", "a", "b", "b"], ITEM: list("xzzx"), POSITION: [1, 2, 1, 2]})
    estimate = counterfactual(shown, other)
    # weights 1 / 0.5, 0, 0, 1 / 0.25; two clicks on what both show, of four places
    assert estimate.ips.value == (2 + 4) / 4
    assert estimate.snips.value == 1
    assert estimate.support == 6 / 4
    assert estimate.effective == 36 / 20
    assert estimate.logged.value == 3 / 4


def test_the_doubly_robust_estimate_covers_the_truth_in_93_of_100():
    covered, widths = 0, []
    for seed in range(SEEDS):
        shown, other, truth = log_of(np.random.default_rng(seed), 1_500)
        estimate = counterfactual(shown, other, seed=seed)
        covered += estimate.doubly_robust.low <= truth <= estimate.doubly_robust.high
        widths.append(estimate.doubly_robust.high - estimate.doubly_robust.low)
    print(covered, np.median(widths))
    assert covered >= 93, covered
    assert np.median(widths) < 0.1  # it says something: the truth is near 0.3
