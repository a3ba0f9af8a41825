"""The long run in small: every kind of call, a worker killed, and what is reported of it."""

from __future__ import annotations

import json

from benchmarks.soak import main


def test_a_short_soak_answers_rightly_and_leaves_nothing(root, tmp_path):
    saved = tmp_path / "soak.json"
    main(root, minutes=0.2, qps=40, kill_every_s=3, save=saved, seed=3)
    result = json.loads(saved.read_text())
    totals = result["totals"]
    assert totals["right"] > 50 and "wrong" not in totals and "malformed answered" not in totals
    assert totals["malformed refused"] and totals["cancelled"] and result["appended"]
    assert not result["lost"] and not result["left"] and result["exit_code"] == 0 and result["workers_killed"]
    assert {"supervisor", "tritonserver", "envoy", "recommend"} <= set(result["rows"][0]["pss_mib"])
