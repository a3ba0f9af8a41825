"""Configurations under open-loop load on the real server: the largest rate at which each meets the objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loadtest.generate.generator import LoadRun, at_rate, messages, run
from loadtest.generate.local_server import grpc_address, on_free_ports
from loadtest.tune.journal import Journal
from loadtest.tune.space import TOP_K, Objective, Trial, drop_profile, write_profile
from serving.launcher import TritonServer
from vivace.run import Run

UP, MARGIN = 1.25, 1.02
DISTURBED = 0.25  # of the objective: if the generator itself is late by so much, the machine did something else
MOST_RUNS = 8
PROFILE = "trial"
WARM_UP_QPS = 200.0


@dataclass
class Knee:
    """What live runs said of a trial: the largest rate that met the objective, the first that did not (infinity if none
    was tried), and the runs."""

    trial: Trial
    met: float
    failed: float
    runs: list[LoadRun]

    @property
    def at_knee(self) -> LoadRun | None:
        return max((r for r in self.runs if r.qps <= self.met * 1.001), key=lambda r: r.qps, default=None)


def close_in(
    offered: Callable[[float], LoadRun], objective: Objective, guess: float, least: float = 0.0
) -> tuple[float, float]:
    """(largest rate that met the objective, smallest that did not): up from ``guess``, or down to ``least``, then
    between the two."""
    attained, low, high, count = objective.attained, 0.0, math.inf, 0
    rate = max(least, 0.8 * guess, 5.0)
    while count < MOST_RUNS:
        outcome, count = offered(rate), count + 1
        near = attained - 0.02 < outcome.full < attained  # chance may have decided
        disturbed = outcome.full < attained and outcome.late > objective.ms * DISTURBED
        if (near and not low) or disturbed:
            outcome, count = max(outcome, offered(rate), key=lambda r: r.full), count + 1
        if outcome.full >= attained:
            low = max(low, outcome.qps)
        else:
            high = min(high, outcome.qps)
        if not low and high <= least:
            break
        if high / max(low, 1e-9) < 1.06 or (high < 4 and not low):
            break
        if not math.isfinite(high):
            rate = max(low * UP, min(guess, low * 2))
        elif not low:
            rate = max(high * (0.8 if outcome.full > 0.9 else 0.6), least)
        else:
            rate = math.sqrt(low * high)
    return low, high


class LiveTrials:
    """Puts servers of trials under load, ``seconds`` a run; what was measured is kept in ``journal``."""

    def __init__(
        self, root: Path, objective: Objective, engines: Mapping[str, Path], journal: Journal, seconds: float,
        show: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.root, self.objective, self.engines = root, objective, engines
        self.journal, self.seconds, self.show = journal, seconds, show
        self.pool = messages(root, TOP_K)

    @contextmanager
    def server(self, trial: Trial, limits: Mapping[str, int] | None = None) -> Iterator[TritonServer]:
        """A warm server of the trial's own profile, which goes with it."""
        folder = self.engines[trial.engine]
        write_profile(folder, PROFILE, trial.profile(**(limits or {})))
        log = Run(self.root).tuning / "triton.log"
        log.unlink(missing_ok=True)
        try:
            with TritonServer(on_free_ports(Run(folder).repository, PROFILE, log)) as server:
                yield server
        finally:
            drop_profile(folder, PROFILE)

    def offer(self, server: TritonServer, qps: float, seed: int, seconds: float = 0.0) -> dict[str, Any]:
        """One run as a record, with ``cpu_ms``, the processor time of a request."""
        seconds = seconds or self.seconds
        address = grpc_address(server)
        outcome, cpu_ms = at_rate(
            lambda due, sent: run(address, sent, due, seconds, self.objective.ms), server.pid, self.pool, qps, seconds,
            seed,
        )  # fmt: skip
        return {**asdict(outcome), "cpu_ms": cpu_ms}

    def warm(self, server: TritonServer, qps: float) -> None:
        """First requests pay for what is set up late: they do not count."""
        self.offer(server, min(qps, WARM_UP_QPS), 0, 1.0)

    def knee(
        self, trial: Trial, version: str, guess: float, to_beat: float = 0.0, turn: int = 0,
        on_met: Callable[[Trial, float], None] = lambda trial, cpu_ms: None,
    ) -> Knee:  # fmt: skip
        """The trial's knee by live runs, beginning at ``guess``. A trial that does not reach ``to_beat`` is left at
        that. Each ``turn`` has arrivals of its own. ``on_met(trial, cpu_ms)`` hears of each run that met the
        objective."""
        runs: list[LoadRun] = []
        with ExitStack() as stack:
            opened: list[TritonServer] = []

            def live(qps: float, seed: int) -> dict[str, Any]:
                if not opened:
                    opened.append(stack.enter_context(self.server(trial)))
                    self.warm(opened[0], qps)
                return self.offer(opened[0], qps, seed)

            def offered(qps: float) -> LoadRun:
                qps = float(f"{qps:.3g}")
                seed = len(runs) + 1 + 1000 * turn
                objective = [self.objective.percentile, self.objective.ms]
                self.show(f"{trial}: {qps:.0f} requests a second")
                key = ["run", asdict(trial), version, objective, qps, seed, self.seconds]
                value = dict(self.journal(key, partial(live, qps, seed)))
                cpu_ms = value.pop("cpu_ms")
                runs.append(LoadRun(**value))
                if runs[-1].full >= self.objective.attained:
                    on_met(trial, cpu_ms)
                return runs[-1]

            met, failed = close_in(offered, self.objective, guess, to_beat * MARGIN)
        return Knee(trial, met, failed, runs)
