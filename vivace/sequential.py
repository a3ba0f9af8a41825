"""Confidence that may be looked at every hour: intervals that hold at all looks together, whenever one stops.

The difference of two arms is the logarithm of a ratio of rates, with the variance of an estimate that is clustered by
user; what is accumulated is its information, 1 / variance. The interval is the normal mixture's confidence sequence
(Robbins 1970; Waudby-Smith et al. 2021, "Time-uniform central limit theory and asymptotic confidence sequences", eq. 5
and appendix B.2), the p-value its inverse: the mixture sequential probability ratio test (Johari et al. 2017).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

ODDS = 4.0  # times a ratio of CTRs' logarithm, that of the odds that clicks prefer a version by (benchmarks.population)
MOST_EFFECT = 0.99
LEAST_USERS, LEAST_CLICKING = 100, 20  # of each arm: below them a normal approximation is none


@dataclass(frozen=True)
class Rate:
    """A ratio of sums over users, such as clicks over shown items. ``variance``: of the rate, clustered by user."""

    value: float
    variance: float
    users: int
    above_zero: int
    """Users whose numerator is not 0."""

    @classmethod
    def of(cls, numerator: np.ndarray, denominator: np.ndarray) -> Rate:
        """Of users' sums, float [users]; a user whose denominator is 0 counts for nothing."""
        there = denominator > 0
        users, total = int(there.sum()), float(denominator.sum())
        if not users:
            return cls(math.nan, math.inf, 0, 0)
        value = float(numerator.sum()) / total
        residual = numerator - value * denominator
        variance = float(residual @ residual) / total**2 * users / max(users - 1, 1)
        return cls(value, variance, users, int(np.count_nonzero(numerator)))

    @property
    def is_enough(self) -> bool:
        return self.users >= LEAST_USERS and self.above_zero >= LEAST_CLICKING


@dataclass(frozen=True)
class Plan:
    """What an experiment is to find: a relative ``effect`` (0.03: 3 % up or down), with error ``alpha`` at all looks
    together and ``power``. It is chosen before the first look, and the intervals are narrowest where it is found."""

    effect: float = 0.03
    alpha: float = 0.05
    power: float = 0.8

    def __post_init__(self) -> None:
        for name, value in (("effect", self.effect), ("alpha", self.alpha), ("power", self.power)):
            if not 0 < value < 1:
                raise ValueError(f"experiment, {name}: expected a number between 0 and 1, got {value!r}")

    @property
    def _tuning(self) -> float:
        return -2 * math.log(self.alpha) + math.log(1 - 2 * math.log(self.alpha))

    @property
    def information(self) -> float:
        """Information at which the effect is found with ``power``."""
        c = 1 / self._tuning
        boundary = math.sqrt((1 + c) * math.log((1 + c) / (c * self.alpha**2)))
        return ((boundary + NormalDist().inv_cdf(self.power)) / math.log1p(self.effect)) ** 2

    @property
    def scale(self) -> float:
        """Of the mixture, in units of information."""
        return self.information / self._tuning

    def radius(self, variance: float) -> float:
        """Half of the interval's width, of the logarithm of the ratio."""
        information, scale = 1 / variance, self.scale
        joint = information + scale
        return math.sqrt(joint * math.log(joint / (scale * self.alpha**2))) / information

    def p_value(self, value: float, variance: float) -> float:
        """The least error at which ``value`` is told from 0; of all looks so far the smallest counts."""
        information, scale = 1 / variance, self.scale
        joint = information + scale
        log_evidence = 0.5 * math.log(scale / joint) + (value * information) ** 2 / (2 * joint)
        return math.exp(-max(log_evidence, 0.0))


@dataclass(frozen=True)
class Comparison:
    """A rate beside the control's. ``lift``: relative, 0.03 is 3 % more; ``low`` and ``high`` bound it at all looks
    together; NaN and infinite where there is too little to say. ``users_needed``: of both arms in all, more than there
    are, until the plan's effect is found with its power."""

    lift: float
    low: float
    high: float
    p_value: float
    users_needed: int

    @property
    def differs(self) -> bool:
        return self.low > 0 or self.high < 0

    @property
    def verdict(self) -> str:
        return "better" if self.low > 0 else "worse" if self.high < 0 else "no difference seen"


UNKNOWN = Comparison(math.nan, -1.0, math.inf, 1.0, -1)


def _hardly_clicked(control: Rate, treatment: Rate, plan: Plan) -> Comparison:
    """A logarithm says nothing of a few clicks, and they say nothing of their variance: the difference itself, with the
    variance that as many of the control's users have."""
    if control.above_zero / control.users * treatment.users < LEAST_CLICKING:
        return UNKNOWN
    lift = treatment.value / control.value - 1
    variance = control.variance / control.value**2 * (1 + control.users / treatment.users)
    if variance <= 0:
        return UNKNOWN
    radius, users = plan.radius(variance), control.users + treatment.users
    needed = max(0, math.ceil(users * (plan.information * variance - 1)))
    return Comparison(lift, max(lift - radius, -1.0), lift + radius, plan.p_value(lift, variance), needed)


def compare(control: Rate, treatment: Rate, plan: Plan) -> Comparison:
    """``treatment`` beside ``control``; UNKNOWN where either has too few users or clicks. Where the treatment alone has
    too few clicks, and as many of the control's users would have enough, that says how much less it gets."""
    if not control.is_enough or treatment.users < LEAST_USERS:
        return UNKNOWN
    if not treatment.is_enough:
        return _hardly_clicked(control, treatment, plan)
    difference = math.log(treatment.value / control.value)
    variance = control.variance / control.value**2 + treatment.variance / treatment.value**2
    return _judged(difference, variance, control.users + treatment.users, plan)


def _judged(difference: float, variance: float, users: int, plan: Plan) -> Comparison:
    """Of the logarithm of a ratio of rates, an estimate of as many users."""
    if variance <= 0:
        return UNKNOWN
    radius = plan.radius(variance)
    needed = max(0, math.ceil(users * (plan.information * variance - 1)))
    low, high = (math.expm1(min(difference + side, 700.0)) for side in (-radius, radius))
    return Comparison(math.expm1(difference), low, high, plan.p_value(difference, variance), needed)


def drafted(net: np.ndarray, clicks: np.ndarray, plan: Plan) -> Comparison:
    """One interleaved version beside another. ``net``: of each user the clicks by which it is ahead, by estimate, and
    ``clicks`` those on the drafts, float [users]. Their ratio is the difference of two CTRs over their mean, which is
    the logarithm of their ratio but for its cube / 12. UNKNOWN where too few users clicked."""
    rate = Rate.of(net, clicks)
    if rate.users < LEAST_USERS:
        return UNKNOWN
    return _judged(rate.value, rate.variance, rate.users, plan)


@dataclass(frozen=True)
class Preference:
    """Of the requests that either of two interleaved versions won, the share that the one on trial did. ``low`` and
    ``high`` bound it at all looks together; NaN and 0 to 1 where there is too little to say. ``users_needed``: more
    users with such a request than there are, until the odds that the plan's effect comes to are found."""

    share: float
    low: float
    high: float
    p_value: float
    users_needed: int

    @property
    def differs(self) -> bool:
        return self.low > 0.5 or self.high < 0.5

    @property
    def verdict(self) -> str:
        return "better" if self.low > 0.5 else "worse" if self.high < 0.5 else "no difference seen"


def preferred(won: np.ndarray, decided: np.ndarray, plan: Plan) -> Preference:
    """``won`` of ``decided`` requests of each user, float [users]. Beside 1/2 the logarithm of the odds is four times
    the distance to it, which is what is bounded: as an A/B's logarithm of a ratio, by the plan of the odds that the
    plan's effect comes to (``ODDS``)."""
    plan = replace(plan, effect=min(math.expm1(ODDS * math.log1p(plan.effect)), MOST_EFFECT))
    rate = Rate.of(won, decided)
    if rate.users < LEAST_USERS or rate.variance <= 0:
        return Preference(math.nan, 0.0, 1.0, 1.0, -1)
    distance, variance = 4 * (rate.value - 0.5), 16 * rate.variance
    radius = plan.radius(variance) / 4
    needed = max(0, math.ceil(rate.users * (plan.information * variance - 1)))
    low, high = max(rate.value - radius, 0.0), min(rate.value + radius, 1.0)
    return Preference(rate.value, low, high, plan.p_value(distance, variance), needed)
