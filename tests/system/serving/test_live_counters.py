"""Live counters, served: what is appended is rising within a second, and the server reads what training reads."""

from __future__ import annotations

import contextlib
import itertools
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

from search.online import QuerySearch, SearchOptions, SearchRanking
from search.published import FOLDER
from serving.releases import releases
from serving.runtime.live_feed import LiveFeed
from serving.runtime.moment import Moment
from serving.runtime.pipeline import Pipeline
from serving.runtime.sharded import ShardedRetrieval
from serving.runtime.stages import FeatureTransform, ItemVocabulary, Row
from serving.service import service
from tests.support import (
    NOON,
    PATIENCE_S,
    PatientClient,
    Second,
    on_free_ports,
    quiet,
    untouched_store,
    users_of_data,
    wait_until,
)
from training.checkpoints import load_ranker, load_retrieval
from training.compile.compiler import CompileConfig, compile_models
from training.compile.engine import Engine
from training.data import batches
from training.data.live import with_live
from training.judge.evaluate import evaluate
from training.judge.gate import graph_ranks, reference_ranks
from training.learn.ranker import train_ranker
from training.models.ranking import RankingGraph
from training.models.retrieval import RetrievalGraph
from training.models.text_encoder import TextConfig
from training.presets import tiny
from training.search.encoder import SearchEncoderConfig
from training.search.ranker import SearchRankerConfig
from training.search.recommender import Recommender
from training.search.train import SearchTraining, train_search
from vivace import contract
from vivace.client import VivaceError
from vivace.contract import (
    APPEND_EVENT,
    FEATURE_TRANSFORM,
    FIRST_ID,
    LIVE_FEATURES,
    LIVE_HALF_LIVES_MS,
    PADDING_ID,
    STATUS_OK,
    live_features,
)
from vivace.live import RECENT
from vivace.manifest import read_manifest
from vivace.run import Run
from vivace.store.interface import Event
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
    compile_models(features, PRESET, own, 3, quiet, CompileConfig(targets=("openvino",)))
    return own


def _rare(features, taken: int) -> str:
    """An item that training saw least."""
    return str(features.items()["item_id"].tolist()[-1 - taken])


@pytest.fixture(scope="module")
def searchable(live_root, features, tmp_path_factory):
    """(a copy with search, its versions by how they retrieve)."""
    folder = tmp_path_factory.mktemp("live_search") / "shop"
    shutil.copytree(live_root, folder, ignore=shutil.ignore_patterns("compiled", "model_repository*", "*.log"))
    encoder = SearchEncoderConfig(
        text=TextConfig(width=32, layers=1, heads=2, tokens=16, vocabulary=500), query_tokens=12, vector=32,
        language_epochs=1, question_epochs=1, judged_epochs=1, batch_size=32, learning_rate=3e-3,
    )  # fmt: skip
    ranker = SearchRankerConfig(epochs=4, members=1)
    config = SearchTraining(encoder=encoder, ranker=ranker, requests=64, searches=64)
    train_search(features, PRESET, folder, config, 3, quiet, True)
    versions = {}
    for kind, how in (("index", CompileConfig(index="HNSW32")), ("shards", CompileConfig(shards=2))):
        compile_models(features, PRESET, folder, 3, quiet, how)
        versions[kind] = releases(folder / "model_repository")[-1]
        shutil.copytree(folder / "compiled", folder / kind)
    return folder, versions


@pytest.mark.parametrize(("kind", "becomes"), [("exact", "keep"), ("index", "refuse"), ("shards", "keep")])
def test_what_is_appended_is_rising_within_a_second(live_root, searchable, root, features, kind, becomes, tmp_path):
    place, names = ["exact", "index", "shards"].index(kind), features.items()["item_id"].tolist()
    own, repository = live_root, live_root / "model_repository"
    if kind != "exact":
        own, repository = searchable[0], searchable[1][kind]
    rising, pushed, more = (_rare(features, taken=place + i) for i in (0, 3, 6))
    user, how = min(users_of_data(root)), {"suspects": becomes, "shard_wait_ms": 5000}  # the machine may be busy
    with (
        service(on_free_ports(repository, profile="fused" * (kind == "index"), **how), quiet) as (server, _),
        PatientClient(f"{server.host}:{server.grpc_port}") as client,
    ):
        assert rising not in client.recommend("nobody", top_k=10).items
        query = features.items().set_index("item_id")["title"][rising] if own != live_root else ""
        found = client.recommend("nobody", top_k=100, query=query) if query else None
        for _ in range(FLOOR):  # one account, whose clicks on an item count once
            assert client.append(f"mallory {kind}", pushed).status == STATUS_OK
        _suspected(client, f"mallory {kind}", more, becomes)
        for n in range(40 + 20 * place):  # more than the other kinds left in the store
            client.append(f"crowd {kind} {n}", rising)
        # to a cold user, before what was popular in training
        _risen(server, client, lambda items: items[0] == rising, f"{rising} first")
        everyone = client.recommend("nobody", top_k=100).items
        assert pushed in everyone and more not in everyone  # the one rises, behind what a crowd clicked
        right = {"kept": becomes == "keep", "refused": becomes == "refuse"}

        def told() -> bool:  # counts are handed over with an event, once a second at most
            client.append(f"crowd {kind} 0", rising)
            return _suspect_events(server) == right

        wait_until(told, "the count of suspect events", every_s=0.3)  # or the asker himself is suspect
        assert rising in client.recommend(user, top_k=100).items
        assert rising not in client.recommend(f"crowd {kind} 0", top_k=100).items  # who has seen it
        if found is not None:
            _searches_the_present(client, searchable[0], found, query, rising, user)
        _new_item_rises(
            server, client, f"new-{kind}", str(features.items()["title"].tolist()[7]), f"crowd {kind}", user
        )

        run = Run(live_root)
        version = run.repository / FEATURE_TRANSFORM / str(run.version())
        shutil.copytree(own / "feature_store", tmp_path / "feature_store")  # which the feed keeps open
        store = LmdbStore(tmp_path / "feature_store", readonly=True)
        transform = FeatureTransform(version / "transform.onnx", store, run.shapes())
        histories = [names[i : i + 5] for i in range(0, 60, 3)]
        served = [client.recommend("", history, 20, context=NOON) for history in histories]
        client.remove_items([f"new-{kind}"])
    inputs = [torch.from_numpy(x) for x in transform([Row("", h, 20, context=NOON) for h in histories])[0]]
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


def _suspect_events(server) -> dict[str, float]:
    page = urllib.request.urlopen(f"http://{server.host}:{server.metrics_port}/metrics").read().decode()
    samples = (sample for family in text_string_to_metric_families(page) for sample in family.samples)
    return {s.labels["how"]: s.value for s in samples if s.name == "vivace_suspect_events_total"}


def _suspected(client, mallory: str, item: str, becomes: str) -> None:
    """One event more than a person's within a minute."""
    if becomes == "refuse":
        with pytest.raises(VivaceError, match=rf"{mallory}.* within a minute.*nothing of the request was stored"):
            client.append(mallory, item)
        return
    kept = client.append(mallory, item)
    assert kept == FLOOR + 1 and "not counted for others: more than 30 events" in kept.status


def _risen(server, client, right, expected: str) -> None:
    """Waits for the answer, and then for the other processes."""
    second = Second(server)
    second.shows(lambda: list(client.recommend("nobody", top_k=10).items), right, expected)
    second.pass_by()


def _new_item_rises(server, client, new: str, title: str, crowd: str, user: str) -> None:
    assert client.upsert_items([{"item_id": new, "title": title}]) == ["ok"]
    for n in range(20):  # fewer than of the other one
        client.append(f"{crowd} {n}", new)
    _risen(server, client, lambda items: new in items[1:3], f"{new} behind rising ones alone")
    assert new in client.recommend(user, top_k=100).items
    assert new not in client.recommend(f"{crowd} 0", top_k=100).items
    client.remove_items([new])
    assert new not in client.recommend("nobody", top_k=10).items
    client.upsert_items([{"item_id": new, "title": title}])


def _searches_the_present(client, folder, before, query: str, rising: str, user: str) -> None:
    """What a query finds reads no counter; its order reads them through the recommendation, as in training."""
    now = client.recommend("nobody", top_k=100, query=query)
    assert set(now.items) == set(before.items) and rising in now.items
    of_rising = [float(answer.scores[answer.items.index(rising)]) for answer in (before, now)]
    assert abs(of_rising[1] - of_rising[0]) > 1e-3  # nobody was recommended it before
    search, ranking = QuerySearch(folder / FOLDER, CANDIDATES), SearchRanking(folder / FOLDER)
    ((ids, x, _),) = search([query], [SearchOptions()])
    plain = client.recommend(user, top_k=100)
    places = {name: i for i, name in enumerate(search.index.catalogue.items, FIRST_ID)}
    assert len(plain.items) > CANDIDATES  # with what is rising; the whole recommendation
    values = np.stack([plain.scores, *plain.heads.values()])
    ordered, scores = ranking(ids, x, np.array([places[item] for item in plain.items]), values, SearchOptions())
    served = client.recommend(user, top_k=20, query=query)
    expected = [search.index.catalogue.items[i - FIRST_ID] for i in ordered[:20]]
    assert len(set(expected) & set(served.items)) >= 18  # counts have decayed in between
    np.testing.assert_allclose(served.scores, scores[0, :20], atol=0.05)


def test_an_index_and_shards_retrieve_what_one_graph_does(live_root, searchable, features):
    """The engines of the compiled graphs on requests of the log, with what was rising at the moment of each, beside the
    recommender that the search ranker was taught with."""
    (run, exact), engines = (Run(live_root), Run(live_root).shapes()), {}
    tensors = {
        "index": replace(exact, indexed=True, seen=exact.items), "shards": replace(exact, shards=2, seen=exact.items)
    }  # fmt: skip
    one = Engine(run.compiled, exact)
    engines = {kind: Engine(searchable[0] / kind, s) for kind, s in tensors.items()}
    taught = Recommender(features, PRESET, searchable[0])
    heads = [head.name for head in features.schema.heads]
    requests = batches.requests(features.files("test"), heads, PRESET.encoder.history, 30)
    for request in with_live(itertools.islice(requests, 3), features, "test", exact, 90):
        request.history_BT[4] = PADDING_ID  # a history without a known item
        inputs = request.inputs(exact, True)
        ids, scores, *_ = one.retrieve(inputs)
        rising_BM = inputs[-2]
        joined = (rising_BM[:, :, None] == ids[:, None, :]).any(2)[rising_BM != PADDING_ID]
        assert joined.any() and not joined.all()  # those that were seen do not
        for kind, engine in engines.items():
            given = request.inputs(tensors[kind], True)
            got = engine.retrieve(given)
            if kind == "shards":
                assert got[0].tolist() == ids.tolist() and got[1].tobytes() == scores.tobytes()
                ranked = [x.tobytes() for x in one(inputs)]
                assert [x.tobytes() for x in engine(given)] == ranked
            else:
                shared = [
                    len(set(a) & set(b)) / len(set(a)) for a, b in zip(ids.tolist(), got[0].tolist(), strict=True)
                ]
                assert np.mean(shared) > 0.95  # of the compiled index's best; what is rising is the same
                known = (ids[:, :, None] == rising_BM[:, None, :]).any(2) & (ids != PADDING_ID)
                assert (got[0] == ids)[known].all() and (got[0] == ids)[4].all()  # equally popular ones by id
                np.testing.assert_allclose(got[1][known], scores[known], atol=1e-4)
        same_BN = taught(request)[0] == one(inputs)[0]
        assert same_BN.mean() > 0.99 and same_BN[4].all()
    away = ShardedRetrieval(searchable[0] / "shards", tensors["shards"], lambda *_: ([None, None], "gone"))
    (without, of_without, _), reasons = away(given[: len(contract.retrieval_inputs(tensors["shards"]))])
    assert "gone" in reasons and np.isfinite(of_without).all()
    for got_N, one_N, rising_M in zip(without, ids, given[-2], strict=True):
        first = [i for i in one_N.tolist() if i in rising_M and i != PADDING_ID]
        assert got_N[: len(first)].tolist() == first  # what is rising needs no shard


def test_what_rose_at_the_start_is_popular_no_longer_when_it_has_fallen(live_root, features, tmp_path):
    """The answer by no model, of a server that started while items were rising."""
    run, rare = Run(live_root), [_rare(features, n) for n in range(3)]
    shapes, version = run.shapes(), run.version()
    shutil.copytree(run.feature_store, tmp_path / "store")
    ids = ItemVocabulary(run.repository / FEATURE_TRANSFORM / str(version) / "transform.onnx")(rare)
    now_ms = int(time.time() * 1000)
    with contextlib.closing(LmdbStore(tmp_path / "store")) as store:
        store.append([Event(f"early {n} {m}", rare[n], "view", now_ms) for n in range(3) for m in range(40)])
        pipeline = Pipeline(run.repository, str(version), shapes, store)
        inputs, _ = pipeline.transform([Row("", None, 5)])
        place = [t.name for t in contract.retrieval_inputs(shapes)].index("RISING_IDS")
        assert set(ids) <= set(pipeline.popular(inputs)[0][0][:RISING])
        inputs[place] = np.zeros_like(inputs[place])
        fallen = pipeline.popular(inputs)[0][0]
    assert fallen[0] != PADDING_ID and not set(fallen[:RISING]) & set(ids)


def test_a_restart_counts_what_the_log_holds(live_root, features):
    store = LmdbStore(live_root / "feature_store", readonly=True)
    run = Run(live_root)
    version = run.repository / FEATURE_TRANSFORM / str(run.version())
    ids = ItemVocabulary(version / "transform.onnx")
    moment = Moment(version, run.shapes(), store)
    with (
        service(on_free_ports(live_root / "model_repository"), quiet) as (server, _),
        PatientClient(f"{server.host}:{server.grpc_port}") as client,
    ):  # its start drops what other tests put in live and took out again
        following = LiveFeed(version / RECENT, store, ids, run.shapes(), moment, start=False)
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
                for pid, model in watchdog.workers().items():
                    if model in (APPEND_EVENT, FEATURE_TRANSFORM):
                        os.kill(pid, signal.SIGKILL)
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


def test_another_engine_reads_what_is_rising(live_root):
    apart = read_manifest(live_root / "compiled", "")["results"]["targets"]["openvino"]
    assert apart["retrieval, CANDIDATE_IDS"] > 0.99 and apart["ranking, RANKED_IDS"] > 0.99
    assert apart["retrieval, CANDIDATE_SCORES"] < 1e-3 and apart["ranking, RANKED_VALUES"] < 1e-3


def test_what_live_counters_do_not_go_with_is_refused():
    with pytest.raises(ValueError, match="hindsight"):
        replace(PRESET, ranking=replace(PRESET.ranking, past_events=1))


def test_an_answer_that_counters_change_is_no_fault(live_root):
    with service(on_free_ports(live_root / "model_repository", guard=True), quiet) as (_, watchdog):
        wait_until(lambda: watchdog.health.ready, "ready")
        canary = watchdog.health.canary
        other = canary.expected = canary.expected[::-1]
        wait_until(lambda: canary.expected is not other, "the canary asks again")
        assert watchdog.health.ready and canary.fault == ""
