"""Load-test readings come from the live server."""

from __future__ import annotations

import json
import time

import tritonclient.grpc as grpcclient

from loadtest.generate.statistics import between, quantiles, statistics
from preprocessing.requests import recorded, replay
from serving.runtime.pipeline import Pipeline
from serving.runtime.stages import Row
from vivace import contract
from vivace.client import VivaceClient
from vivace.store.lmdb_store import LmdbStore


def test_statistics_count_what_was_asked(served, root):
    server, _ = served
    url = f"{server.host}:{server.grpc_port}"
    source = replay(root, 1)
    with grpcclient.InferenceServerClient(url) as triton, VivaceClient(url) as client:
        before = statistics(triton)
        for _ in range(20):
            client.recommend(*next(source), 5)
        deadline = time.monotonic() + 5  # a stage counts a request a moment after it has answered it
        found = between(before, statistics(triton))
        while any(found[m]["requests"] < 20 for m in contract.STAGES) and time.monotonic() < deadline:
            found = between(before, statistics(triton))
    assert found[contract.ENSEMBLE]["requests"] == 20
    assert all(found[m]["requests"] >= 20 and found[m]["total_ms"] > 0 for m in contract.STAGES), found
    spread = quantiles(server.host, server.metrics_port)
    assert set(spread) >= {*contract.STAGES, contract.ENSEMBLE}
    assert all(s["p50"] <= s["p99"] for s in spread.values()), spread


def test_the_bound_runs_the_served_graphs(served, root):
    """What ``make bench`` calls the in-process bound gives the served answer."""
    server, _ = served
    frame = recorded(root)
    names = [""] * contract.FIRST_ID + json.loads((root / "compiled" / "items.json").read_text())
    store = LmdbStore(root / "feature_store", readonly=True)
    bound = Pipeline.published(root, store)
    with VivaceClient(f"{server.host}:{server.grpc_port}") as client:
        for user, history in list(zip(frame[contract.USER], frame[contract.ITEM], strict=True))[:5]:
            ids = bound([Row(user, list(history), 10)])[0][0][0]
            assert [names[i] for i in ids[:10]] == client.recommend(user, list(history), 10).items
    store.close()
