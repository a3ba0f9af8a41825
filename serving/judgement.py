"""How a version is tried, and what it has to go for: the plan of a rollout, and the judgements of what both counted."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import ClassVar

from prometheus_client import Metric

from serving.acceptance import LEAST
from serving.compared import Clicks, Side, shift
from serving.door.rollout import Split
from vivace import contract

SURE = 3.0  # standard errors that a share must be beyond chance


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a version is tried."""

    version: int
    salt: str
    """Deals the users; another salt, other users."""
    shares: tuple[float, ...] = (0.05,)
    """Of the users, one step after the other, below 1: the others are what it is compared with. 0 in the first: copies
    alone, at a low priority."""
    wait_s: float = 600.0
    """How long a step lasts at least; it goes on until ``least`` calls came as well."""
    promote: bool = False
    """After the last step the version is served to everyone; else that waits for a word."""
    shadow: float = 0.0
    """Of all other calls the version gets a copy of this share; nobody sees its answers."""
    interleave: bool = False
    """The version's users are answered from its ranking and the served one's, drafted by teams."""
    least: int = 50
    """Calls in the last 30 s that a judgement needs."""
    more_errors: float = 0.01
    """Share of calls that may fail beyond those of the served version."""
    slower: float = 1.5
    """Times the served version's mean time that a call may take, where that is more than 2 ms longer."""
    more_empty: float = 0.01
    """Share of users whose last answer may be without an item, beyond the served version's."""
    drift: float = 3.0
    """How far the median score of the first item may lie from the served version's, in its spreads; 0: not judged."""
    least_quality: float = LEAST
    """Share of the served version's NDCG@10 on recorded requests that it must have before any user gets it; 0: any."""
    more_partial: float = 0.05
    """Share of answers that may be less than whole, or for want of a known history, beyond the served version's."""

    def __post_init__(self) -> None:
        Split(self.salt, 0.0)
        steps = ", ".join(f"{100 * share:.4g}" for share in self.shares) or "none"
        if not self.shares or not all(0 <= share < 1 for share in self.shares) or not self.shares[-1]:
            raise ValueError(
                f"shares: expected steps below 100 % of the users, the last above 0, got {steps}: the version is "
                "compared with the others"
            )
        if list(self.shares) != sorted(self.shares):
            raise ValueError(f"shares: expected each step to be as large as the one before, got {steps} % of the users")
        if self.shares.count(0) > 1:
            raise ValueError(f"shares: expected one step of 0 % of the users at most, the first, got {steps}")
        if not self.shares[0] and not self.shadow:
            raise ValueError(
                f"shares: expected copies (--shadow above 0) with a first step of 0 % of the users, which is one of "
                f"copies alone, got steps of {steps} % and none; or leave the 0 out"
            )
        least_quality, limits = self.least_quality, ("more_errors", "more_empty", "more_partial", "drift", "slower")
        if not 0 <= least_quality <= 1:
            raise ValueError(f"least_quality: expected a share from 0 to 1, got {least_quality}")
        for name in ("wait_s", "shadow", *limits):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.interleave and self.shadow:
            raise ValueError(
                "--interleave, --shadow: expected one of them; copies are compared with a version's own answers"
            )
        if self.shadow > 1 or self.slower < 1 or self.least < 1:
            raise ValueError(
                f"expected a shadow of at most 1, slower of at least 1 and least of at least 1, got {self.shadow:g}, "
                f"{self.slower:g}, {self.least}"
            )


@dataclass(frozen=True)
class Sample:
    """What a server has counted since it began, of ``recommend``: calls, those of them that failed, seconds that the
    others took; rows answered, those that were not answered whole."""

    COUNTED: ClassVar = ("nv_inference_request_success", "nv_inference_request_failure",
                         "nv_inference_request_duration_us", "vivace_answers_total")  # fmt: skip
    """How the names of the samples begin that it reads of a page."""

    calls: float = 0.0
    failed: float = 0.0
    seconds: float = 0.0
    rows: float = 0.0
    partial: float = 0.0

    def __sub__(self, earlier: Sample) -> Sample:
        before = asdict(earlier)
        return Sample(**{name: max(value - before[name], 0.0) for name, value in asdict(self).items()})

    def __add__(self, other: Sample) -> Sample:
        more = asdict(other)
        return Sample(**{name: value + more[name] for name, value in asdict(self).items()})

    @property
    def mean_ms(self) -> float:
        return 1000 * self.seconds / max(self.calls - self.failed, 1)

    @classmethod
    def of(cls, families: list[Metric]) -> Sample:
        """Of a tritonserver's page of metrics."""
        done = failed = seconds = rows = partial = 0.0
        for sample in (s for family in families for s in family.samples):
            of_model = sample.labels.get("model") == contract.ENSEMBLE
            if sample.name == "nv_inference_request_success_total" or sample.name == "nv_inference_request_success":
                done += sample.value * of_model
            elif sample.name.startswith("nv_inference_request_failure"):
                failed += sample.value * of_model
            elif sample.name.startswith("nv_inference_request_duration_us"):
                seconds += sample.value * of_model / 1e6
            elif sample.name == "vivace_answers_total":
                rows += sample.value
                partial += sample.value * (sample.labels.get("how") != "full")
        return cls(done + failed, failed, seconds, rows, partial)


def beyond(part: float, whole: float, part_of_served: float, whole_of_served: float) -> tuple[float, float]:
    """(difference of two shares, in standard errors too, by the share of both together)."""
    if not whole or not whole_of_served:
        return 0.0, 0.0
    more = part / whole - part_of_served / whole_of_served
    both = (part + part_of_served) / (whole + whole_of_served)
    error = math.sqrt(both * (1 - both) * (1 / whole + 1 / whole_of_served))
    return more, more / error if error else 0.0


def fault(plan: Plan, trial: Sample, served: Sample) -> str:
    """Why a version on trial has to go, by what both counted in the same seconds; "" where it may stay."""
    if trial.failed + trial.rows < plan.least or served.failed + served.rows < plan.least:
        return ""
    more, errors = beyond(trial.failed, trial.calls, served.failed, served.calls)
    if more > plan.more_errors and errors > SURE:
        return (
            f"{trial.failed:.0f} of {trial.calls:.0f} calls failed, of the served version {served.failed:.0f} of "
            f"{served.calls:.0f}"
        )
    more, errors = beyond(trial.partial, trial.rows, served.partial, served.rows)
    if more > plan.more_partial and errors > SURE:
        return (
            f"{trial.partial:.0f} of {trial.rows:.0f} answers were not whole, of the served version "
            f"{served.partial:.0f} of {served.rows:.0f}"
        )
    return ""


def slowness(plan: Plan, trial: Sample, served: Sample) -> str:
    """The same of its time: of a single second it says little, as a machine is busy now and then."""
    if trial.rows < plan.least or served.rows < plan.least:
        return ""
    times = plan.slower + plan.interleave  # a draft is made of both versions' answers
    if trial.mean_ms > max(times * served.mean_ms, served.mean_ms + 2.0):
        return f"a call takes {trial.mean_ms:.1f} ms, and {served.mean_ms:.1f} ms in the served version"
    return ""


def unlike(plan: Plan, trial: Side, served: Side) -> str:
    """The same of what it answers, by users' last answers: nothing at all, or with scores of another kind."""
    if trial.users < plan.least or served.users < plan.least:
        return ""
    more, errors = beyond(trial.empty, trial.users, served.empty, served.users)
    if more > plan.more_empty and errors > SURE:
        return (
            f"{trial.empty} of {trial.users} users' answers were empty, of the served version {served.empty} of "
            f"{served.users}"
        )
    more, errors = beyond(trial.no_numbers, trial.users, served.no_numbers, served.users)
    if more > plan.more_empty and errors > SURE:
        return f"{trial.no_numbers} of {trial.users} users' answers had scores that are no numbers"
    moved = shift(trial, served)
    if plan.drift and min(len(trial.scores), len(served.scores)) >= plan.least and abs(moved) > plan.drift:
        return (
            f"the median score of the first item is {trial.median:.4g}, and {served.median:.4g} in the served version: "
            f"{moved:+.1f} of its spreads"
        )
    return ""


def disliked(plan: Plan, clicks: Clicks) -> str:
    """The same of what users click, where it is clearly worse, however often one looks."""
    if plan.interleave:
        won = clicks.preference
        lost = won.high < 0.5
        return f"it won {won.share:.1%} of the requests that either version won, at most {won.high:.1%}" if lost else ""
    if clicks.comparison.high < 0:
        return (
            f"{clicks.tried.value:.4f} clicks a shown item, and {clicks.served.value:.4f} in the served version: "
            f"{clicks.comparison.lift:+.1%}, at most {clicks.comparison.high:+.1%}"
        )
    return ""
