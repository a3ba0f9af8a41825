"""Triton's own OpenTelemetry traces, received by a collector: one a request, across the stages."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tritonclient.grpc as grpcclient

from serving.launcher import ServerOptions, TritonServer
from vivace import contract
from vivace.client import request_tensors


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


@pytest.mark.parametrize("profile", ["", "fused"])
def test_a_request_is_one_trace_of_all_its_stages_and_continues_the_callers(root, collector, profile):
    url, spans = collector
    options = ServerOptions(
        root / "model_repository", http_port=0, grpc_port=0, metrics_port=0, profile=profile, trace_url=url,
        trace_rate=1, log=root / "traced.log",
    )  # fmt: skip
    caller = "4bf92f3577b34da6a3ce929d0e0e4736"
    with TritonServer(options) as server, grpcclient.InferenceServerClient(f"{server.host}:{server.grpc_port}") as own:
        for headers in ({}, {"traceparent": f"00-{caller}-00f067aa0ba902b7-01"}):
            inputs = []
            for tensor, value in request_tensors("", [], 3):
                inputs.append(grpcclient.InferInput(tensor.name, list(value.shape), tensor.datatype))
                inputs[-1].set_data_from_numpy(value)
            own.infer(contract.ENSEMBLE, inputs, headers=headers)
        deadline = time.monotonic() + 15
        traces: dict = {}
        while len(traces) < 2 or any(len(t) < 3 for t in traces.values()):
            assert time.monotonic() < deadline, spans
            time.sleep(0.2)
            traces = {}
            for span in list(spans):
                traces.setdefault(span["traceId"], []).append(span)
    time.sleep(0.2)
    assert caller in traces and len(traces) == 2
    for trace in traces.values():
        attributes = [a for span in trace for a in span.get("attributes", []) if a["key"] == "triton.model_name"]
        names = {a["value"]["stringValue"] for a in attributes}
        assert names == ({*contract.STAGES, contract.ENSEMBLE} if not profile else {contract.ENSEMBLE})
        ids = {span["spanId"] for span in trace}
        assert sum(span.get("parentSpanId") not in ids for span in trace) == 1  # one tree
