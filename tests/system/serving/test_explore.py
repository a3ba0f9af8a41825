"""A server that explores shows new items where its log says so, and else what the ranker chose, on the real Triton."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from preprocessing.requests import recorded, requests_of
from serving.runtime.explore import COUNTS_FILE, FEW
from serving.service import service
from tests.support import LOGS, on_free_ports, quiet, recommend_rows, wait_until
from vivace.client_request import request_tensors
from vivace.contract import FIRST_ID
from vivace.impressions.files import SCHEMA, parts

SHARE, ROWS, TOP_K = 0.2, 120, 10


def test_what_is_explored_is_logged_with_its_chance(root, served, features):
    requests = requests_of(recorded(root))[:ROWS]
    tensors = [request_tensors("", r.history, TOP_K, context=r.context) for r in requests]
    plain = np.concatenate([r.as_numpy("ITEM_ID") for r in recommend_rows(served[0], tensors)])
    name = "explored"
    with service(on_free_ports(root / "model_repository", explore=SHARE, **LOGS), quiet) as (
        server,
        _,
    ):
        shown = np.concatenate([r.as_numpy("ITEM_ID") for r in recommend_rows(server, tensors, name)])
    (counts,) = (root / "model_repository" / "response").glob(f"*/{COUNTS_FILE}")
    names = features.items()["item_id"]
    new = {item.encode() for item, count in zip(names, np.load(counts)[FIRST_ID:], strict=True) if count < FEW}

    def look() -> dict[str, dict]:
        rows = [r for p in parts(root / "impressions") for r in pq.read_table(p, schema=SCHEMA).to_pylist()]
        mine = {row["request_id"]: row for row in rows if row["request_id"].startswith(f"{name}-")}
        return mine if len(mine) == ROWS else {}

    logged = wait_until(look, f"{ROWS} rows in the log")
    chance = np.array([logged[f"{name}-{row // 30}/{row % 30}"]["propensities"] for row in range(ROWS)], np.float32)
    explored = (chance < 0.5) & (shown != plain)
    assert (shown[~explored] == plain[~explored]).all()
    assert set(np.unique(chance[~explored])) <= {np.float32(1), np.float32(1 - SHARE)}
    assert explored.sum() == pytest.approx(SHARE * (chance < 1).sum(), rel=0.35) and explored.any()
    assert set(shown[explored]) <= new and (chance[explored] <= SHARE).all()
    assert not any(item in request.items for request, row in zip(requests, shown, strict=True) for item in row)
    assert {row["status"] for row in logged.values()} == {"ok"}
