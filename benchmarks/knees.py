"""The largest rate at which a running system meets an objective, and what a request costs it there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.generate.generator import ATTAINED, LoadRun, at_rate, best, knee

FIRST_QPS = 40.0
AGAIN = 0.7  # where the knee is sought in a later turn, as a share of the last turn's
STEPS = 5  # halvings: a thirty-second of the range in which it lies


@dataclass(frozen=True)
class AtKnee:
    """The rate (0: none that was tried met the objective), the milliseconds of processor time of a request there (NaN),
    and all runs, by rate."""

    rate: float
    cpu_ms: float
    runs: list[LoadRun]


def seek(
    send: Callable[[np.ndarray, list[bytes]], LoadRun], pid: int, pool: Sequence[bytes], seconds: float, seed: int,
    last: float = 0.0, attained: float = ATTAINED,
) -> AtKnee:  # fmt: skip
    """The knee of the system of process ``pid`` (``at_rate``); ``last``: the rate of an earlier turn (0: none)."""
    cpu_ms: dict[float, float] = {}

    def at(rate: float) -> LoadRun:
        outcome, spent = at_rate(send, pid, pool, rate, seconds, seed)
        cpu_ms[outcome.qps] = spent
        return outcome

    runs = knee(at, max(AGAIN * last, FIRST_QPS), STEPS, attained=attained)
    top = best(runs, attained)
    return AtKnee(top.qps, cpu_ms[top.qps], runs) if top else AtKnee(0.0, float("nan"), runs)
