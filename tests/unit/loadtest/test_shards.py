"""Simulated shards by hand: cores that are shared, the slowest of all, twins that are asked as well."""

from __future__ import annotations

import numpy as np
import pytest

from loadtest.tune.shards import Cluster, Measured, on_one_machine, over_machines, shared_finish


def test_jobs_share_the_cores_of_a_machine():
    finish = lambda release, work, cores, slowed=1.0: shared_finish(  # noqa: E731
        np.array(release, float), np.array(work, float), cores, slowed
    )
    assert finish([0, 0], [4, 4], 2) == pytest.approx(4)
    assert finish([0, 0, 0, 0], [4, 4, 4, 4], 2) == pytest.approx(8)  # half a core each
    assert finish([0, 0, 0], [2, 4, 6], 1) == pytest.approx(12)  # no core is idle
    assert finish([0, 3], [4, 4], 1) == pytest.approx(8)
    assert finish([0, 10], [4, 4], 1) == pytest.approx(14)  # idle in between
    assert finish([0, 0], [4, 4], 2, 1.5) == pytest.approx(6)
    assert finish([0], [4], 2, 1.5) == pytest.approx(4)  # alone nothing slows it


def test_all_shards_and_who_asks_on_one_machine():
    fixed = Measured(service=[4.0], call=2.0)
    assert on_one_machine(fixed, 2, 2, requests=5) == pytest.approx(7)  # the second question leaves at 2, is back at 7


def test_the_slowest_of_many_is_seldom_a_quick_one():
    """One question in a hundred takes 50 ms: of 64, 1 - .99^64 = 47 % of the requests have such a one."""
    measured = Measured(service=[1.0] * 99 + [50.0], call=0.0)
    alone = over_machines(measured, Cluster(shards=64, network_ms=0), qps=1, requests=4000)
    assert alone.asked_twice == 0 and (alone.ms > 49).mean() == pytest.approx(1 - 0.99**64, abs=0.03)
    both = over_machines(measured, Cluster(shards=64, twins=2, hedge_ms=2, network_ms=0), qps=1, requests=4000)
    assert both.asked_twice == pytest.approx(0.01, abs=0.002)
    assert (both.ms > 49).mean() == pytest.approx(1 - (1 - 0.01**2) ** 64, abs=0.01)
    assert np.median(both.ms) <= 3 and both.questions.shape == (4000, 64)


def test_questions_wait_for_those_before_them():
    """M/D/1: rho S / (2 (1 - rho)) on average; 5 ms of work, 100 a second: 2.5 ms."""
    one = Measured(service=[5.0], call=0.0)
    waited = over_machines(one, Cluster(shards=1, network_ms=0), qps=100, requests=20_000)
    assert waited.ms.mean() == pytest.approx(5 + 2.5, rel=0.08)


def test_as_few_are_asked_twice_as_may_be():
    """Where nearly all are slow, hedging is held to its share, so that queues stay as they are but for that."""
    measured = Measured(service=[10.0], call=0.0)
    once = over_machines(measured, Cluster(shards=4, twins=2, network_ms=0), qps=100, requests=4000)
    hasty = Cluster(shards=4, twins=2, hedge_ms=1, hedge_share=0.05, hedges_at_once=1, network_ms=0)
    twice = over_machines(measured, hasty, qps=100, requests=4000)
    assert once.asked_twice == 0 and twice.asked_twice == pytest.approx(0.05, abs=0.01)
    assert np.percentile(once.ms, 99) < np.percentile(twice.ms, 99) < 1.5 * np.percentile(once.ms, 99)
