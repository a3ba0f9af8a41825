"""locust as an open loop, with a load shape: the same page and tables, latencies from the moment a request was due.

    locust -f loadtest/generate/locust_open.py --artifacts artifacts/shop --qps 300 --shape burst GrpcOpenUser

A locust user waits for its answer before it goes on, so a slow server is asked less and its queue is hidden. Here each
user has a timetable (Poisson, RATE a second); what it could not send in time it sends at once and counts from when it
was due. Shapes: constant, ramp (five steps), burst (a fifth of each ten seconds at four times the rate of the rest),
diurnal (a day in ``--shape-seconds``).
"""

from __future__ import annotations

import random
import time
from typing import Any

import gevent
from locust import LoadTestShape, events
from locust.env import Environment

from loadtest.generate import locustfile as closed
from loadtest.generate.run_locust import SHAPES, level

RATE = 5.0  # requests a second of one user


@events.init_command_line_parser.add_listener
def _arguments(parser: Any) -> None:
    parser.add_argument("--qps", type=float, default=100.0, help="mean rate offered (ramp: the last step's)")
    parser.add_argument("--shape", choices=SHAPES, default="constant")
    parser.add_argument("--shape-seconds", type=float, default=30.0, help="length of the run")


class Shape(LoadTestShape):
    """As many users as the rate of the moment needs."""

    def tick(self) -> tuple[int, float] | None:
        assert self.runner is not None and self.runner.environment.parsed_options is not None  # locust sets both
        options, now = self.runner.environment.parsed_options, self.get_run_time()
        if now > options.shape_seconds:
            return None
        users = max(1, round(options.qps * level(options.shape, now, options.shape_seconds) / RATE))
        return users, 1000.0


class OpenUser(closed.ReplayUser):
    """Sends by its timetable. ``due`` is when the present request should have been sent."""

    abstract = True

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.due = time.perf_counter() + random.expovariate(RATE)

    def on_start(self) -> None:
        gevent.sleep(max(0.0, self.due - time.perf_counter()))

    def wait_time(self) -> float:
        self.due += random.expovariate(RATE)
        return max(0.0, self.due - time.perf_counter())

    def started(self) -> float:
        return self.due


class GrpcOpenUser(OpenUser):
    protocol = "grpc"


class HttpOpenUser(OpenUser):
    protocol = "http"
