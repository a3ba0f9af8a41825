"""A version on trial: a share of the users gets it, step by step, and it goes by itself where it does worse.

What is compared is what the two tritonservers count themselves in the same seconds: refused and failed calls, the mean
time of a call, and answers that are not whole. Users are dealt by a hash (``serving.door.rollout``), so both see the
same kind of callers. Of rows the server's own questions are not counted; in the mean time of a call they are.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from prometheus_client import Metric

from serving.compared import Compared, as_metrics, as_state
from serving.door.rollout import Split
from serving.fleet import Accept, Fleet
from serving.judgement import Plan, Sample, disliked, fault, slowness, unlike
from serving.merged_metrics import scraped
from serving.releases import version_of
from serving.rollout_steps import RolloutSteps
from serving.wheel import ServerError
from vivace.sequential import Plan as ClickPlan
from vivace.store.opening import open_store

LOOK_S = 1.0
WINDOW_S = 30.0
ILL_S, SHARDS_S = 3.0, 60.0  # a version on trial may be unwell for so long, and a shard of either
SLOW_S, SLOW_LOOKS = 10.0, 5  # slow it has to be over so many seconds, and at so many looks, one after the other
WORSE, MISTAKEN = 0.1, 0.01  # clicks: what difference is looked for, the chance to end a version that is as good
KEPT = 50  # lines of what happened


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
        draft = self.plan.salt if self.plan.interleave else ""
        self.fleet.begin_trial(release, accept, say, draft)
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
        judged = self._split.share > 0 and now - self._seen[0][0] >= SLOW_S  # copies alone wait for the others' calls
        slow = slowness(self.plan, trial_seen, served_seen) if judged else ""
        self._slow = self._slow + 1 if slow else 0
        why = fault(self.plan, trial_seen, served_seen) or (slow if self._slow >= SLOW_LOOKS else "")
        if compared := self._compared:
            why = why or unlike(self.plan, compared.side(True), compared.side(False))
            why = why or disliked(self.plan, compared.clicks())
        if why:
            self.stop(why)
            return False
        trial_rows = self._seen[-1][1].rows
        enough = trial_rows - self._in_step >= self.plan.least
        if now - self._since < self.plan.wait_s or not enough:
            return False
        if self._step + 1 == len(self.plan.shares):
            return self.plan.promote
        if not self._split.share:
            self._seen.clear()  # its times until now are of a lower priority
        self._step, self._since, self._in_step = self._step + 1, now, trial_rows
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
        copies, step = f"a copy of {100 * plan.shadow:.4g} % of the", f"step {self._step + 1} of {len(plan.shares)}"
        if not share:
            return f"{step}: answers nobody, and gets {copies} calls, at a low priority"
        shadow = f", and gets {copies} other calls" if plan.shadow else ""
        drafts = ", by drafts of both versions" if plan.interleave else ""
        return f"{step}: answers {100 * share:.4g} % of the users{drafts}{shadow}"

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
        if self._split.share and self.fleet.trial is not None:
            self.fleet.trial.server.take_over()  # until it answers anybody others have the processors first
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
    return scraped(sockets.metrics, Sample.COUNTED) if sockets is not None else []


def on_trial(fleet: Fleet) -> int:
    """The version on trial; 0 for none."""
    return 0 if fleet.trial is None else version_of(fleet.trial.server.release)
