"""What a running server counts of requests and answers is near that of training, and a shift is seen, on the real
Triton."""

from __future__ import annotations

import time

import pytest

from preprocessing.requests import recorded, requests_of
from serving.control import control_socket, running_servers
from serving.drift import Drift
from serving.runtime.drift import TURN_S
from tests.support import PatientClient, recommend_rows, wait_until
from vivace.client_request import request_tensors
from vivace.drift import SHIFTED, Reference
from vivace.run import Run

COUNTED = 360


def from_now_on(fleet) -> Drift:
    """Counts requests from here on alone."""
    drift, seen = Drift(fleet.counting), list[dict]()

    def nothing_more() -> bool:
        """What waits in the workers is counted: a turn of theirs brings no more."""
        drift.look(0.0)
        seen.append({row["feature"]: row["requests"] for row in drift.report(now_s=0.0)[0]["features"]})
        return len(seen) > 1 and seen[-1] == seen[-2]

    wait_until(nothing_more, "workers that count no more", every_s=TURN_S + 0.2)
    return drift


def rows_of(drift: Drift, requests: int) -> dict:
    def look() -> dict:
        drift.look(time.time())
        (report,) = drift.report()
        rows = {row["feature"]: row for row in report["features"]} | {"clicked": report["clicked"]}
        return rows if min(row["requests"] for row in report["features"]) >= requests else {}

    return wait_until(look, f"{requests} requests counted", every_s=0.2)


def test_recorded_requests_are_near_training_and_a_planted_shift_is_seen(fleet, served, root):
    server, (file,) = served[0], (root / "model_repository" / "recommend").glob("*/drift.json")
    reference = Reference.load(file)
    requests, since = requests_of(recorded(root))[:COUNTED], from_now_on(fleet)
    recommend_rows(server, [request_tensors("", r.history, 10, context=r.context) for r in requests])
    with PatientClient(f"{server.host}:{server.grpc_port}") as client:
        answer = client.recommend("", top_k=10)  # without a history it is not counted
        client.append("who clicks", answer.items[0], "click", request_id=answer.request_id)
    same = rows_of(since, COUNTED)
    assert set(same) - {"clicked"} == {feature.name for feature in reference.features}
    judged = [row for name, row in same.items() if name != "clicked" and row["psi"] is not None]
    assert judged and not [row for row in judged if row["psi"] >= 0.1], judged
    assert float(same["score"]["now"]) == pytest.approx(float(same["score"]["reference"]), rel=0.2)
    assert {row["requests"] for name, row in same.items() if name != "clicked"} == {COUNTED}
    assert same["clicked"] == 1

    shifted, device = from_now_on(fleet), {"device": "a new one"}
    recommend_rows(server, [request_tensors("", [*r.items[:3], "unknown"], 10, context=device) for r in requests])
    rows = rows_of(shifted, COUNTED)
    for name in ("history length", "unknown share", "context device"):
        assert rows[name]["verdict"] == SHIFTED, rows[name]


def test_the_supervisor_says_it(fleet, root):
    fleet.drift.look(time.time())
    families = {metric.name: metric for metric in fleet.drift.collect()}
    features = {sample.labels["feature"] for sample in families["vivace_drift_requests"].samples}
    assert {"score", "probability click", "history length"} <= features
    assert "vivace_drift_psi" in families and families["vivace_expected_clicks"].samples[0].value >= 0
    with control_socket(fleet):
        (server,) = [s for s in running_servers(Run(root)) if s.state["release"] == str(fleet.release)]
        (report,) = server.drift(0)
        assert {row["feature"] for row in report["features"]} == features
        (before,) = server.drift(5)  # nobody was here
        assert all(row["verdict"].startswith("too few") for row in before["features"] if row["requests"] == 0)
