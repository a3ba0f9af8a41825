"""The tuner: its objective, its queueing model by hand, its journal, and a whole search on the real server."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest

from loadtest.tune.space import KNOBS, Objective, Trial, trials, untuned
from loadtest.tune.tune import publish, tune
from preprocessing.requests import recorded, requests_of
from serving.launcher import TritonServer
from serving.repository import served_from
from tests.support import PatientClient, on_free_ports, quiet


@pytest.fixture(scope="module")
def own(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "shop"
    shutil.copytree(root, folder, ignore=shutil.ignore_patterns("*.log"))
    return folder


def test_spaces_are_checked(own):
    start = untuned(own)
    assert trials({}, own) == [start] and start.layout == "fused"
    s = json.loads((own / "compiled" / "model_card.json").read_text())["shapes"]
    space = {"layout": ["fused", "ensemble"], "ranked": [s["candidates"], 20, 5], "preferred": [0, 4]}
    found = trials(space, own)  # 5 is fewer than TOP_K; an ensemble ranks all; nothing waits for a preferred batch
    assert {(t.layout, t.ranked) for t in found} == {
        ("fused", s["candidates"]), ("fused", 20), ("ensemble", s["candidates"]),
    } and len(found) == 3  # fmt: skip
    for bad, said in (({"speed": [1]}, "knobs"), ({"engine": ["x"]}, "engine"), ({"batch": [4], "ranked": [5]}, "one")):
        with pytest.raises(ValueError, match=said):
            trials(bad, own)


def test_a_search_on_the_live_server(own):
    """The profile serves what its quality was judged on, and the log alone gives the same decision again."""
    space = {"layout": ["fused"], "ranked": [20], "batch": [4, 16]}
    objective = Objective(95, 900, 0.5)  # just below what a queue refuses: any machine has a rate for it
    found = tune(own, objective, "tuned", 600, quiet, quiet, space, seconds=0.5)
    chosen = found["chosen"]
    start, trial, tried = asdict(untuned(own)), chosen["trial"], trials(space, own)
    assert Trial(**trial) in [untuned(own), *tried]  # which of them is the quickest is the machine's affair
    assert chosen["qps"] >= 0.9 * max(row["qps"] for row in found["trials"]) > 0  # the two best run in turns
    assert found["untuned"] and found["configurations"] == len(tried) == 2
    assert set(found["worth"]) == {knob for knob in KNOBS if trial[knob] != start[knob]}
    page = (own / "tuning" / "tuned.html").read_text()
    assert "times the untuned" in page and "on validation requests alone" in page and found["judged_on"] == "valid"

    again = tune(own, objective, "tuned", 0, quiet, quiet, space, seconds=0.5)  # no budget: only the log
    assert again == found and found["runs"] > 0  # of its log, without another run

    twenty = {**found, "chosen": {**chosen, "trial": asdict(tried[1])}}
    publish(own, "twenty", twenty, found["limits"])
    options = on_free_ports(served_from(own, "twenty") / "model_repository", profile="twenty")
    requests = requests_of(recorded(own, "valid"))[:40]
    assert all(request.types and request.context for request in requests)  # as the models read them
    with TritonServer(options) as server, PatientClient(f"{server.host}:{server.grpc_port}") as client:
        answers = [client.recommend("", r.history, 10, context=r.context).items for r in requests]
    key = json.dumps(["quality", "valid", asdict(tried[1].answer)])[:-1]
    journal = [json.loads(line) for line in (own / "tuning" / "quality.jsonl").read_text().splitlines()]
    judged = next(e["value"] for e in journal if e["key"].startswith(key))[:40]
    targets = [request.target for request in requests]
    gains = [1 / np.log2(a.index(t) + 2) if t in a else 0.0 for a, t in zip(answers, targets, strict=True)]
    assert gains == pytest.approx(judged, abs=1e-3)


def test_an_objective_out_of_reach_names_the_nearest(own):
    with pytest.raises(ValueError, match=r"not reachable here\. Nearest: p99 of \d"):
        tune(own, Objective(99, 0.05, 0.5), "never", 600, quiet, quiet, {"layout": ["fused"]}, seconds=0.5)
    with pytest.raises(ValueError, match="what was measured is kept"):
        tune(own, Objective(99, 0.06, 0.5), "never", 0, quiet, quiet, {"layout": ["fused"], "history": [3]})
    with pytest.raises(ValueError, match="every repository has"):
        tune(own, Objective(99, 50, 0.5), "fused", 0, quiet, quiet)
    assert not (own / "tuning" / "never.json").exists()
