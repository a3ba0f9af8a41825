"""What Envoy counts of the public calls, as metrics that add up over servers: a histogram of their time, answers by
code, and callers that hung up.

Triton's own latencies are summaries, and quantiles of several servers cannot be added. Envoy sees what a caller waits
for, from the whole request to the whole answer, tries again included.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from vivace import contract
from vivace.explain_contract import EXPLAIN

BUCKETS_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
BOUNDS = (*(str(ms / 1000) for ms in BUCKETS_MS), "+Inf")
MODELS = (contract.ENSEMBLE, EXPLAIN, contract.APPEND_EVENT, contract.UPDATE_STORE)
PROTOCOLS = ("grpc", "http")  # names of the door's listeners
CODES = ("200", "500", "503", "504")  # there from the start, so that the first failure is an increase
TRIAL = "trial"  # name of the route of a version on trial (``serving.door.routes.ON_TRIAL``)
_ROUTE = r"vhost\.(grpc|http)\.route\.\w+\.upstream_rq_"
_KEPT = (rf"{_ROUTE}time", rf"{_ROUTE}[1-5]\d\d", r"http\.(grpc|http)\.downstream_rq_rx_reset")
PAGE = "/stats?format=prometheus&filter=^vhost%5C.|downstream_rq_rx_reset$"


def stats_config(*more: str) -> dict[str, Any]:
    """Envoy's ``stats_config``: the statistics above and those that match ``more``, and no other, so that neither
    memory nor the page grows with what callers send."""
    return {
        "stats_matcher": {"inclusion_list": {"patterns": [{"safe_regex": {"regex": r}} for r in (*more, *_KEPT)]}},
        "histogram_bucket_settings": [{"match": {"safe_regex": {"regex": _KEPT[0]}}, "buckets": list(BUCKETS_MS)}],
    }


class DoorStatistics:
    """A collector for a registry of prometheus_client.

    ``page``: the text of Envoy's admin page at a path, "" where Envoy does not answer; nothing is collected then.
    Envoy counts from 0 when it is started again, as every counter may.
    """

    def __init__(self, page: Callable[[str], str]) -> None:
        self._page = page

    def describe(self) -> Iterator[Metric]:
        """Nothing, so that a registry does not ask Envoy before it runs."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        text = self._page(PAGE)
        return from_page(text) if text else iter(())


def from_page(text: str) -> Iterator[Metric]:
    """``vivace_request_seconds`` (model, protocol, variant), ``vivace_requests_total`` (model, protocol, variant, code)
    and ``vivace_requests_hung_up_total`` (protocol) of a page in Prometheus' format; variant "trial": answered by a
    version on trial. A bucket holds the calls that took less than its bound: Envoy rounds down to whole milliseconds.
    It tells the histogram every five seconds."""
    buckets = {(m, p, ""): dict.fromkeys(BOUNDS, 0.0) for m in MODELS for p in PROTOCOLS}
    sums = dict.fromkeys(buckets, 0.0)
    answers = {(*key, code): 0.0 for key in buckets for code in CODES}
    hung_up: dict[str, float] = defaultdict(float)
    for sample in (s for family in text_string_to_metric_families(text) for s in family.samples):
        name, labels = sample.name, sample.labels
        route, protocol = labels.get("envoy_route", ""), labels.get("envoy_virtual_host", "")
        key = (contract.ENSEMBLE, protocol, TRIAL) if route == TRIAL else (route, protocol, "")
        if name.endswith("_rq_time_bucket"):
            bound = labels["le"]
            buckets.setdefault(key, dict.fromkeys(BOUNDS, 0.0))[
                bound if bound == "+Inf" else str(float(bound) / 1000)
            ] = sample.value
        elif name.endswith("_rq_time_sum"):
            sums[key] = sample.value / 1000
        elif code := labels.get("envoy_response_code"):
            answers[*key, code] = sample.value
        elif "_rq_rx_reset" in name:
            hung_up[labels["envoy_http_conn_manager_prefix"]] += sample.value
    labels_of = ["model", "protocol", "variant"]
    seconds = HistogramMetricFamily(
        "vivace_request_seconds", "From the whole request to the whole answer", labels=labels_of
    )
    for key, counts in buckets.items():
        seconds.add_metric(list(key), list(counts.items()), sums.get(key, 0.0))
    requests = CounterMetricFamily("vivace_requests", "Calls that were answered", labels=[*labels_of, "code"])
    for of, value in answers.items():
        requests.add_metric(list(of), value)
    left = CounterMetricFamily("vivace_requests_hung_up", "Callers that left before the answer", labels=["protocol"])
    for protocol, value in hung_up.items():
        left.add_metric([protocol], value)
    yield from (seconds, requests, left)
