"""Envoy's page becomes metrics that add up over servers."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serving.door.statistics import BUCKETS_MS, MODELS, DoorStatistics

OF = 'envoy_virtual_host="grpc",envoy_route="recommend"'
COUNTS = [0, 1, 3, 7, 8, 8, 9, 9, 9, 9, 9]  # of calls below each bound, two more above 2 s
PAGE = "\n".join(
    [
        "# TYPE envoy_http_downstream_rq_rx_reset counter",
        'envoy_http_downstream_rq_rx_reset{envoy_http_conn_manager_prefix="http"} 4',
        "# TYPE envoy_vhost_route_upstream_rq counter",
        f'envoy_vhost_route_upstream_rq{{envoy_response_code="200",{OF}}} 10',
        f'envoy_vhost_route_upstream_rq{{envoy_response_code="503",{OF}}} 1',
        "# TYPE envoy_vhost_route_upstream_rq_time histogram",
        *(
            f'envoy_vhost_route_upstream_rq_time_bucket{{{OF},le="{b}"}} {n}'
            for b, n in zip([*BUCKETS_MS, "+Inf"], [*COUNTS, 11], strict=True)
        ),
        f"envoy_vhost_route_upstream_rq_time_sum{{{OF}}} 5250.5",
        f"envoy_vhost_route_upstream_rq_time_count{{{OF}}} 11",
    ]
)


def samples(page: str) -> dict[tuple[str, ...], float]:
    """Value by name and labels of what Prometheus scrapes."""
    registry = CollectorRegistry()
    registry.register(DoorStatistics(lambda path: page))
    text = generate_latest(registry).decode()
    return {
        (s.name, *(v for _, v in sorted(s.labels.items()) if v)): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_a_page_becomes_buckets_in_seconds_codes_and_callers_that_left():
    values = samples(PAGE)
    assert values["vivace_request_seconds_bucket", "0.001", "recommend", "grpc"] == 0
    assert values["vivace_request_seconds_bucket", "0.01", "recommend", "grpc"] == 7
    assert values["vivace_request_seconds_bucket", "2.0", "recommend", "grpc"] == 9
    assert values["vivace_request_seconds_count", "recommend", "grpc"] == 11
    assert values["vivace_request_seconds_sum", "recommend", "grpc"] == pytest.approx(5.2505)
    assert values["vivace_requests_total", "503", "recommend", "grpc"] == 1
    assert values["vivace_requests_hung_up_total", "http"] == 4


def test_calls_of_a_version_on_trial_are_those_of_recommend_under_its_variant():
    values = samples(PAGE.replace('envoy_route="recommend"', 'envoy_route="trial"'))
    assert values["vivace_request_seconds_bucket", "0.01", "recommend", "grpc", "trial"] == 7
    assert values["vivace_request_seconds_count", "recommend", "grpc", "trial"] == 11
    assert values["vivace_requests_total", "503", "recommend", "grpc", "trial"] == 1
    assert values["vivace_request_seconds_count", "recommend", "grpc"] == 0


def test_what_never_happened_counts_from_zero():
    """Else the first failure of a server would be no increase to Prometheus."""
    values = samples(PAGE)
    for model in MODELS:
        assert values["vivace_requests_total", "503", model, "http"] == 0
        assert values["vivace_request_seconds_count", model, "http"] == 0


def test_an_envoy_that_does_not_answer_is_no_count_of_zero():
    """Which Prometheus would take for a restart, and the next page for as many new calls."""
    assert not any(name.startswith("vivace_request") for name, *_ in samples(""))


def test_there_are_as_many_series_whatever_comes():
    assert len([key for key in samples(PAGE) if key[0].startswith("vivace_request_seconds")]) == len(MODELS) * 2 * 14
