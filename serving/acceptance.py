"""Whether a server of a newer version may take callers: recorded requests are put to it and to the one before.

Nobody reaches the new one yet. What it must do is little, as another version may well answer otherwise: answer every
request whole, with numbers, and not the same to everyone where the old one does not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from preprocessing.requests import recorded, requests_of
from serving.launcher import TritonServer
from serving.wheel import ServerError
from vivace.client import Recommendation
from vivace.contract import UNLOGGED
from vivace.run import Run

TOP_K = 10
MOST = 64  # recorded requests
WAIT_S = 10.0
SLOWER = 5.0  # times the old one's median at one request at a time: more is refused
HARDLY = 5.0  # ms; what is below is not slow, whatever the other one takes


@dataclass(frozen=True)
class Answers:
    """Of one server to the recorded requests, in their order; milliseconds each took."""

    given: list[Recommendation]
    ms: list[float]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.ms) if self.ms else 0.0

    @property
    def different(self) -> int:
        return len({tuple(answer.items) for answer in self.given})


def recorded_calls(run: Run) -> list[dict[str, Any]]:
    """Calls of ``recommend`` with the run's recorded validation requests; none where there are no such."""
    try:
        frame = recorded(run.root, "valid")[:MOST]
    except FileNotFoundError:
        return []
    return [{"user_id": r.user, "history": r.history, "context": r.context or None} for r in requests_of(frame)]


class Acceptance:
    """``requests``: keyword arguments of ``VivaceClient.recommend``, such as users' histories; without any, a version
    that came up ready is accepted. Called with (old, new); says in words what it saw. Raises ServerError with the
    reason why the new one may not take callers."""

    def __init__(self, requests: Sequence[dict[str, Any]]) -> None:
        self.requests = requests

    def __call__(self, old: TritonServer, new: TritonServer) -> str:
        if not self.requests:
            return "ready; no recorded requests to compare by"
        before, after = self._answers(old, strict=False), self._answers(new, strict=True)
        name = new.release.name
        if before.different > 1 and after.different == 1:
            raise ServerError(f"{name}: refused, as it answers all {len(self.requests)} recorded requests alike")
        if after.median_ms > max(HARDLY, SLOWER * before.median_ms):
            raise ServerError(
                f"{name}: refused, as a recorded request takes {after.median_ms:.1f} ms by the median, and "
                f"{before.median_ms:.1f} ms in {old.release.name}"
            )
        alike = [_overlap(a.items, b.items) for a, b in zip(before.given, after.given, strict=True)]
        return (
            f"{len(self.requests)} recorded requests answered; {statistics.mean(alike):.0%} of the first {TOP_K} as "
            f"before; p50 {after.median_ms:.1f} ms, before {before.median_ms:.1f} ms"
        )

    def _answers(self, server: TritonServer, strict: bool) -> Answers:
        given, ms = [], []
        with server.client(WAIT_S) as client:
            for request in self.requests:
                started = time.monotonic()
                answer = client.recommend(**request, top_k=TOP_K, request_id=UNLOGGED)
                ms.append((time.monotonic() - started) * 1000)
                given.append(answer)
                if strict:
                    _check(server.release.name, request, answer)
        return Answers(given, ms)


def _check(name: str, request: dict[str, Any], answer: Recommendation) -> None:
    scores = [answer.scores, *answer.heads.values()]
    if not answer.items or not all(np.isfinite(values).all() for values in scores):
        what = "no items" if not answer.items else "scores that are no numbers"
        raise ServerError(f"{name}: refused, as it answers {what} ({answer.status}) to the recorded request {request}")


def _overlap(before: Sequence[str], after: Sequence[str]) -> float:
    return len(set(before) & set(after)) / max(len(before), 1)
