"""Triton's own OpenTelemetry traces, received by a collector: one a request, across the stages."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tritonclient.grpc as grpcclient

from serving.launcher import TritonServer
from tests.support import on_free_ports, wait_until
from vivace import contract
from vivace.client_request import request_tensors


@pytest.fixture
def collector():
    spans: list = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))  # OTLP's JSON form
            for resource in body["resourceSpans"]:
                spans.extend(span for scope in resource["scopeSpans"] for span in scope["spans"])
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
    server.shutdown()


def traces(spans: list[dict]) -> dict[str, list[dict]]:
    """Spans by the trace they belong to."""
    by_id: dict[str, list[dict]] = {}
    for span in list(spans):
        by_id.setdefault(span["traceId"], []).append(span)
    return by_id


def is_tree_of(trace: list[dict], models: set[str]) -> bool:
    """Whether the spans are of these models and all but one hang on another of them."""
    attributes = [a for span in trace for a in span.get("attributes", []) if a["key"] == "triton.model_name"]
    ids = {span["spanId"] for span in trace}
    roots = sum(span.get("parentSpanId") not in ids for span in trace)
    return {a["value"]["stringValue"] for a in attributes} == models and roots == 1


@pytest.mark.parametrize("profile", ["", "fused"])
def test_a_request_is_one_trace_of_all_its_stages_and_continues_the_callers(root, collector, profile):
    url, spans = collector
    options = on_free_ports(root / "model_repository", profile=profile, trace_url=url, trace_rate=1)
    caller = "4bf92f3577b34da6a3ce929d0e0e4736"
    with TritonServer(options) as server, grpcclient.InferenceServerClient(f"{server.host}:{server.grpc_port}") as own:
        for headers in ({}, {"traceparent": f"00-{caller}-00f067aa0ba902b7-01"}):
            inputs = []
            for tensor, value in request_tensors("", [], 3):
                inputs.append(grpcclient.InferInput(tensor.name, list(value.shape), tensor.datatype))
                inputs[-1].set_data_from_numpy(value)
            own.infer(contract.ENSEMBLE, inputs, headers=headers)
        expected = {contract.ENSEMBLE} if profile else {*contract.STAGES, contract.ENSEMBLE}
        wait_until(
            lambda: len(traces(spans)) >= 2 and all(is_tree_of(t, expected) for t in traces(spans).values()),
            f"two trees of {sorted(expected)}",
        )
    assert caller in traces(spans) and len(traces(spans)) == 2
    assert all(is_tree_of(trace, expected) for trace in traces(spans).values())  # nothing came after
