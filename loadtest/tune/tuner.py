"""One tuning: predictions, corrected by live runs, say what to try next; the two best take turns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.tune import queueing
from loadtest.tune.journal import BudgetError, Journal
from loadtest.tune.live import Knee, LiveTrials
from loadtest.tune.offline import service_times
from loadtest.tune.quality import Quality
from loadtest.tune.space import (
    KNOBS,
    LIMITS,
    Answer,
    Objective,
    Trial,
    default_space,
    engines,
    overload_limits,
    untuned,
)
from serving.launcher import TritonServer
from vivace import machine
from vivace.manifest import Progress
from vivace.run import Run
from vivace.store.lmdb_store import LmdbStore

QUALITY = "quality.jsonl"
DOUBT = 0.25  # of a prediction before anything was run, as a logarithm
PAIRS = 3
NEAR = 0.95  # of the knee, where they must not be felt
SERVER_MS = {"fused": 0.5, "ensemble": 1.2}  # what the server adds to a request, before anything was run


class Tuner:
    """``say`` gets a line for each trial; ``show`` what is going on."""

    def __init__(
        self, root: Path, objective: Objective, name: str, space: Mapping[str, Sequence[Any]] | None, budget_s: float,
        seconds: float, say: Progress, show: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.root, self.objective, self.seconds, self.say, self.show = root, objective, seconds, say, show
        self.engines, self.cores = engines(root), machine.cores()
        self.space = dict(space) if space is not None else default_space(root)
        folder = Run(root).tuning
        self.journal = Journal(folder / f"{name}.jsonl", budget_s)
        self.store = LmdbStore(Run(root).feature_store, readonly=True)
        self.quality = Quality(root, self.engines, self.store, Journal(folder / QUALITY, budget_s), show)
        self.live = LiveTrials(root, objective, self.engines, self.journal, seconds, show)
        self.knees: dict[Trial, Knee] = {}
        self.overhead: dict[str, float] = {}
        self.times: dict[Answer, dict[int, float]] = {}

    def close(self) -> None:
        self.store.close()

    # -- predictions ---------------------------------------------------------------------------------
    def service(self, answer: Answer, layout: str) -> queueing.Service:
        """Times of the answer's graphs and of the server around them."""
        key = ["service", asdict(answer), self.quality.version(answer)]
        if answer not in self.times:
            times = self.journal(key, lambda: service_times(self.quality.pipeline(answer), self.root))
            self.times[answer] = {int(size): ms for size, ms in times.items()}
        return queueing.Service(self.times[answer], self.overhead.get(layout, SERVER_MS[layout]))

    def predict(self, trial: Trial) -> float:
        """Rate that the model says the trial reaches."""
        service = self.service(trial.answer, trial.layout)
        cores = max(1, self.cores // trial.threads)
        if trial.threads > 1:  # the graphs gain less than their threads; the server's part gains nothing
            gain = 1 + 0.6 * (trial.threads - 1)
            service = replace(service, batches={b: t / gain for b, t in service.batches.items()})
        batcher = queueing.Batcher(trial.instances, trial.batch, trial.preferred, trial.delay_us / 1000)
        return queueing.knee(service, batcher, cores, self.objective.percentile, self.objective.ms)

    def _learn(self, trial: Trial, cpu_ms: float) -> None:
        """What the server adds to a request: its processor time beyond that of the graphs, remembered by layout."""
        alone = self.times.get(trial.answer, {}).get(1)
        if alone is not None and trial.threads == 1:
            extra = max(0.1, cpu_ms - alone)
            self.overhead[trial.layout] = min(extra, self.overhead.get(trial.layout, math.inf))

    def corrected(self, predicted: Mapping[Trial, float]) -> dict[Trial, tuple[float, float]]:
        """Predictions, scaled by how far off they were for trials that were run: the more knobs in common, the more a
        run counts. The second figure is what is hoped for: it adds the doubt that is left."""
        known = [(k.trial, math.log(max(k.met, 1.0) / max(predicted[k.trial], 1.0))) for k in self.knees.values()
                 if k.trial in predicted]  # fmt: skip
        out = {}
        for trial, value in predicted.items():
            weight, total = 1.0, 0.0
            for other, error in known:
                same = sum(getattr(trial, k) == getattr(other, k) for k in KNOBS)
                w = 2.0 ** (same - len(KNOBS) + 2)
                weight, total = weight + w, total + w * error
            middle = value * math.exp(total / weight)
            out[trial] = middle, middle * math.exp(DOUBT / math.sqrt(weight))
        return out

    # -- live ----------------------------------------------------------------------------------------
    def measure(self, trial: Trial, guess: float, to_beat: float = 0.0, turn: int = 0) -> Knee:
        """The trial's knee by live runs (``LiveTrials.knee``); the model learns from each."""
        return self.live.knee(trial, self.quality.version(trial.answer), guess, to_beat, turn, self._learn)

    def choose(self, everything: Sequence[Trial]) -> Knee | None:
        """Tries configurations to the end or the budget's; the best that keeps the quality, None if none does."""
        start, best = untuned(self.root), None
        fit: list[Answer] = []
        try:
            answers = sorted({t.answer for t in everything}, key=lambda a: (a.engine, -a.history, -a.ranked))
            fit = [a for a in answers if self.quality.kept(a) >= self.objective.quality]
            self.say(f"{len(fit)} of {len(answers)} answers keep {self.objective.quality:.1%} of the quality, judged "
                     "on validation requests")  # fmt: skip
            if not fit:
                return None
            promising = self._promising(fit)
            self.show("predicting")
            self.knees[start] = self.measure(start, self.predict(start))
            self.say(f"untuned: {self.knees[start].met:.0f} requests a second: {start}")
            possible = [t for t in everything if t.answer in promising]
            if (start in possible or start.answer in fit) and self.knees[start].met:
                best = self.knees[start]
            best = self.in_turns(self._try_all(possible, start, best))
        except BudgetError:
            self.say("the budget is spent; what was measured decides")
        if best is None:
            met = (k for k in self.knees.values() if k.met and k.trial.answer in fit)
            best = max(met, key=lambda k: k.met, default=None)
        return best

    def _promising(self, fit: Sequence[Answer]) -> list[Answer]:
        """The quickest answers of those that keep the quality: three, and one that an ensemble can serve."""
        quickest = sorted(fit, key=lambda a: self.service(a, "fused").batches[8])
        all_ranked = [a for a in quickest if a.ranked == Run(self.engines[a.engine]).shapes().candidates]
        return quickest[:3] + all_ranked[:1]

    def _try_all(self, possible: Sequence[Trial], start: Trial, best: Knee | None) -> Knee | None:
        """Runs what promises most until nothing left promises more than the best."""
        predicted = {t: self.predict(t) for t in (*possible, start)}
        while left := [t for t in possible if t not in self.knees]:
            rank = self.corrected(predicted)
            trial = max(left, key=lambda t: (rank[t][1], -t.batch, -t.preferred, -t.delay_us))
            if best and rank[trial][1] < best.met:
                break
            knee = self.knees[trial] = self.measure(trial, rank[trial][0], best.met if best else 0.0)
            if knee.met and (best is None or knee.met > best.met):
                best = knee
            reached = f"{knee.met:.0f}" if knee.met else f"below {knee.failed:.0f}"
            self.say(f"{reached} requests a second (best {best.met if best else 0:.0f}): {trial}")
        return best

    def in_turns(self, best: Knee | None) -> Knee | None:
        """The two best again, in turns at the lower of their rates: the one that met the objective more often, and if
        both did as often the one with the higher knee."""
        ranked = sorted((k for k in self.knees.values() if k.met), key=lambda k: -k.met)
        if best is None or len(ranked) < 2 or ranked[1].met < 0.9 * ranked[0].met:
            return best
        pair, rate = ranked[:2], ranked[1].met
        met = {k.trial: 0 for k in pair}
        for turn, k in itertools.product(range(PAIRS), pair):
            version = self.quality.version(k.trial.answer)

            def live(k: Knee = k, turn: int = turn) -> dict[str, Any]:
                with self.live.server(k.trial) as server:
                    self.live.warm(server, rate)
                    return self.live.offer(server, rate, 100 + turn)

            key = ["turn", asdict(k.trial), version, asdict(self.objective), rate, turn, self.seconds]
            self.show(f"the two best in turns: {k.trial}")
            value = dict(self.journal(key, live))
            met[k.trial] += value["full"] >= self.objective.attained
        self.say("in turns: " + "; ".join(f"{met[k.trial]} of {PAIRS} met by {k.trial}" for k in pair))
        return max(pair, key=lambda k: (met[k.trial], k.met))

    # -- limits under overload -----------------------------------------------------------------------
    def limits(self, best: Knee, times: np.ndarray) -> dict[str, int]:
        """The narrowest limits with which the profile still serves its rate, or those with which it comes nearest: what
        it does under overload must not be felt before."""
        o = self.objective
        by_factor = {f: overload_limits(best.trial, o.ms, best.met, times, f) for f in LIMITS}
        full: dict[int, float] = {}
        try:
            for factor, limits in by_factor.items():
                full[factor] = self._near_the_knee(best, limits)
                if full[factor] >= o.attained:
                    break
        except BudgetError:
            self.say("the budget is spent: limits under overload were not all tried near the knee")
        chosen = by_factor[max(full, key=lambda f: full[f])] if full else by_factor[LIMITS[0]]
        self.say(f"under overload: {chosen}")
        return chosen

    def _near_the_knee(self, best: Knee, limits: Mapping[str, int]) -> float:
        """Share of whole answers in time near the knee, the best of a few runs."""
        rate, most = float(f"{best.met * NEAR:.3g}"), 0.0
        with ExitStack() as stack:
            opened: list[TritonServer] = []

            def live(turn: int) -> dict[str, Any]:
                if not opened:
                    opened.append(stack.enter_context(self.live.server(best.trial, limits)))
                    self.live.warm(opened[0], rate)
                return self.live.offer(opened[0], rate, 200 + turn)

            self.show(f"limits under overload {dict(limits)}")
            for turn in range(PAIRS):
                key = ["limits", asdict(best.trial), self.quality.version(best.trial.answer), dict(limits), rate, turn,
                       self.seconds, asdict(self.objective)]  # fmt: skip
                most = max(most, float(self.journal(key, partial(live, turn))["full"]))
                if most >= self.objective.attained:
                    break
        return most
