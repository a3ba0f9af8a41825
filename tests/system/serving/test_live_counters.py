"""Live counters, served: what is appended is rising within a second, and the server reads what training reads."""

from __future__ import annotations

import os
import shutil
import signal
import time
import urllib.request
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from serving.runtime.live_feed import LiveFeed
from serving.runtime.moment import Moment
from serving.runtime.stages import FeatureTransform, ItemVocabulary, Row
from serving.service import service
from tests.support import PATIENCE_S, PatientClient, on_free_ports, quiet, untouched_store, users_of_data, wait_until
from training.checkpoints import load_ranker, load_retrieval
from training.compile.compiler import CompileConfig, compile_models
from training.compile.engine import Engine
from training.judge.evaluate import evaluate
from training.judge.gate import graph_ranks, reference_ranks
from training.learn.ranker import train_ranker
from training.models.ranking import RankingGraph
from training.models.retrieval import RetrievalGraph
from training.presets import tiny
from vivace.client import VivaceError
from vivace.contract import (
    APPEND_EVENT,
    FEATURE_TRANSFORM,
    FIRST_ID,
    LIVE_FEATURES,
    LIVE_HALF_LIVES_MS,
    STATUS_OK,
    live_features,
)
from vivace.live import RECENT
from vivace.run import Run
from vivace.store.lmdb_store import LmdbStore
from vivace.suspects import FLOOR

RISING = 24
CANDIDATES = 60  # with what is rising, fewer than an answer may have
PRESET = replace(tiny(), ranker=replace(tiny().ranker, candidates=CANDIDATES, rising=RISING, rising_same_item_s=1800))


@pytest.fixture(scope="module")
def live_root(features, root, tmp_path_factory):
    own = tmp_path_factory.mktemp("live") / "shop"
    for folder in ("features", "retrieval"):
        shutil.copytree(root / folder, own / folder)
    shutil.copytree(untouched_store(root), own / "feature_store")  # of other tests' events some would rise
    train_ranker(features, PRESET, own, 3, quiet, quiet=True)
    evaluate(features, PRESET, own, 3, quiet)
    compile_models(features, PRESET, own, 3, quiet)
    return own


def _rare(features, taken: int) -> str:
    """An item that training saw least."""
    return str(features.items()["item_id"].tolist()[-1 - taken])


@pytest.mark.parametrize(("profile", "becomes"), [("", "keep"), ("fused", "refuse")])
def test_what_is_appended_is_rising_within_a_second(live_root, root, features, profile, becomes, tmp_path):
    rising = _rare(features, taken=["", "fused"].index(profile))
    with (
        service(on_free_ports(live_root / "model_repository", profile=profile, suspects=becomes), quiet) as (server, _),
        PatientClient(f"{server.host}:{server.grpc_port}") as client,
    ):
        before = client.recommend("nobody", top_k=10)
        assert rising not in before.items
        pushed = _rare(features, taken=2 + ["", "fused"].index(profile))
        for _ in range(FLOOR):  # one account, whose clicks on an item count once
            assert client.append(f"mallory {profile}", pushed).status == STATUS_OK
        more = _rare(features, taken=6 + ["", "fused"].index(profile))  # and no person clicks so often
        if becomes == "refuse":
            with pytest.raises(
                VivaceError, match=r"mallory fused.* within a minute.*nothing of the request was stored"
            ):
                client.append(f"mallory {profile}", more)
        else:
            kept = client.append(f"mallory {profile}", more)
            assert kept == FLOOR + 1 and "not counted for others: more than 30 events" in kept.status
        for n in range(60 if profile else 40):  # more than the other profile left in the store
            client.append(f"crowd {profile} {n}", rising)
        appended = time.monotonic()
        # a cold user gets what is clicked most now, before what was popular in training
        while (items := list(client.recommend("nobody", top_k=10).items))[0] != rising:
            assert time.monotonic() - appended < 1.0, f"{rising} is not first after a second: {items}"
        everyone = client.recommend("nobody", top_k=100).items
        assert pushed in everyone and more not in everyone  # the one rises, behind what a crowd clicked
        page = urllib.request.urlopen(f"http://{server.host}:{server.metrics_port}/metrics").read().decode()
        samples = (sample for family in text_string_to_metric_families(page) for sample in family.samples)
        counts = {s.labels["how"]: s.value for s in samples if s.name == "vivace_suspect_events_total"}
        assert counts == {"kept": becomes == "keep", "refused": becomes == "refuse"}
        user = min(users_of_data(root))
        assert rising in client.recommend(user, top_k=100).items
        assert rising not in client.recommend(f"crowd {profile} 0", top_k=100).items  # who has seen it

        new = f"new-{profile or 'ensemble'}"
        title = str(features.items()["title"].tolist()[7])
        assert client.upsert_items([{"item_id": new, "title": title}]) == ["ok"]
        for n in range(20):  # fewer than of the other one
            client.append(f"crowd {profile} {n}", new)
        appended = time.monotonic()
        while new not in (items := list(client.recommend("nobody", top_k=10).items))[1:3]:  # behind rising ones alone
            assert time.monotonic() - appended < 1.0, f"{new} is not among the first after a second: {items}"
        assert new in client.recommend(user, top_k=100).items
        assert new not in client.recommend(f"crowd {profile} 0", top_k=100).items
        client.remove_items([new])
        assert new not in client.recommend("nobody", top_k=10).items
        client.upsert_items([{"item_id": new, "title": title}])

        run, names = Run(live_root), features.items()["item_id"].tolist()
        version = run.repository / FEATURE_TRANSFORM / str(run.version())
        shutil.copytree(live_root / "feature_store", tmp_path / "feature_store")  # which the feed keeps open
        store = LmdbStore(tmp_path / "feature_store", readonly=True)
        transform = FeatureTransform(version / "transform.onnx", store, run.shapes())
        histories = [names[i : i + 5] for i in range(0, 60, 3)]
        served = [client.recommend("", history, 20) for history in histories]
    inputs = [torch.from_numpy(x) for x in transform([Row("", history, 20) for history in histories])[0]]
    rising_BM, live_BMF = inputs[-2:]
    assert int((rising_BM[0] >= FIRST_ID).sum()) >= 1 and live_BMF.shape[2] == live_features(2)  # device, sensitivity
    first = RetrievalGraph(load_retrieval(features, PRESET, live_root), CANDIDATES, rising=RISING)
    second = RankingGraph(load_ranker(features, PRESET, live_root))
    with torch.no_grad():
        ranked, values = second(inputs[0], *first(*inputs[:-1]), *inputs[run.shapes().passed_on :])
    for row, got in enumerate(served):
        expected = [names[i - FIRST_ID] for i in ranked[row, :20].tolist()]
        assert len(set(expected) & set(got.items)) >= 18  # counts have decayed by seconds in between
        np.testing.assert_allclose(got.scores, values[row, 0, :20].numpy(), atol=0.05)


def test_a_restart_counts_what_the_log_holds(live_root, features):
    store = LmdbStore(live_root / "feature_store", readonly=True)
    run = Run(live_root)
    version = run.repository / FEATURE_TRANSFORM / str(run.version())
    ids = ItemVocabulary(version / "transform.onnx")
    moment = Moment(version, run.shapes(), store)
    following = LiveFeed(version / RECENT, store, ids, run.shapes(), moment, start=False)
    with (
        service(on_free_ports(live_root / "model_repository"), quiet) as (server, _),
        PatientClient(f"{server.host}:{server.grpc_port}") as client,
    ):
        for n in range(6):
            client.append(f"later {n % 2}", _rare(features, 5 + n % 3), context={"device": ("phone", "tablet")[n % 2]})
            following.refresh()
    now = int(time.time() * 1000) + 1000
    following.refresh(now)
    anew = LiveFeed(version / RECENT, store, ids, run.shapes(), moment, start=False)
    anew.refresh(now)
    contexts = moment.context(["", ""], [{"device": "phone"}, {"device": "tablet"}], 0)[0]
    newest = ids([_rare(features, 5), _rare(features, 6)])
    rows = [feed.rows(contexts, newest) for feed in (following, anew)]
    for followed, counted in zip(*rows, strict=True):
        np.testing.assert_array_equal(followed, counted)
    ids_BM, features_of, *_ = rows[0]
    by_item = [
        dict(zip(i.tolist(), f, strict=True)) for i, f in zip(ids_BM, features_of[..., LIVE_FEATURES], strict=True)
    ]
    assert any(by_item[0][item] != by_item[1][item] for item in by_item[0])  # clicked more on one device
    assert features_of[0, :, -2].any()  # what came after an item


def test_deaths_lose_no_counted_event(live_root, features, tmp_path):
    """kill -9 of the worker that stores and of the one that counts, under appends: what was acknowledged is counted, by
    the revived worker as by a replay of the log."""
    run, rising = Run(live_root), _rare(features, taken=9)
    version = run.repository / FEATURE_TRANSFORM / str(run.version())
    acknowledged = []
    with (
        service(on_free_ports(live_root / "model_repository"), quiet) as (server, watchdog),
        PatientClient(f"{server.host}:{server.grpc_port}") as client,
    ):
        for n in range(150):
            if n in (30, 70, 110):
                workers = {model: pid for pid, model in watchdog.workers().items()}
                for model in {APPEND_EVENT, FEATURE_TRANSFORM} & workers.keys():
                    os.kill(workers[model], signal.SIGKILL)
            event_id, deadline = f"death {n}", time.monotonic() + PATIENCE_S
            while True:
                try:
                    client.append(f"witness {n}", rising, event_id=event_id)
                    break
                except VivaceError:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            acknowledged.append(f"witness {n}")

        def first() -> bool:
            try:
                return client.recommend("nobody", top_k=10).items[0] == rising
            except VivaceError:  # not revived yet
                return False

        wait_until(first, f"{rising} first: 150 of its events were acknowledged")
    shutil.copytree(live_root / "feature_store", tmp_path / "feature_store")
    store = LmdbStore(tmp_path / "feature_store", readonly=True)
    logged = [event.user_id for event in store.live_events(0)[1] if event.user_id.startswith("witness")]
    assert logged == acknowledged  # each once, in the order they came
    moment = Moment(version, run.shapes(), store)
    vocabulary = ItemVocabulary(version / "transform.onnx")
    feed = LiveFeed(version / RECENT, store, vocabulary, run.shapes(), moment, start=False)
    ids, counts, *_ = feed.rows(moment.context([""], [{}])[0], np.zeros(1, np.int64))
    place = ids[0].tolist().index(FIRST_ID + features.items()["item_id"].tolist().index(rising))
    assert np.expm1(counts[0, place, LIVE_HALF_LIVES_MS.index(12 * 3_600_000)]) == pytest.approx(150, rel=0.02)


@pytest.mark.parametrize("config", [CompileConfig(precision="int8"), CompileConfig(tables="int8")])
def test_other_number_formats_are_judged_by_the_counts_of_each_moment(live_root, features, config, tmp_path):
    """The gate's reference read the counts of each request's moment: graphs that read others would lose by far."""
    run = Run(live_root)
    exact = graph_ranks(features, run.shapes(), Engine(run.compiled, run.shapes()))
    expected = reference_ranks(run)
    ranked = expected < CANDIDATES + RISING
    assert (exact == expected)[ranked].mean() > 0.98 and ranked.mean() > 0.5
    other = shutil.copytree(live_root, tmp_path / "other")
    manifest = compile_models(features, PRESET, other, 3, quiet, replace(config, bound=0.1))
    assert abs(manifest["results"]["gate"]["change"]) < 0.1 and manifest["results"]["gate"]["requests"] == len(expected)
    kinds = {t.data_type for t in onnx.load(other / "compiled" / "ranking.onnx").graph.initializer}
    assert onnx.TensorProto.INT8 in kinds


def test_what_live_counters_do_not_go_with_is_refused(live_root, features):
    with pytest.raises(ValueError, match=r"live counters .* score every item"):
        compile_models(features, PRESET, live_root, 3, quiet, CompileConfig(index="HNSW32"))
    with pytest.raises(ValueError, match="hindsight"):
        replace(PRESET, ranking=replace(PRESET.ranking, past_events=1))


def test_an_answer_that_counters_change_is_no_fault(live_root):
    with service(on_free_ports(live_root / "model_repository", guard=True), quiet) as (_, watchdog):
        wait_until(lambda: watchdog.health.ready, "ready")
        canary = watchdog.health.canary
        other = canary.expected = canary.expected[::-1]
        asked = time.monotonic()
        wait_until(lambda: canary.expected is not other, "the canary asks again")
        assert watchdog.health.ready and time.monotonic() - asked < 10
        assert canary.fault == ""
