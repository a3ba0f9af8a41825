"""locust users that replay held-out requests against ``recommend``, over gRPC and HTTP.

    locust -f loadtest/generate/locustfile.py --artifacts artifacts/shop GrpcUser HttpUser

Headless with ``--headless -u 16 -t 30s``; without it locust's own page is on 127.0.0.1:8089. Each reply is checked: a
request that answers nothing counts as a failure.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import grpc.experimental.gevent as grpc_gevent
from locust import User, constant, events, task
from locust.env import Environment

from preprocessing.requests import replay
from vivace.client import VivaceClient

grpc_gevent.init_gevent()
_seeds = itertools.count(1)


@events.init_command_line_parser.add_listener
def _arguments(parser: Any) -> None:
    parser.add_argument("--artifacts", type=str, default="artifacts/shop", help="artifacts/<name> of the served models")
    parser.add_argument("--grpc-url", type=str, default="127.0.0.1:8001")
    parser.add_argument("--http-url", type=str, default="127.0.0.1:8000")
    parser.add_argument("--top-k", type=int, default=10)


class ReplayUser(User):
    """Calls ``recommend`` again and again without a pause (closed loop)."""

    abstract = True
    wait_time = constant(0)
    protocol = ""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        options = environment.parsed_options
        assert options is not None  # locust sets it before it makes users
        self.requests = replay(Path(options.artifacts), next(_seeds))
        self.top_k = options.top_k
        self.client = VivaceClient(options.grpc_url if self.protocol == "grpc" else options.http_url, self.protocol)

    @task
    def recommend(self) -> None:
        request = next(self.requests)
        problem: Exception | None = None
        started, size = self.started(), 0
        try:
            answer = self.client.recommend(request.user, request.history, self.top_k, context=request.context)
            size = len(answer.items)
            if size == 0:
                problem = ValueError(f"no items for user {request.user}: {answer.status}")
        except Exception as error:
            problem = error
        self.environment.events.request.fire(
            request_type=self.protocol,
            name="recommend",
            response_time=(time.perf_counter() - started) * 1000,
            response_length=size,
            exception=problem,
            context={},
        )

    def started(self) -> float:
        """The moment from which the present request's latency counts."""
        return time.perf_counter()

    def on_stop(self) -> None:
        self.client.close()


class GrpcUser(ReplayUser):
    protocol = "grpc"


class HttpUser(ReplayUser):
    protocol = "http"
