"""Load-test readings come from the live server."""

from __future__ import annotations

import json
import time

from benchmarks.bound import Bound, Graphs
from loadtest.generate.statistics import between, quantiles, statistics
from preprocessing.requests import recorded, replay
from serving.health import CANARY_S
from serving.runtime.stages import Row
from tests.support import PatientClient, wait_until
from vivace import contract


def test_statistics_count_what_was_asked(served, root):
    server, _ = served
    url = f"{server.host}:{server.grpc_port}"
    source = replay(root, 1)
    with server.control_client() as triton, PatientClient(url) as client:
        before, began = statistics(triton), time.monotonic()
        for _ in range(20):
            request = next(source)
            client.recommend(request.user, request.history, 5, context=request.context)

        def counted() -> dict | None:
            counts = between(before, statistics(triton))
            return counts if all(counts[m]["requests"] >= 20 for m in (contract.ENSEMBLE, *contract.STAGES)) else None

        counts = wait_until(counted, "20 requests in each stage")  # counted a moment after the answer
    canaries = (time.monotonic() - began) / CANARY_S + 2  # the supervisor's own questions
    assert 20 <= counts[contract.ENSEMBLE]["requests"] <= 20 + canaries
    assert all(counts[m]["total_ms"] > 0 for m in contract.STAGES), counts
    spread = quantiles(server.host, server.metrics_port)
    assert set(spread) >= {*contract.STAGES, contract.ENSEMBLE}
    assert all(s["p50"] <= s["p99"] for s in spread.values()), spread


def test_the_bound_runs_the_served_graphs(served, root):
    """What ``make bench`` calls the bound gives the served answer, and every process of it does its part."""
    server, _ = served
    frame = recorded(root)
    names = [""] * contract.FIRST_ID + json.loads((root / "compiled" / "items.json").read_text())
    graphs = Graphs(root, root, 0, 0, whole=True)
    with graphs.opened() as bound, PatientClient(f"{server.host}:{server.grpc_port}") as client:
        for user, history in list(zip(frame[contract.USER], frame[contract.ITEM], strict=True))[:5]:
            ids = bound([Row(user, list(history), 10)])[0][0][0]
            assert [names[i] for i in ids[:10]] == client.recommend(user, list(history), 10).items
    rows = [Row("", list(h), 10) for h in frame[contract.ITEM].head(50)]
    with Bound(graphs, rows, 2) as processes:
        both = processes.throughput(4, 0.3)
    assert both["qps"] > 0 and 0 < both["cpu_ms"] < 1000
