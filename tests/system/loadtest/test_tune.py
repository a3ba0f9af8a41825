"""The tuner: its objective, its queueing model by hand, its journal, and a whole search on the real server."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest

from loadtest.generate.run_locust import level
from loadtest.tune.journal import BudgetError, Journal
from loadtest.tune.queueing import Batcher, Service, knee, latencies
from loadtest.tune.space import Objective, Trial, trials, untuned
from loadtest.tune.tune import tune
from preprocessing.requests import recorded
from serving.launcher import TritonServer
from serving.repository import served_from
from tests.support import PatientClient, on_free_ports, quiet
from vivace import contract


@pytest.fixture(scope="module")
def own(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "shop"
    shutil.copytree(root, folder, ignore=shutil.ignore_patterns("*.log"))
    return folder


def test_objectives_are_read_or_refused():
    assert Objective.parse("p99.9=5ms", 0.98) == Objective(99.9, 5, 0.98)
    for slo, quality, said in (("99%=20", 1, "p99=20ms"), ("p100=20ms", 1, "p99=20ms"), ("p99=20ms", 1.2, "share")):
        with pytest.raises(ValueError, match=said):
            Objective.parse(slo, quality)


def test_the_queue_by_hand():
    """M/D/1 waits rho S / (2 (1 - rho)) on average (Pollaczek-Khinchine): 5 ms of work, 100 a second, 2.5 ms."""
    one = Service({1: 5.0, 2: 6.0}, request=0.0, batch=0.0)
    found = np.mean([latencies(one, 100, Batcher(1, 1), 1, seed).mean() for seed in range(8)])
    assert found == pytest.approx(5 + 2.5, rel=0.06)
    assert latencies(one, 0.01, Batcher(1, 2, 0, 3.0), 1).max() == pytest.approx(8)  # alone: the delay and the work
    assert [Batcher(1, 16, 4).size(n) for n in (1, 3, 4, 7, 8, 15, 16, 40)] == [1, 3, 4, 4, 8, 8, 16, 16]
    pairs = Service({1: 5.0, 2: 5.0}, 0.0, 0.0)
    single, both = (knee(pairs, Batcher(1, b), 1, 99, 50) for b in (1, 2))
    assert 150 < single < 200 and 1.8 * single < both < 400  # bounds: 200 and 400 a second
    assert knee(pairs, Batcher(1, 2), 1, 99, 4.9) == 0


def test_a_journal_keeps_what_was_measured_beyond_a_cut_line(tmp_path):
    path = tmp_path / "log.jsonl"
    first = Journal(path, 60)
    assert first(["run", 1], lambda: 3.5) == 3.5 and first(["run", 1], lambda: 0) == 3.5
    with path.open("a") as log:
        log.write('{"key": "[\\"run\\", 2]", "val')  # cut off
    again = Journal(path, -1)
    assert again(["run", 1], lambda: 0) == 3.5
    with pytest.raises(BudgetError):
        again(["run", 2], lambda: 4)


def test_spaces_are_checked(own):
    start = untuned(own)
    assert trials({}, own) == [start] and start.layout == "ensemble"
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
    assert chosen["qps"] > 0 and chosen["trial"]["layout"] == "fused" and chosen["trial"]["ranked"] == 20
    assert found["untuned"] and found["configurations"] == 2 and set(found["worth"]) >= {"layout", "ranked"}
    page = (own / "tuning" / "tuned.html").read_text()
    assert "times the untuned" in page and "on validation requests alone" in page and found["judged_on"] == "valid"

    again = tune(own, objective, "tuned", 0, quiet, quiet, space, seconds=0.5)  # no budget: only the log
    assert again == found and found["runs"] > 0  # of its log, without another run

    options = on_free_ports(served_from(own, "tuned") / "model_repository", profile="tuned")
    frame = recorded(own, "valid")
    histories, targets = frame[contract.ITEM].tolist(), frame[contract.TARGET].tolist()
    with TritonServer(options) as server, PatientClient(f"{server.host}:{server.grpc_port}") as client:
        answers = [client.recommend("", list(h), 10).items for h in histories[:40]]
    key = json.dumps(["quality", "valid", asdict(Trial(**chosen["trial"]).answer)])[:-1]
    journal = [json.loads(line) for line in (own / "tuning" / "quality.jsonl").read_text().splitlines()]
    judged = next(e["value"] for e in journal if e["key"].startswith(key))[:40]
    gains = [1 / np.log2(a.index(t) + 2) if t in a else 0.0 for a, t in zip(answers, targets, strict=False)]
    assert gains == pytest.approx(judged, abs=1e-3)


def test_an_objective_out_of_reach_names_the_nearest(own):
    with pytest.raises(ValueError, match=r"not reachable here\. Nearest: p99 of \d"):
        tune(own, Objective(99, 0.05, 0.5), "never", 600, quiet, quiet, {"layout": ["fused"]}, seconds=0.5)
    with pytest.raises(ValueError, match="what was measured is kept"):
        tune(own, Objective(99, 0.06, 0.5), "never", 0, quiet, quiet, {"layout": ["fused"], "history": [3]})
    with pytest.raises(ValueError, match="every repository has"):
        tune(own, Objective(99, 50, 0.5), "fused", 0, quiet, quiet)
    assert not (own / "tuning" / "never.json").exists()


def test_load_shapes_keep_their_mean():
    for shape in ("constant", "burst", "diurnal"):
        assert np.mean([level(shape, t / 100, 60) for t in range(6000)]) == pytest.approx(1, abs=0.01)
    assert [level("ramp", t, 50) for t in (0, 10, 49)] == [0.2, 0.4, 1.0] and level("burst", 1, 60) == 2.5
