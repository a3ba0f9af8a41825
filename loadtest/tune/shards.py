"""What retrieval in shards takes where it cannot be run: measured times of one shard, put together by simulation.

An answer is as late as the slowest of its shards (Dean & Barroso, "The Tail at Scale", 2013), so what one shard does
once in a hundred questions, 64 of them do every second time. Axis legend: R requests, S shards, P twins of a shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Milliseconds, as measured of a shard of one size."""

    service: Sequence[float]
    """From the question to the answer of a shard that nobody else asks, beside the work of who asks."""
    call: float
    """Processor time of who asks, a question."""
    slowed: float = 1.0
    """Times as long while other shards of the machine are at work: they share its memory's bandwidth."""


def shared_finish(release_S: np.ndarray, work_S: np.ndarray, cores: int, slowed: float) -> float:
    """When the last of the jobs is done that a machine's cores are shared among evenly (processor sharing)."""
    left, now, done = work_S.astype(float), 0.0, np.zeros(len(work_S), bool)
    while not done.all():
        active = ~done & (release_S <= now + 1e-12)
        waiting = ~done & ~active
        next_release = release_S[waiting].min(initial=np.inf)
        if not active.any():
            now = next_release
            continue
        count = int(active.sum())
        speed = min(1.0, cores / count) / (slowed if count > 1 else 1.0)
        step = min(left[active].min() / speed, next_release - now)
        left[active] -= step * speed
        now += step
        done |= active & (left <= 1e-9)
    return now


def on_one_machine(measured: Measured, shards: int, cores: int, requests: int = 2000, seed: int = 7) -> np.ndarray:
    """Milliseconds [R] from a request to its merged answer, one at a time, with all shards and who asks on one machine.

    Half of a call's work is before the question is out, half after its answer is in, one after the other."""
    rng = np.random.default_rng(seed)
    work_RS = rng.choice(np.asarray(measured.service), (requests, shards))
    release_S = measured.call / 2 * np.arange(1, shards + 1)
    ends = [shared_finish(release_S, work_S, cores, measured.slowed) for work_S in work_RS]
    return np.array(ends) + measured.call / 2


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A shard a machine, or a machine for each twin of it; any number of servers in front."""

    shards: int
    twins: int = 1
    hedge_ms: float = float("inf")
    """A twin is asked too where no answer came by then..."""
    hedge_share: float = 0.05
    """...of at most this share of the questions to its shard..."""
    hedges_at_once: float = 4.0
    """...and of so many in a row."""
    network_ms: float = 0.2
    """There and back, assumed."""


@dataclass(frozen=True)
class Outcome:
    """``ms`` [R] of the requests, ``questions`` ms [R, S] of those to the shards; ``asked_twice``: share of them that
    went to a twin as well."""

    ms: np.ndarray
    questions: np.ndarray
    asked_twice: float


def over_machines(measured: Measured, cluster: Cluster, qps: float, requests: int = 10_000, seed: int = 7) -> Outcome:
    """Requests that come at random at ``qps``. Each machine answers one question at a time, in their order; twins take
    turns; who asks has as many cores as it needs."""
    rng, c = np.random.default_rng(seed), cluster
    arrivals = np.cumsum(rng.exponential(1000 / qps, requests))
    service = np.asarray(measured.service, float)
    first_RS, second_RS = rng.choice(service, (2, requests, c.shards))
    free_SP, places = np.zeros((c.shards, c.twins)), np.arange(c.shards)
    done_RS, hedged_S, next_hedge = np.empty((requests, c.shards)), np.zeros(c.shards, np.int64), 0
    tokens_S = np.full(c.shards, c.hedges_at_once)
    for r, arrival in enumerate(np.append(arrivals, np.inf)):  # in each shard's time, which begins when it is sent to
        while next_hedge < r and c.twins > 1 and arrivals[next_hedge] + c.hedge_ms <= arrival:
            again = arrivals[next_hedge] + c.hedge_ms
            late = np.flatnonzero(done_RS[next_hedge] > again)
            tokens_S = np.minimum(tokens_S + c.hedge_share, c.hedges_at_once)
            late = late[tokens_S[late] >= 1]
            tokens_S[late] -= 1
            twin = (next_hedge + late + 1) % c.twins
            free_SP[late, twin] = np.maximum(again, free_SP[late, twin]) + second_RS[next_hedge, late]
            done_RS[next_hedge, late] = np.minimum(done_RS[next_hedge, late], free_SP[late, twin])
            hedged_S[late] += 1
            next_hedge += 1
        if r < requests:
            twin = (r + places) % c.twins
            free_SP[places, twin] = np.maximum(arrival, free_SP[places, twin]) + first_RS[r]
            done_RS[r] = free_SP[places, twin]
    questions_RS = done_RS - arrivals[:, None]
    sent_S = measured.call / 2 * np.arange(1, c.shards + 1)
    ms = (questions_RS + sent_S).max(1) + c.network_ms + measured.call / 2
    return Outcome(ms, questions_RS, float(hedged_S.sum()) / (requests * c.shards))
