"""The histogram of the status page counts what callers waited for, through the real Envoy."""

from __future__ import annotations

import contextlib
import time
import urllib.error
import urllib.request

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.support import PatientClient, wait_until
from vivace.client import VivaceError

BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, float("inf"))


def metric(fleet, name: str, **labels: str) -> dict[str, float]:
    """Values of a metric's samples that have ``labels``, by bound or code ("" without)."""
    values = {}
    for family in text_string_to_metric_families(generate_latest(fleet.registry).decode()):
        for s in family.samples:
            if s.name == name and labels.items() <= s.labels.items():
                values[s.labels.get("le", s.labels.get("code", ""))] = s.value
    return values


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_calls_are_counted_by_time_and_code(fleet, protocol):
    server = fleet.replicas[0].server
    of = {"model": "append_event", "protocol": protocol}  # which nobody calls but this test
    codes = metric(fleet, "vivace_requests_total", **of)

    def told() -> dict[str, float] | None:  # every five seconds, of all calls before this test
        buckets = metric(fleet, "vivace_request_seconds_bucket", **of)
        return buckets if buckets["+Inf"] >= sum(codes.values()) else None

    before = wait_until(told, "a histogram of the calls before")
    assert [float(bound) for bound in before] == list(BOUNDS)
    port = server.grpc_port if protocol == "grpc" else server.http_port
    took_s = []
    with PatientClient(f"{server.host}:{port}", protocol) as client:
        item = client.recommend("", [], 1).items[0]
        for n in range(20):
            began = time.perf_counter()
            client.append(f"counted over {protocol}", item, "click", event_id=f"{protocol} {n}")
            took_s.append(time.perf_counter() - began)
        with pytest.raises(VivaceError):
            client.append("", item, "click")

    def increase() -> dict[str, float]:
        now = metric(fleet, "vivace_request_seconds_bucket", **of)
        return {bound: now[bound] - before[bound] for bound in now}

    counted = wait_until(lambda: (more := increase())["+Inf"] >= 21 and more, "21 calls in the histogram")
    assert counted["+Inf"] == 21 and sorted(counted.values()) == list(counted.values())
    for bound, calls in counted.items():  # Envoy saw no call take longer than its caller did
        assert calls >= sum(seconds < float(bound) for seconds in took_s), bound
    more = {c: n - codes.get(c, 0) for c, n in metric(fleet, "vivace_requests_total", **of).items()}
    assert more["200"] == 20 and more.pop("400", 0) + more["500"] == 1 and more["503"] == 0


def test_a_caller_that_leaves_is_counted(fleet):
    server = fleet.replicas[0].server
    before = metric(fleet, "vivace_requests_hung_up_total", protocol="http")[""]
    with PatientClient(f"{server.host}:{server.http_port}", "http") as client:

        def left() -> float:
            with contextlib.suppress(VivaceError):
                client.recommend("", [], 3, within_ms=1)
            return metric(fleet, "vivace_requests_hung_up_total", protocol="http")[""] - before

        wait_until(left, "a call that its caller gave up")


def test_nobody_outside_reads_envoys_page(fleet):
    server = fleet.replicas[0].server
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://{server.host}:{server.http_port}/stats/prometheus", timeout=5)
