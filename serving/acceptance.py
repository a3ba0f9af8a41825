"""Whether a server of a newer version may take callers: recorded requests are put to it and to the one before.

Nobody reaches the new one yet. Another version may well answer otherwise, so what it must do is little: answer every
request whole, with numbers, not the same to everyone where the old one does not, and find what the users took next not
clearly worse than the old one does: ids that mean other items or a list of what is popular fail there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.requests import recorded, requests_of
from serving.launcher import TritonServer
from serving.releases import card_of, version_of
from serving.wheel import ServerError
from vivace.client import Recommendation
from vivace.contract import TARGET, UNLOGGED
from vivace.run import Run

TOP_K = 10
MOST = 256  # recorded requests
TIMED = 64  # of them, whose time is taken: the first
WAIT_S = 10.0
SLOWER = 5.0  # times the old one's median at one request at a time: more is refused
LEAST = 0.67  # of the old one's NDCG@10 on the recorded requests: clearly less is refused
SURE = 3.0  # standard errors of the difference
NOT_FINAL = "none"  # how the card of a version begins that was not fitted again on all events
HARDLY = 5.0  # ms; what is below is not slow, whatever the other one takes


@dataclass(frozen=True)
class Recorded:
    """A request: keyword arguments of ``VivaceClient.recommend``, and the item that its user took next."""

    call: dict[str, Any]
    target: str


@dataclass(frozen=True)
class Answers:
    """Of one server to the recorded requests, in their order; milliseconds the first ``TIMED`` took."""

    given: list[Recommendation]
    ms: list[float]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.ms) if self.ms else 0.0

    @property
    def different(self) -> int:
        return len({tuple(answer.items) for answer in self.given})

    def ndcg(self, targets: Sequence[str]) -> np.ndarray:
        """NDCG@10 of each request, float64 [requests], with its one target: 1 / log2(place + 1), from place 1."""
        places = [
            list(a.items[:TOP_K]).index(t) + 1 if t in a.items[:TOP_K] else 0
            for a, t in zip(self.given, targets, strict=True)
        ]
        return np.array([1 / np.log2(place + 1) if place else 0.0 for place in places])


def recorded_calls(run: Run) -> list[Recorded]:
    """The run's recorded validation requests; none where there are no such."""
    try:
        frame = recorded(run.root, "valid")[:MOST]
    except FileNotFoundError:
        return []
    calls = [{"user_id": r.user, "history": r.history, "context": r.context or None} for r in requests_of(frame)]
    return [Recorded(call, target) for call, target in zip(calls, frame[TARGET], strict=True)]


class Acceptance:
    """Without ``requests`` a version that came up ready is accepted. ``least``: share of the old one's NDCG@10 that the
    new one must have; 0: any. Called with (old, new); says in words what it saw. Raises ServerError with the reason why
    the new one may not take callers."""

    def __init__(self, requests: Sequence[Recorded], least: float = LEAST) -> None:
        self.requests, self.least = requests, least

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
        targets = [request.target for request in self.requests]
        ndcg, ndcg_before = after.ndcg(targets), before.ndcg(targets)
        if judged(old.release, new.release) and clearly_less(ndcg, self.least * ndcg_before):
            raise ServerError(
                f"{name}: refused, as it finds what users took next clearly worse: NDCG@{TOP_K} of {len(targets)} "
                f"recorded requests {ndcg.mean():.4f}, in {old.release.name} {ndcg_before.mean():.4f}; if that is "
                f"wanted, give --least-quality 0 (here {self.least:.2f} times the old one's)"
            )
        alike = [_overlap(a.items, b.items) for a, b in zip(before.given, after.given, strict=True)]
        return (
            f"{len(targets)} recorded requests answered; NDCG@{TOP_K} {ndcg.mean():.4f}, before "
            f"{ndcg_before.mean():.4f}; {statistics.mean(alike):.0%} of the first {TOP_K} as before; p50 "
            f"{after.median_ms:.1f} ms, before {before.median_ms:.1f} ms"
        )

    def _answers(self, server: TritonServer, strict: bool) -> Answers:
        given, ms = [], []
        with server.client(WAIT_S) as client:
            for request in self.requests:
                started = time.monotonic()
                answer = client.recommend(**request.call, top_k=TOP_K, request_id=UNLOGGED)
                ms.append((time.monotonic() - started) * 1000)
                given.append(answer)
                if strict:
                    _check(server.release.name, request.call, answer)
        return Answers(given, ms[:TIMED])


def judged(old: Path, new: Path) -> bool:
    """Whether the recorded requests say which version finds more: they are those of the newest preparation, so a
    version that is gone back to may not have learned from what they are about, nor one that was not fitted on all
    events where the old one was."""
    return version_of(new) >= version_of(old) and (_final(new) or not _final(old))


def clearly_less(values: np.ndarray, expected: np.ndarray) -> bool:
    """Whether the mean of the paired differences is below zero by ``SURE`` standard errors."""
    difference = values - expected
    return bool(difference.mean() < -SURE * difference.std() / np.sqrt(len(difference)) and difference.mean() < 0)


def _final(release: Path) -> bool:
    """Whether a version was fitted on all events, by its card; without a card it counts as not."""
    return not str(card_of(release).get("final_fit", NOT_FINAL)).startswith(NOT_FINAL)


def _check(name: str, request: dict[str, Any], answer: Recommendation) -> None:
    scores = [answer.scores, *answer.heads.values()]
    if not answer.items or not all(np.isfinite(values).all() for values in scores):
        what = "no items" if not answer.items else "scores that are no numbers"
        raise ServerError(f"{name}: refused, as it answers {what} ({answer.status}) to the recorded request {request}")


def _overlap(before: Sequence[str], after: Sequence[str]) -> float:
    return len(set(before) & set(after)) / max(len(before), 1)
