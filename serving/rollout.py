"""A version on trial: a share of the users gets it, step by step, and it goes by itself where it does worse.

What is compared is what the two tritonservers count themselves in the same seconds: refused and failed calls, the mean
time of a call, and answers that are not whole. Users are dealt by a hash (``serving.door.rollout``), so both see the
same kind of callers. Of rows the server's own questions are not counted; in the mean time of a call they are.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prometheus_client import Metric

from serving.acceptance import LEAST
from serving.compared import Clicks, Compared, Side, as_metrics, as_state, shift
from serving.door.rollout import Split
from serving.fleet import Accept, Fleet
from serving.merged_metrics import scraped
from serving.releases import version_of
from serving.rollout_steps import RolloutSteps
from serving.wheel import ServerError
from vivace import contract
from vivace.sequential import Plan as ClickPlan
from vivace.store.opening import open_store

LOOK_S = 1.0
WINDOW_S = 30.0
ILL_S, SHARDS_S = 3.0, 60.0  # a version on trial may be unwell for so long, and a shard of either
SLOW_S, SLOW_LOOKS = 10.0, 5  # slow it has to be over so many seconds, and at so many looks, one after the other
SURE = 3.0  # standard errors that a share must be beyond chance
WORSE, MISTAKEN = 0.1, 0.01  # clicks: what difference is looked for, the chance to end a version that is as good
KEPT = 50  # lines of what happened


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a version is tried."""

    version: int
    salt: str
    """Deals the users; another salt, other users."""
    shares: tuple[float, ...] = (0.05,)
    """Of the users, one step after the other, above 0 and below 1: the others are what it is compared with."""
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
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            raise ValueError(
                f"shares: expected shares above 0 and below 1, got {self.shares}: it is compared with others"
            )
        if list(self.shares) != sorted(self.shares):
            raise ValueError(f"shares: expected each step to be as large as the one before, got {self.shares}")
        least_quality, limits = self.least_quality, ("more_errors", "more_empty", "more_partial", "drift", "slower")
        if not 0 <= least_quality <= 1:
            raise ValueError(f"least_quality: expected a share from 0 to 1, got {least_quality}")
        for name in ("wait_s", "shadow", *limits):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.interleave and self.shadow:
            raise ValueError(
                "interleave, shadow: expected one of them; copies are compared with a version's own answers"
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


class Rollout:
    """One trial in a fleet, from its start to its end. All methods are called by the thread that lives as long as the
    servers. ``state`` is for those who ask."""

    def __init__(self, fleet: Fleet, plan: Plan, say: Callable[[str], None]) -> None:
        self.fleet, self.plan, self._say = fleet, plan, say
        self.result = ""  # how it ended
        self._step, self._since, self._in_step, self._slow = 0, time.monotonic(), 0.0, 0
        self._due, self._well, self._whole = 0.0, time.monotonic(), time.monotonic()
        self._seen: deque[tuple[float, Sample, Sample]] = deque()  # time, trial, served
        self._door_pid = 0
        self._compared: Compared | None = None
        self._steps = RolloutSteps(plan.salt, plan.shares[-1])
        self._last: dict[str, Any] = {}  # what was compared, of a trial that is over
        self._lines: deque[str] = deque(maxlen=KEPT)

    def start(self, release: Path, accept: Accept, say: Callable[[str], None]) -> None:
        """Brings the version up and sends it its first users. Raises ServerError, DamagedError or ValueError where it
        does not come up or is not accepted."""
        self.fleet.begin_trial(release, accept, say, self.plan.salt if self.plan.interleave else "")
        try:
            self._compare()
            self._note(f"version {self.plan.version}: {self._words()}")
            say(self._lines[-1])
            self._apply()
            self._steps = self._steps.after(self._split.share, self.fleet.release.parent)
        except BaseException as error:
            self.stop(f"{error}")
            raise

    def look(self) -> bool:
        """Judges, and takes the next step when it is due; whether all steps are over and the version shall be served to
        everyone."""
        now = time.monotonic()
        if self.result or now < self._due:
            return False
        self._due = now + LOOK_S
        if self.fleet.door is not None and self.fleet.door.running() and self.fleet.door.pid != self._door_pid:
            self._apply()  # an Envoy that was started again
        trial = self.fleet.trial
        if trial is None:
            return False
        if trial.watchdog.ends:
            self.stop("its tritonserver ended by itself; the log says how")
            return False
        if trial.watchdog.health.ready:
            self._well = now
        elif now - self._well > ILL_S:
            faults = "; ".join(why for why in trial.watchdog.health.faults.values() if why)
            self.stop(f"not well for {ILL_S:.0f} s: {faults}")
            return False
        if ill := [shard.fault() for shard in self.fleet.shards.servers if shard.fault()]:
            self._seen.clear()  # what either counts meanwhile says nothing of a version; its watchdog brings it back
            if now - self._whole > SHARDS_S:
                self.stop(f"a shard was not well for {SHARDS_S:.0f} s: {ill[0]}")
            return False
        self._whole = now
        trial_seen, served_seen = self._window(now)
        slow = slowness(self.plan, trial_seen, served_seen) if now - self._seen[0][0] >= SLOW_S else ""
        self._slow = self._slow + 1 if slow else 0
        why = fault(self.plan, trial_seen, served_seen) or (slow if self._slow >= SLOW_LOOKS else "")
        if compared := self._compared:
            why = why or unlike(self.plan, compared.side(True), compared.side(False))
            why = why or disliked(self.plan, compared.clicks())
        if why:
            self.stop(why)
            return False
        enough = self._seen[-1][1].rows - self._in_step >= self.plan.least
        if now - self._since < self.plan.wait_s or not enough:
            return False
        if self._step + 1 == len(self.plan.shares):
            return self.plan.promote
        self._step, self._since, self._in_step = self._step + 1, now, self._seen[-1][1].rows
        self._apply()
        if self._compared is not None:
            self._compared.step(self._split)
        self._steps = self._steps.after(self._split.share, self.fleet.release.parent)
        self._note(f"version {self.plan.version}: {self._words()}")
        return False

    def stop(self, why: str) -> None:
        """Sends its users back to the served version and ends the version's server. Nobody's call is lost."""
        self.fleet.end_trial(self._say)
        self._end_comparison()
        self.result = f"version {self.plan.version} is on trial no more: {why}"
        self._note(self.result)

    def give_up(self, why: str) -> None:
        """The version could not be served to everyone: its users stay with it, and no further try is made."""
        self.plan = replace(self.plan, promote=False)
        self._note(f"version {self.plan.version} stays on trial: {why}")

    def promoted(self) -> None:
        """Ends the trial of a version that is served to everyone now."""
        self.fleet.end_trial(self._say)
        self._end_comparison()
        self.result = f"version {self.plan.version} is served to everyone"
        self._note(self.result)

    def state(self) -> dict[str, Any]:
        """For ``vivace rollout status``."""
        trial, served, window_s = Sample(), Sample(), 0.0
        if self._seen:
            (began, *first), (now, *last) = self._seen[0], self._seen[-1]
            trial, served, window_s = last[0] - first[0], last[1] - first[1], now - began
        return {
            "version": self.plan.version,
            "share": 0.0 if self.result else self.plan.shares[self._step],
            "shadow": 0.0 if self.result else self.plan.shadow,
            "interleave": self.plan.interleave,
            "step": self._step + 1,
            "steps": len(self.plan.shares),
            "step_s": round(time.monotonic() - self._since, 1),
            "salt": self.plan.salt,
            "result": self.result,
            "window_s": round(window_s, 1),
            "trial": asdict(trial) | {"mean_ms": trial.mean_ms},
            "served": asdict(served) | {"mean_ms": served.mean_ms},
            "compared": as_state(self._compared) if self._compared is not None else self._last,
            "lines": list(self._lines),
        }

    def collect(self) -> Iterator[Metric]:
        """For a registry of prometheus_client."""
        return as_metrics(self._compared) if self._compared is not None else iter(())

    # -- parts ---------------------------------------------------------------------------------------
    def _words(self) -> str:
        share, plan = self.plan.shares[self._step], self.plan
        shadow = f", and gets a copy of {100 * plan.shadow:.4g} % of the other calls" if plan.shadow else ""
        drafts = ", by drafts of both versions" if plan.interleave else ""
        return f"step {self._step + 1} of {len(plan.shares)}: answers {100 * share:.4g} % of the users{drafts}{shadow}"

    def _note(self, line: str) -> None:
        self._lines.append(f"{time.strftime('%H:%M:%S')} {line}")
        self._say(line)

    @property
    def _split(self) -> Split:
        return Split(self.plan.salt, self.plan.shares[self._step], self.plan.shares[-1])

    def _compare(self) -> None:
        """Listens to samples of both versions' answers."""
        assert self.fleet.options.answers is not None
        folder, url = self.fleet.release.parent / "feature_store", self.fleet.options.store
        clicks = ClickPlan(effect=WORSE, alpha=MISTAKEN)
        self._compared = Compared(
            self.fleet.options.answers, self._split, self.plan.version, lambda: open_store(folder, True, url), clicks
        ).__enter__()
        self.fleet.registry.register(self)  # type: ignore[arg-type]  # it collects, which is all that is asked

    def _end_comparison(self) -> None:
        if self._compared is not None:
            self._last = as_state(self._compared)
            self._compared.__exit__()
            self._compared = None
            self.fleet.registry.unregister(self)  # type: ignore[arg-type]

    def _apply(self) -> None:
        door = self.fleet.door
        if door is None:
            raise ServerError("rollout: expected the guard, which deals the users; leave --no-guard out")
        door.split(self._split, self.plan.shadow)
        self._door_pid = door.pid

    def _window(self, now: float) -> tuple[Sample, Sample]:
        """What was counted in the last ``WINDOW_S``, by the version on trial and by the served one."""
        assert self.fleet.trial is not None
        trial = Sample.of(_page(self.fleet.trial.server.sockets))
        served = sum((Sample.of(_page(r.server.sockets)) for r in self.fleet.replicas), Sample())
        self._seen.append((now, trial, served))
        while len(self._seen) > 2 and now - self._seen[0][0] > WINDOW_S:
            self._seen.popleft()
        if len(self._seen) == 1:
            self._in_step = trial.rows
        first = self._seen[0]
        return trial - first[1], served - first[2]


def _page(sockets: Any) -> list[Metric]:
    return scraped(sockets.metrics) if sockets is not None else []


def on_trial(fleet: Fleet) -> int:
    """The version on trial; 0 for none."""
    return 0 if fleet.trial is None else version_of(fleet.trial.server.release)
