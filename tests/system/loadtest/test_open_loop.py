"""The open-loop generator: arrivals, what it counts, and a server that pauses."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as grpcclient

from loadtest.generate.arrivals import due_times, picks
from loadtest.generate.generator import LoadRun, best, knee, messages, run, summarize
from loadtest.generate.open_loop import report_page
from loadtest.generate.run_locust import results, run_locust
from loadtest.generate.statistics import between, statistics
from tests.support import PATIENCE_S, wait_until
from vivace import contract


@pytest.mark.parametrize("kind", ["poisson", "constant", "burst", "diurnal"])
def test_arrivals_have_the_rate_and_the_shape_they_promise(kind):
    due = due_times(kind, 200, 60, 3, recorded_ms=[0, 1000, 1000, 4000])
    assert len(due) == pytest.approx(12_000, rel=0.05) and (np.diff(due) >= 0).all() and due[0] >= 0 and due[-1] <= 60
    counts = np.bincount(due.astype(int), minlength=61)[:60]
    dispersion = counts.var() / counts.mean()
    assert {"poisson": 0.6 < dispersion < 1.6, "constant": dispersion < 0.01}.get(kind, dispersion > 10)
    assert np.array_equal(due, due_times(kind, 200, 60, 3, recorded_ms=[0, 1000, 1000, 4000]))
    if kind == "burst":  # the first second of five has four times the rate of the others
        assert counts[::5].sum() == pytest.approx(12_000 / 2, rel=0.05)


def test_a_run_is_summarized_from_when_requests_were_due():
    records = [(0.0, 0.0, 0.010, ""), (0.1, 0.1, 0.130, ""), (0.2, 0.25, 0.260, ""), (0.3, 0.3, 0.305, "UNAVAILABLE")]
    r = summarize(records, 4, 1, slo_ms=20)
    assert r.answered == 3 and r.refused == {"UNAVAILABLE": 1} and r.attainment == 0.25 and r.goodput == 1
    assert r.p50 == pytest.approx(30)  # 10, 30 and, though the server took 10 ms, 60 since it was due
    assert r.service_p99 < 31 and r.late == pytest.approx(48.5, abs=1)


def test_the_knee_is_found_between_the_rates_tried():
    def measure(rate: float) -> LoadRun:
        share = 1.0 if rate <= 730 else 0.5
        return LoadRun(rate, 1, 1, 1, {}, 1, 1, 1, 1, 0, 20, share, rate * share, 0, share)

    runs = knee(measure, 100, steps=6)
    met = best(runs)
    assert met is not None and 715 <= met.qps <= 730
    assert f"{met.qps:.0f} requests a second" in report_page(runs, 20, "t")
    assert best(knee(lambda rate: measure(10_000), 100, steps=2)) is None


def test_a_few_users_make_most_of_the_traffic():
    chosen = np.bincount(picks(10_000, 1000, 1.0, 3), minlength=1000)
    assert np.sort(chosen)[::-1][:100].sum() > 6000 > np.sort(np.bincount(picks(10_000, 1000, 0, 3)))[::-1][:100].sum()


PAUSE_S = 2.0


def pause(server) -> threading.Timer:
    """Stops the server for PAUSE_S; the timer that lets it go on."""
    os.kill(server.pid, signal.SIGSTOP)
    timer = threading.Timer(PAUSE_S, os.kill, (server.pid, signal.SIGCONT))
    timer.start()
    return timer


class PausedBefore(list):
    """Messages; the server is paused when number ``at`` is taken to be sent."""

    def __init__(self, messages, at: int, server) -> None:
        super().__init__(messages)
        self.at, self.server, self.timer = at, server, None

    def __getitem__(self, i):
        if i == self.at and self.timer is None:
            self.timer = pause(self.server)
        return super().__getitem__(i)


def test_a_pause_of_the_server_shows_in_the_tail(root, served):
    """Two seconds of silence: a closed loop would have sent nothing meanwhile; here everyone who was due has waited.
    Only what holds on any machine: none of those due in the first 1.5 s of the pause can be answered within 500 ms."""
    server, _ = served
    pool, due = messages(root), due_times("constant", 50, 5, 3)
    sent = PausedBefore([pool[i % len(pool)] for i in range(len(due))], 100, server)
    measured = run(f"{server.host}:{server.grpc_port}", sent, due, 5, 500, PATIENCE_S)
    sent.timer.join()
    assert measured.due == 250 == measured.answered + sum(measured.refused.values())
    assert set(measured.refused) <= {"UNAVAILABLE"}  # what sat in a queue for its timeout of a second
    assert measured.p99 > 1000 and measured.attainment <= 1 - 75 / 250


def test_locust_shows_the_pause_too(root, served):
    """Two seconds of ten: a fifth of the requests were due meanwhile, so p95 is in the pause; in locust's own count
    each user would have lost one request to it."""
    server, _ = served
    url = f"{server.host}:{server.grpc_port}"

    def pause_under_load() -> None:
        with grpcclient.InferenceServerClient(url) as triton:
            before = statistics(triton)
            asked = lambda: between(before, statistics(triton))[contract.ENSEMBLE]["requests"]  # noqa: E731
            wait_until(lambda: asked() >= 50, "50 requests of locust")
        pause(server).join()

    with ThreadPoolExecutor(1) as pool:
        paused = pool.submit(pause_under_load)
        run_locust(
            root, server.host, server.http_port, server.grpc_port, "grpc", 1, 10, quiet=True, shape="constant", qps=50
        )
        paused.result()
    (row,) = results(root)
    assert row["requests"] > 100 and row["failures"] < row["requests"]
    assert row["p95"] > 500 and row["p99"] > 1000, row
