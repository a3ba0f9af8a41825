"""What the benchmarks share: systems that take turns, a median with its spread, the time of a call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def in_turns(turns: int, systems: Sequence[T]) -> Iterator[tuple[int, T]]:
    """(turn, system): every system once a turn, each turn beginning with another, so that a machine that drifts moves
    all alike. Raises ValueError for fewer turns than one."""
    if turns < 1:
        raise ValueError(f"--turns: expected at least 1, got {turns}")
    for turn in range(turns):
        first = turn % len(systems)
        yield from ((turn, system) for system in (*systems[first:], *systems[:first]))


def spread(values: Sequence[float]) -> dict[str, Any]:
    """The median of repeated turns, the least and the largest, and the turns themselves."""
    rounded = [round(float(v), 4) for v in values]
    return {"median": float(np.median(rounded)), "least": min(rounded), "largest": max(rounded), "turns": rounded}


def quartiles(values: Sequence[float], digits: int = 2) -> list[float]:
    """Lower quartile, median and upper quartile: where single turns are disturbed by others."""
    return [round(float(q), digits) for q in np.quantile(values, (0.25, 0.5, 0.75))]


def medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Median of each figure over runs that have the same figures."""
    return {name: float(np.median([r[name] for r in runs])) for name in runs[0]}


def with_spread(figure: dict[str, Any], digits: int = 0) -> str:
    """A figure of ``spread`` for a table: "885 (618 to 1142)"."""
    return f"{figure['median']:.{digits}f} ({figure['least']:.{digits}f} to {figure['largest']:.{digits}f})"


def milliseconds(call: Callable[[int], object], seconds: float, rounds: int = 5, warm_up: int = 3) -> float:
    """Time of ``call(number)``: the median over ``rounds`` of its mean within ``seconds / rounds``."""
    for number in range(warm_up):
        call(number)
    means = []
    for _ in range(rounds):
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < seconds / rounds:
            call(done)
            done += 1
        means.append((time.perf_counter() - began) / done * 1000)
    return float(np.median(means))
