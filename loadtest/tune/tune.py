"""``vivace tune``: the configuration that answers the most requests within an objective and keeps the ranking quality.

Knobs that change the answer (engine, history read, candidates ranked) are judged offline: NDCG@10 of the very graphs on
recorded requests, paired with the whole model, kept on either half of the requests. Knobs that do not (layout,
instances, threads, batch, delay) and the speed of all are judged on the live server under open-loop load. A queueing
model of measured service times (``queueing``), corrected by every run, says what to try next; a trial that does not
beat the best so far ends after its first run. The two best are run in turns before one is chosen.

Everything measured is appended to ``artifacts/<name>/tuning/<profile>.jsonl``, quality to ``quality.jsonl`` there for
all profiles, and never measured twice: an interrupted search goes on where it was, and the decision can be made again
from the logs alone.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from loadtest.generate.open_loop import Run, due_times, messages, picks, run
from loadtest.tune import queueing
from loadtest.tune.offline import gains, service_times
from loadtest.tune.space import (
    KNOBS,
    LIMITS,
    TOP_K,
    Answer,
    Objective,
    Trial,
    default_space,
    drop_profile,
    engines,
    overload_limits,
    shapes_of,
    trials,
    untuned,
    write_profile,
)
from serving import repository
from serving.launcher import ServerError, ServerOptions, TritonServer
from serving.runtime.pipeline import Pipeline
from training.metrics import bootstrap
from vivace.machine import cpu
from vivace.manifest import Progress, commit, read_manifest, write_text
from vivace.store.lmdb_store import LmdbStore

FOLDER = repository.TUNED
QUALITY = "quality.jsonl"
REPEAT = 0.7  # exponent of the users' power law
UP, MARGIN = 1.25, 1.02
DOUBT = 0.25  # of a prediction before anything was run, as a logarithm
DISTURBED = 0.25  # of the objective: if the generator itself is late by so much, the machine did something else
MOST_RUNS, PAIRS = 8, 3
NEAR = 0.95  # of the knee, where they must not be felt
PROFILE = "trial"


class BudgetError(Exception):
    """The budget is spent."""


class Journal:
    """What was measured, by key: a file of one JSON object a line. Asks for what it does not have, within a budget."""

    def __init__(self, path: Path, budget_s: float) -> None:
        self.path, self.until, self.found = path, time.monotonic() + budget_s, dict[str, Any]()
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the line that an interruption cut
                    continue
                self.found[entry["key"]] = entry["value"]

    def __call__(self, key: Sequence[Any], measure: Callable[[], Any]) -> Any:
        """The value of ``key``, measured if it is not known. Raises BudgetError when there is no time left."""
        name = json.dumps(key)
        if name not in self.found:
            if time.monotonic() > self.until:
                raise BudgetError
            value = measure()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as log:
                log.write(json.dumps({"key": name, "value": value, "at": round(time.time(), 1)}) + "\n")
            self.found[name] = json.loads(json.dumps(value))
        return self.found[name]


@dataclass
class Knee:
    """What live runs said of a trial: the largest rate that met the objective, the first that did not (infinity if none
    was tried), and the runs."""

    trial: Trial
    met: float
    failed: float
    runs: list[Run]

    @property
    def at_knee(self) -> Run | None:
        return max((r for r in self.runs if r.qps <= self.met * 1.001), key=lambda r: r.qps, default=None)


def live_runs(journal: Journal) -> int:
    """How many times a server was put under load."""
    return sum(json.loads(key)[0] in ("run", "turn", "limits") for key in journal.found)


class Tuner:
    """One search. ``say`` gets a line for each trial; ``show`` what is going on."""

    def __init__(
        self, root: Path, objective: Objective, name: str, space: Mapping[str, Sequence[Any]] | None, budget_s: float,
        seconds: float, say: Progress, show: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.root, self.objective, self.name, self.seconds, self.say, self.show = (
            root, objective, name, seconds, say, show,
        )  # fmt: skip
        self.engines, self.cores = engines(root), len(os.sched_getaffinity(0))
        self.space = dict(space) if space is not None else default_space(root)
        self.journal = Journal(root / FOLDER / f"{name}.jsonl", budget_s)
        self.judged = Journal(root / FOLDER / QUALITY, budget_s)
        self.pool = messages(root, TOP_K)
        self.store = LmdbStore(root / "feature_store", readonly=True)
        self.knees: dict[Trial, Knee] = {}
        self.overhead: dict[str, float] = {}
        self.times: dict[Answer, dict[int, float]] = {}

    # -- offline -------------------------------------------------------------------------------------
    def _pipeline(self, answer: Answer, threads: int = 1) -> Pipeline:
        folder = self.engines[answer.engine]
        return Pipeline.published(folder, self.store, threads, answer.history, answer.ranked)

    def _version(self, answer: Answer) -> str:
        return str(read_manifest(self.engines[answer.engine] / "compiled", "vivace compile")["key"])

    def quality(self, answer: Answer) -> np.ndarray:
        """NDCG@10 of each recorded request."""
        self.show(f"quality of {answer.engine or 'whole model'}, history {answer.history}, {answer.ranked} ranked")
        key = ["quality", asdict(answer), self._version(answer)]
        return np.array(self.judged(key, lambda: gains(self._pipeline(answer), self.root)))

    def share(self, answer: Answer, half: int | None = None) -> tuple[float, tuple[float, float]]:
        """NDCG@10 as a share of the uncompressed run's on all requests or one half of them, with its 95 % interval."""
        start, own = untuned(self.root).answer, slice(half, None, 1 if half is None else 2)
        a, b = self.quality(start)[own], self.quality(answer)[own]
        low, high = bootstrap(b - a)
        mean = max(float(a.mean()), 1e-12)
        return 1 + float((b - a).mean()) / mean, (1 + low / mean, 1 + high / mean)

    def kept(self, answer: Answer) -> float:
        """That share on the half of the requests where it is less: what chance gave an answer on one half, the other
        half denies it."""
        return min(self.share(answer, half)[0] for half in (0, 1))

    def service(self, answer: Answer, layout: str) -> queueing.Service:
        key = ["service", asdict(answer), self._version(answer)]
        if answer not in self.times:
            found = self.journal(key, lambda: service_times(self._pipeline(answer), self.root))
            self.times[answer] = {int(k): v for k, v in found.items()}
        start = {"fused": 0.5, "ensemble": 1.2}[layout]
        return queueing.Service(self.times[answer], self.overhead.get(layout, start))

    def predict(self, trial: Trial) -> float:
        """Rate that the model says the trial reaches."""
        o = self.objective
        service = self.service(trial.answer, trial.layout)
        cores = max(1, self.cores // trial.threads)
        if trial.threads > 1:  # the graphs gain less than their threads; the server's part gains nothing
            gain = 1 + 0.6 * (trial.threads - 1)
            service = replace(service, batches={b: t / gain for b, t in service.batches.items()})
        batcher = queueing.Batcher(trial.instances, trial.batch, trial.preferred, trial.delay_us / 1000)
        return queueing.knee(service, batcher, cores, o.percentile, o.ms)

    # -- live ----------------------------------------------------------------------------------------
    @contextmanager
    def _server(self, trial: Trial, limits: Mapping[str, int] | None = None) -> Iterator[TritonServer]:
        """A server of the trial's own profile, which goes with it."""
        folder = self.engines[trial.engine]
        write_profile(folder, PROFILE, trial.profile(**(limits or {})))
        log = self.root / FOLDER / "triton.log"
        log.unlink(missing_ok=True)
        options = ServerOptions(
            folder / "model_repository", http_port=0, grpc_port=0, metrics_port=0, profile=PROFILE, log=log
        )
        try:
            with TritonServer(options) as server:
                yield server
        finally:
            drop_profile(folder, PROFILE)

    def _offer(self, server: TritonServer, qps: float, seed: int, seconds: float) -> dict[str, Any]:
        due = due_times("poisson", qps, seconds, seed)
        chosen = picks(len(due), len(self.pool), REPEAT, seed)
        before = cpu_seconds(server)
        url = f"{server.host}:{server.grpc_port}"
        found = run(url, [self.pool[i] for i in chosen], due, seconds, self.objective.ms)
        return {**asdict(found), "cpu_ms": (cpu_seconds(server) - before) * 1000 / len(due)}

    def measure(self, trial: Trial, guess: float, to_beat: float = 0.0, turn: int = 0) -> Knee:
        """The trial's knee by live runs, beginning at ``guess``. A trial that does not reach ``to_beat`` is left at
        that. Each ``turn`` has arrivals of its own."""
        version, runs = self._version(trial.answer), list[Run]()
        low, high = 0.0, math.inf
        opened: list[Any] = []

        def offered(qps: float) -> Run:
            qps = float(f"{qps:.3g}")
            seed = len(runs) + 1 + 1000 * turn
            objective = [self.objective.percentile, self.objective.ms]
            key = ["run", asdict(trial), version, objective, qps, seed, self.seconds]

            def live() -> dict[str, Any]:
                if not opened:
                    context = self._server(trial)
                    opened.extend((context, context.__enter__()))
                    self._offer(opened[1], min(qps, 200.0), 0, 1.0)  # first requests pay for what is set up late
                return self._offer(opened[1], qps, seed, self.seconds)

            self.show(f"{trial}: {qps:.0f} requests a second")
            value = dict(self.journal(key, live))
            used = value.pop("cpu_ms")
            found = Run(**value)
            runs.append(found)
            if found.full >= self.objective.wanted:
                self._learn(trial, used)
            return found

        try:
            least = to_beat * MARGIN
            rate = max(least, 0.8 * guess, 5.0)
            while len(runs) < MOST_RUNS:
                found = offered(rate)
                near = self.objective.wanted - 0.02 < found.full < self.objective.wanted  # chance may have decided
                disturbed = found.full < self.objective.wanted and found.late > self.objective.ms * DISTURBED
                if (near and not low) or disturbed:
                    found = max(found, offered(rate), key=lambda r: r.full)
                if found.full >= self.objective.wanted:
                    low = max(low, found.qps)
                else:
                    high = min(high, found.qps)
                if not low and high <= least:
                    break
                if high / max(low, 1e-9) < 1.06 or (high < 4 and not low):
                    break
                if not math.isfinite(high):
                    rate = max(low * UP, min(guess, low * 2))
                elif not low:
                    rate = max(high * (0.8 if found.full > 0.9 else 0.6), least)
                else:
                    rate = math.sqrt(low * high)
        finally:
            if opened:
                opened[0].__exit__(None, None, None)
        return Knee(trial, low, high, runs)

    def _learn(self, trial: Trial, cpu_ms: float) -> None:
        """What the server adds to a request: its processor time beyond that of the graphs, remembered by layout."""
        alone = self.times.get(trial.answer, {}).get(1)
        if alone is not None and trial.threads == 1:
            extra = max(0.1, cpu_ms - alone)
            self.overhead[trial.layout] = min(extra, self.overhead.get(trial.layout, math.inf))

    # -- search --------------------------------------------------------------------------------------
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

    def search(self) -> dict[str, Any]:
        """Runs the search to its end or the budget's; returns the decision, which ``finish`` writes."""
        everything = trials(self.space, self.root)
        start = untuned(self.root)
        best: Knee | None = None
        predicted: dict[Trial, float] = {}
        try:
            answers = sorted({t.answer for t in everything}, key=lambda a: (a.engine, -a.history, -a.ranked))
            fit = [a for a in answers if self.kept(a) >= self.objective.quality]
            self.say(f"{len(fit)} of {len(answers)} answers keep {self.objective.quality:.1%} of the quality")
            if not fit:
                return self.decision(None, everything)
            quick = sorted(fit, key=lambda a: self.service(a, "fused").batches[8])[:3]
            slow = [a for a in fit if a.ranked == shapes_of(self.engines[a.engine]).candidates]  # for ensembles
            quick += sorted(slow, key=lambda a: self.service(a, "fused").batches[8])[:1]
            self.show("predicting")
            self.knees[start] = self.measure(start, self.predict(start))
            self.say(f"untuned: {self.knees[start].met:.0f} requests a second: {start}")
            possible = [t for t in everything if t.answer in quick]
            predicted = {t: self.predict(t) for t in (*possible, start)}
            if start in possible or start.answer in fit:
                best = self.knees[start] if self.knees[start].met else None
            while True:
                rank = self.corrected(predicted)
                left = [t for t in possible if t not in self.knees]
                if not left:
                    break
                trial = max(left, key=lambda t: (rank[t][1], -t.batch, -t.preferred, -t.delay_us))
                if best and rank[trial][1] < best.met:
                    break
                found = self.measure(trial, rank[trial][0], best.met if best else 0.0)
                self.knees[trial] = found
                if found.met and (best is None or found.met > best.met):
                    best = found
                reached = f"{found.met:.0f}" if found.met else f"below {found.failed:.0f}"
                self.say(f"{reached} requests a second (best {best.met if best else 0:.0f}): {trial}")
            best = self.in_turns(best)
        except BudgetError:
            self.say("the budget is spent; what was measured decides")
        if best is None and self.knees:
            best = max((k for k in self.knees.values() if k.met and k.trial.answer in fit), key=lambda k: k.met,
                       default=None)  # fmt: skip
        return self.decision(best, everything)

    def in_turns(self, best: Knee | None) -> Knee | None:
        """The two best again, in turns at the lower of their rates: the one that met the objective more often, and if
        both did as often the one with the higher knee."""
        ranked = sorted((k for k in self.knees.values() if k.met), key=lambda k: -k.met)
        if best is None or len(ranked) < 2 or ranked[1].met < 0.9 * ranked[0].met:
            return best
        pair, rate = ranked[:2], ranked[1].met
        met = {k.trial: 0 for k in pair}
        for turn, k in itertools.product(range(PAIRS), pair):
            version = self._version(k.trial.answer)

            def live(k: Knee = k, turn: int = turn) -> dict[str, Any]:
                with self._server(k.trial) as server:
                    self._offer(server, min(rate, 200.0), 0, 1.0)
                    return self._offer(server, rate, 100 + turn, self.seconds)

            key = ["turn", asdict(k.trial), version, asdict(self.objective), rate, turn, self.seconds]
            self.show(f"the two best in turns: {k.trial}")
            value = dict(self.journal(key, live))
            met[k.trial] += value["full"] >= self.objective.wanted
        self.say("in turns: " + "; ".join(f"{met[k.trial]} of {PAIRS} met by {k.trial}" for k in pair))
        return max(pair, key=lambda k: (met[k.trial], k.met))

    def limits(self, best: Knee, times: np.ndarray) -> dict[str, int]:
        """The narrowest limits with which the profile still serves its rate, or those with which it comes nearest: what
        it does under overload must not be felt before."""
        o = self.objective
        found = {f: overload_limits(best.trial, o.ms, best.met, times, f) for f in LIMITS}
        full: dict[int, float] = {}
        try:
            for factor, limits in found.items():
                full[factor] = self._near_the_knee(best, limits)
                if full[factor] >= o.wanted:
                    break
        except BudgetError:
            self.say("the budget is spent: limits under overload were not all tried near the knee")
        chosen = found[max(full, key=lambda f: full[f])] if full else found[LIMITS[0]]
        self.say(f"under overload: {chosen}")
        return chosen

    def _near_the_knee(self, best: Knee, limits: Mapping[str, int]) -> float:
        """Share of whole answers in time near the knee, the best of a few runs."""
        rate, most = float(f"{best.met * NEAR:.3g}"), 0.0
        with ExitStack() as stack:
            opened: list[TritonServer] = []

            def live(turn: int) -> dict[str, Any]:
                if not opened:
                    opened.append(stack.enter_context(self._server(best.trial, limits)))
                    self._offer(opened[0], min(rate, 200.0), 0, 1.0)
                return self._offer(opened[0], rate, 200 + turn, self.seconds)

            self.show(f"limits under overload {dict(limits)}")
            for turn in range(PAIRS):
                key = ["limits", asdict(best.trial), self._version(best.trial.answer), dict(limits), rate, turn,
                       self.seconds, asdict(self.objective)]  # fmt: skip
                most = max(most, float(self.journal(key, partial(live, turn))["full"]))
                if most >= self.objective.wanted:
                    break
        return most

    def worth(self, best: Knee) -> dict[str, dict[str, Any]]:
        """Knee of the best configuration with one knob as it is untuned, for every knob that was moved."""
        start, found = untuned(self.root), {}
        for knob in KNOBS:
            back = replace(best.trial, **{knob: getattr(start, knob)})
            if back == best.trial:
                continue
            s = shapes_of(self.engines[back.engine])
            if back.layout == "ensemble" and back.ranked != s.candidates:
                back = replace(back, ranked=s.candidates)
            if back.ranked > s.candidates or back.history > s.history:
                back = replace(back, ranked=min(back.ranked, s.candidates), history=min(back.history, s.history))
            try:
                k = self.knees.get(back)
                if k is None or not k.met:
                    k = self.measure(back, best.met * 0.8)
            except BudgetError:
                break
            untuned_value = getattr(start, knob)
            self.say(
                f"with {knob} {'whole model' if untuned_value == '' else untuned_value}: {k.met:.0f} requests a second"
            )
            found[knob] = {"value": getattr(best.trial, knob), "untuned": untuned_value, "qps": k.met}
        return found

    # -- decision ------------------------------------------------------------------------------------
    def decision(self, best: Knee | None, everything: Sequence[Trial]) -> dict[str, Any]:
        """What was found, as a record."""
        start = self.knees.get(untuned(self.root))
        rows = []
        for k in sorted(self.knees.values(), key=lambda k: -k.met):
            share, interval = self.share(k.trial.answer)
            at = k.at_knee
            rows.append({
                "trial": asdict(k.trial), "qps": k.met, "failed_at": k.failed if math.isfinite(k.failed) else None,
                "p50": at.p50 if at else None, "p99": at.p99 if at else None, "quality": share,
                "interval": interval, "runs": len(k.runs),
            })  # fmt: skip
        chosen = next((r for r in rows if best and r["trial"] == asdict(best.trial)), None)
        others = [r for r in rows if r is not chosen and r["qps"]]
        return {
            "objective": asdict(self.objective), "chosen": chosen, "runner_up": others[0] if others else None,
            "untuned": start.met if start else None, "trials": rows, "space": self.space,
            "configurations": len(everything), "configurations_run": len(self.knees),
            "cpu": cpu()[0], "cores": self.cores, "commit": commit(), "seconds": self.seconds,
        }  # fmt: skip

    def reachable(self) -> list[str]:
        """Where the objective is out of reach: the nearest that are not, in words."""
        said = []
        s = shapes_of(self.root)
        answers = sorted({t.answer for t in trials(self.space, self.root)}, key=lambda a: (a.engine, a.history))
        shares = {a: self.kept(a) for a in answers}
        best = max(shares.values())
        if best < self.objective.quality:
            said.append(f"quality of {self.objective.quality:.1%}: the best that can be served has {best:.1%}")
        fit = [a for a in answers if shares[a] >= min(self.objective.quality, best)]
        quickest = min(fit, key=lambda a: self.service(a, "fused").batches[1])
        trial = Trial(**asdict(quickest), layout="fused", instances=1, threads=1, batch=1, preferred=0, delay_us=0)
        with self._server(trial) as server:
            self._offer(server, 20.0, 0, 1.0)
            low = self._offer(server, 20.0, 1, 4.0)
        said.append(
            f"p{self.objective.percentile:g} of {low['p99']:.1f} ms at 20 requests a second, the whole of it one "
            f"request at a time, with {shares[quickest]:.1%} of the quality (history {quickest.history} of {s.history})"
        )
        return said

    def close(self) -> None:
        self.store.close()


def cpu_seconds(server: TritonServer) -> float:
    """Processor time of the server and its workers so far."""
    own = psutil.Process(server.pid)
    return float(sum(sum(p.cpu_times()[:2]) for p in [own, *own.children(recursive=True)]))


def publish(root: Path, name: str, decision: dict[str, Any], limits: Mapping[str, int]) -> Path:
    """Writes the chosen profile where its engine is and the record that ``vivace serve --profile`` reads."""
    trial = Trial(**decision["chosen"]["trial"])
    write_profile(engines(root)[trial.engine], name, trial.profile(**limits))
    decision["limits"] = dict(limits)
    path = root / FOLDER / f"{name}.json"
    write_text(path, json.dumps(decision, indent=2))
    return path


def tune(
    root: Path, objective: Objective, name: str, budget_s: float, say: Progress, show: Callable[[str], None],
    space: Mapping[str, Sequence[Any]] | None = None, seconds: float = 4.0, restart: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Searches, publishes the profile and writes the report; returns the decision. Raises ValueError where the
    objective cannot be met, naming what can."""
    from loadtest.tune.report import write

    if name in repository.PROFILES or f"{name}.jsonl" == QUALITY:
        raise ValueError(f"--save-as: expected a name of its own, got {name!r}, which every repository has")
    if restart:
        (root / FOLDER / f"{name}.jsonl").unlink(missing_ok=True)
    tuner = Tuner(root, objective, name, space, budget_s, seconds, say, show)
    try:
        decision = tuner.search()
        if decision["chosen"] is None:
            try:
                nearest = "; ".join(tuner.reachable())
            except BudgetError:
                raise ValueError(
                    f"{objective}: nothing that meets it was found in {budget_s / 60:g} minutes; what was measured is "
                    "kept: run the same command again, or give a larger --budget"
                ) from None
            raise ValueError(f"{objective}: not reachable here. Nearest: {nearest}")
        best = tuner.knees[Trial(**decision["chosen"]["trial"])]
        times = tuner.service(best.trial.answer, best.trial.layout)
        limits = tuner.limits(best, times.table(best.trial.batch))
        decision["worth"] = tuner.worth(best)
        decision["service_ms"] = dict(times.batches)
        decision["overhead_ms"] = times.request
        decision["runs"] = live_runs(tuner.journal)
        publish(root, name, decision, limits)
        write(decision, root / FOLDER / f"{name}.html", root.name)
        return decision
    except ServerError as error:
        raise ValueError(f"tuning: a server did not start: {error}") from None
    finally:
        tuner.close()
