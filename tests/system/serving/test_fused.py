"""All stages in one process: the same answers, deadlines, and what is left out under load, on the real Triton."""

from __future__ import annotations

import copy
import re
import time
import urllib.request

import numpy as np
import pytest
import tritonclient.grpc as grpcclient

from benchmarks.answers import agreement
from loadtest.generate.generator import messages, run
from preprocessing.requests import recorded
from serving.drift import Drift
from serving.fleet import warm_up
from serving.runtime.by_length import chunks
from serving.runtime.overload import Level, Overload
from serving.runtime.pipeline import Pipeline
from serving.runtime.stages import Row
from serving.service import service
from tests.support import LOGS, NOON, PATIENCE_S, PatientClient, logged, on_free_ports, patient, quiet, wait_until
from training.presets import shapes, tiny
from vivace import contract
from vivace.client import Explained, Recommendation, VivaceError
from vivace.client_request import request_tensors
from vivace.store.lmdb_store import LmdbStore


@pytest.fixture(scope="module")
def fused(root):
    options = on_free_ports(root / "model_repository", profile="fused", **LOGS)
    with service(options, quiet) as (server, watchdog):
        yield server, watchdog


@pytest.fixture(scope="module")
def pipeline(root, features):
    store = LmdbStore(root / "feature_store", readonly=True)
    version = max(p.name for p in (root / "model_repository" / contract.RANKING).iterdir() if p.name.isdigit())
    yield Pipeline(root / "model_repository", version, shapes(tiny(), features), store)
    store.close()


def test_what_one_process_shows_is_logged(fused, root):
    with PatientClient(f"{fused[0].host}:{fused[0].grpc_port}") as client:
        answer = client.recommend("someone fused", top_k=3, context={"device": "tv"})
    row = logged(root, answer.request_id)
    assert (row["user_id"], row["items"], row["status"]) == ("someone fused", answer.items, answer.status)
    assert (row["scores"], row["context"]) == (answer.scores.tolist(), '{"device": "tv"}')


def test_one_process_counts_what_its_requests_look_like(fused, root):
    server, drift = fused[0], Drift(lambda: [(fused[0].release, fused[0].drift)])
    history = [i for h in recorded(root).head(5)[contract.ITEM] for i in h][:5]
    with PatientClient(f"{server.host}:{server.grpc_port}") as client:
        client.recommend("", history, 3)

    def rows() -> list[dict]:
        drift.look(time.time())
        counted = [row for row in drift.report()[0]["features"] if row["requests"]]
        return counted if len(counted) == 8 else []

    names = {row["feature"] for row in wait_until(rows, "8 features counted")}
    assert {"history length", "newest type", "context device", "score", "probability buy"} <= names


def test_one_process_answers_as_the_ensemble_does(fused, served, root):
    frame = recorded(root).head(30)
    cases = (
        [("", list(h)) for h in frame[contract.ITEM]]
        + [(u, []) for u in frame[contract.USER]]
        + [("", []), ("nobody", ["x"])]
    )
    with (
        PatientClient(f"{served[0].host}:{served[0].grpc_port}") as ensemble,
        PatientClient(f"{fused[0].host}:{fused[0].grpc_port}") as one,
    ):
        for user, history in cases:
            a, b = ensemble.recommend(user, history, 7), one.recommend(user, history, 7)
            assert a.status == b.status and not agreement([(a.items, a.scores)], [b.items], 7).places_wrong
            queried = one.recommend(user, history, 7, "red shoe")
            assert queried.items == b.items and "no search in this run" in queried.status
            assert b.scores == pytest.approx(a.scores, abs=1e-4) and set(a.heads) == set(b.heads)
        with pytest.raises(VivaceError, match=r"TOP_K: expected 1..100, got 0"):
            one.recommend("", [], 0)


def test_a_bad_row_leaves_its_neighbours_alone(fused):
    server, _ = fused
    rows = [request_tensors("", [], k) for k in (3, 0, 2)]
    with grpcclient.InferenceServerClient(f"{server.host}:{server.grpc_port}") as client:
        inputs = []
        for columns in zip(*rows, strict=True):
            value = np.concatenate([v for _, v in columns])
            inputs.append(grpcclient.InferInput(columns[0][0].name, list(value.shape), columns[0][0].datatype))
            inputs[-1].set_data_from_numpy(value)
        answer = patient(lambda: client.infer(contract.ENSEMBLE, inputs))
    items, status = answer.as_numpy("ITEM_ID"), answer.as_numpy("STATUS")[:, 0]
    assert [int((row != b"").sum()) for row in items] == [3, 0, 2]
    assert status[1].startswith(b"error: TOP_K") and not status[0].startswith(b"error")


def test_the_warm_up_waits_for_every_answer(fused, monkeypatch):
    monkeypatch.setattr("serving.fleet.WARM_S", PATIENCE_S)
    server, _ = fused
    with grpcclient.InferenceServerClient(f"{server.host}:{server.grpc_port}") as client:

        def ended() -> int:
            counted = client.get_inference_statistics(contract.ENSEMBLE).model_stats[0].inference_stats
            return counted.success.count + counted.fail.count

        before = ended()
        assert warm_up(server) < PATIENCE_S
        assert ended() > before  # what a full queue refuses is not counted


@pytest.mark.parametrize("which", ["fused", "served"])
def test_what_is_too_late_is_refused_by_name(which, request):
    server, _ = request.getfixturevalue(which)
    with PatientClient(f"{server.host}:{server.grpc_port}") as client:
        assert client.recommend("", [], 3, within_ms=PATIENCE_S * 1000).items
        late = {"parameters": {contract.DEADLINE: int(time.time() * 1000) - 40}}
        with pytest.raises(VivaceError, match=r"deadline_ms: passed \d+ ms ago, before "):
            patient(lambda: client._infer(contract.ENSEMBLE, request_tensors("", [], 3), **late))


def test_rows_of_about_equal_length_go_together():
    history_BT = np.zeros((18, 40), np.int64)
    for row, length in enumerate([3, 40, 17, 0, 16, 33] * 3):
        history_BT[row, 40 - length :] = 7
    found = chunks(history_BT)
    # eights of events, at most all 40; 0 to 3, 16 to 17, 33 to 40: another cut would cost more than it saves
    assert [(len(places), t) for places, t in found] == [(6, 8), (6, 24), (6, 40)]
    assert sorted(found[0][0].tolist()) == [0, 3, 6, 9, 12, 15] and set(found[1][0] % 6) == {2, 4}
    assert sorted(np.concatenate([places for places, _ in found])) == list(range(18))
    assert [t for _, t in chunks(history_BT, whole=True)] == [40] * 3


def test_padding_that_is_not_read_changes_nothing(pipeline, root):
    known = [i for h in recorded(root)[contract.ITEM].head(40) for i in h]
    rows = [Row("", known[n : n + length], 9) for n, length in enumerate([1, 20, 0, 3, 17, 16, 2, 20, 5, 11, 1] * 2)]
    padded = copy.copy(pipeline)
    padded.whole = True
    (ids, values), inputs, status = pipeline(rows)
    (other_ids, other_values), _, other_status = padded(rows)
    assert status == other_status and (ids[:, :9] == other_ids[:, :9]).mean() > 0.99  # ties may change places
    np.testing.assert_allclose(values, other_values, atol=1e-4)
    for mine, theirs in zip(pipeline.retrieve(inputs), padded.retrieve(inputs), strict=True):
        assert mine.shape == theirs.shape
    np.testing.assert_allclose(pipeline.retrieve(inputs)[2], padded.retrieve(inputs)[2], atol=1e-4)


def test_levels_leave_out_what_they_say(pipeline, root):
    rows = [Row("", list(h), 5) for h in recorded(root)[contract.ITEM].head(6)] + [Row("", None, 5)]
    (full, values), inputs, _ = pipeline(rows)
    seen = inputs[1]
    for level in (Level.FEWER, Level.RETRIEVED, Level.POPULAR):
        (ids, scores), _, _ = pipeline(rows, level)
        assert scores.shape[:2] == values.shape[:2] and ids.shape[1] <= full.shape[1]
        for row, own in zip(ids, seen, strict=True):
            live = row[row != contract.PADDING_ID]
            assert len(live) >= 5 and len(set(live)) == len(live) and not own[live].any()
    found = pipeline.retrieve(inputs)
    few = pipeline.count_to_rank(5, Level.FEWER)
    assert few < full.shape[1]
    ranked = pipeline.rank(inputs[0], found, few)[0]
    assert [set(a) for a in ranked] == [set(a[:few]) for a in found[0]]  # the retriever's first, in another order
    assert (pipeline(rows, Level.RETRIEVED)[0][0] == found[0]).all()
    anonymous = pipeline.popular([v[-1:] for v in inputs])[0]
    assert (anonymous == full[-1:]).all()  # without a history the full answer is the popular items


def test_full_batches_step_down_and_calm_steps_up():
    overload = Overload(9, patience_s=0.1, calm_s=1.0, longest_s=4.0)
    assert [overload(10, t) for t in (0.0, 0.05)] == [0, 0]
    assert overload(3, 0.08) == 0  # not all of them were full
    assert [overload(9, t) for t in (0.10, 0.15, 0.21, 0.25, 0.32, 0.43, 0.9)] == [0, 0, 1, 1, 2, 3, 3]
    assert [overload(2, t) for t in (1.0, 1.9, 2.1)] == [3, 3, 2]
    assert [overload(9, t) for t in (2.2, 2.31)] == [2, 3]  # it did not last: the next step up takes twice the calm
    assert [overload(2, t) for t in (2.4, 3.6, 4.5)] == [3, 3, 2]


def test_a_level_is_taken_back_when_what_came_would_fit_and_left_out_when_a_batch_would_be_late():
    overload = Overload(10, patience_s=0.1, calm_s=0.5, longest_s=8.0)
    for level, row_s in zip(Level, (0.010, 0.004, 0.003, 0.001), strict=True):
        overload.done(level, 10, 10 * row_s)
    assert overload.done(Level.FULL, 1, 9.0) is None and overload.needs(Level.FULL, 10) == 0.1  # small: not counted
    assert [overload.fitting(Level.FULL, 10, left) for left in (0.2, 0.05, 0.035, 0.002)] == [0, 1, 2, 3]
    overload.done(Level.FULL, 10, 0.2)  # mean .8 x .01 + .2 x .02 = .012 a row, mean deviation .25 x .01 = .0025
    assert (overload.needs(Level.FULL, 10), overload.at_worst(Level.FULL, 10)) == pytest.approx((0.12, 0.17))
    assert [overload.fitting(Level.FULL, 10, left) for left in (0.18, 0.16)] == [0, 1]
    for rows, then in ((9, Level.FEWER), (1, Level.FULL)):  # 90 rows a second need .9 of its time whole, 10 need .1
        overload = Overload(10, patience_s=0.1, calm_s=0.5, longest_s=8.0)
        overload.done(Level.FULL, 10, 0.1)
        assert [overload(10, t) for t in (0.0, 0.11)] == [Level.FULL, Level.FEWER]
        overload.calm_s = 8.0
        assert [overload(rows, 0.2 + t / 10) for t in range(7)][-1] == then


def test_under_a_flood_every_request_is_answered_or_refused(fused, root):
    """Far more at once than may wait: what is refused is UNAVAILABLE, what is degraded says so and is counted."""
    server, _ = fused
    url = f"{server.host}:{server.grpc_port}"
    sent = messages(root)[:500] * 16
    flood = run(url, sent, np.sort(np.random.default_rng(0).uniform(0, 0.5, len(sent))), 0.5, 20.0, PATIENCE_S)
    assert flood.answered + sum(flood.refused.values()) == flood.due == len(sent)
    assert set(flood.refused) == {"UNAVAILABLE"} and flood.degraded
    with PatientClient(url) as client:
        whole = "degraded: popular items: anonymous user without HISTORY"
        wait_until(lambda: client.recommend("", [], 3).status == whole, "whole answers again", 0.01)

        def counted() -> bool:
            client.recommend("", [], 3)  # counters are handed over with a batch
            with urllib.request.urlopen(f"http://{server.host}:{server.metrics_port}/metrics") as page:
                counts = dict(re.findall(r'vivace_answers_total\{how="(\w+)"[^}]*\} (\d+)', page.read().decode()))
            cheaper = sum(int(counts.get(how, 0)) for how in ("fewer", "retrieved", "popular"))
            return int(counts.get("full", 0)) > 0 and cheaper > 0

        wait_until(counted, "answers counted by what was left out")


@pytest.mark.parametrize("which", ["fused", "served"])
def test_business_rules_are_followed_while_it_serves(request, root, which):
    server, watchdog = request.getfixturevalue(which)
    file = root / "feature_store" / "rules.toml"
    with PatientClient(f"{server.host}:{server.grpc_port}") as client:

        def answer() -> Recommendation:
            return client.recommend("", ["sku-00003", "sku-00001"], 5, context=NOON)

        def why() -> Explained:
            return client.explain("", ["sku-00003", "sku-00001"], 5, context=NOON)

        # another server of this store may have had rules a moment ago
        wait_until(lambda: all(answer().status == "ok" for _ in range(8)), "answers without rules")
        before = answer()
        blocked, pinned = before.items[0], before.items[4]
        try:
            file.write_text(
                f'[[rule]]\nname = "gone"\ndo = "block"\nitems = ["{blocked}"]\n'
                f'[[rule]]\nname = "shown"\ndo = "pin"\nitems = ["{pinned}"]\n'
            )
            wait_until(lambda: all(answer().items[0] == pinned for _ in range(8)), "rules that every worker follows")
            ruled = answer()
            assert ruled.items[1:4] == before.items[1:4] and blocked not in ruled.items
            assert (ruled.status, ruled.degraded) == ("ok; rules: gone, shown", False)
            assert np.isfinite(ruled.scores).all()
            wait_until(lambda: [of.item for of in why().items] == ruled.items, "reasons of what the rules show")
            assert why().status == ruled.status
            wait_until(lambda: watchdog.health.ready, "a server that is well by rules")
            file.write_text("[[rule]]\nname = 3\n")
            time.sleep(1.5)
            assert answer().items == ruled.items, "a file that says nothing changes nothing"
        finally:
            file.unlink(missing_ok=True)
        wait_until(lambda: all(answer().items == before.items for _ in range(8)), "answers as before")
        assert answer().status == "ok"
        wait_until(lambda: watchdog.health.ready, "a well server")
