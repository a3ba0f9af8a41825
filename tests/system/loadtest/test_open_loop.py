"""The open-loop generator: arrivals, what it counts, and a server that pauses."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

from loadtest.generate.arrivals import due_times
from loadtest.generate.generator import messages, run
from loadtest.generate.run_locust import results, run_locust
from loadtest.generate.statistics import between, statistics
from tests.support import PATIENCE_S, wait_until
from vivace import contract

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

    def pause_under_load() -> None:
        with server.control_client() as triton:
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
