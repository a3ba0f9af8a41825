"""Candidates from a FAISS index: what it finds, what it may not answer, and the live ensemble over it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from serving.runtime.item_index import ItemIndex
from serving.service import service
from tests.support import PatientClient, on_free_ports, quiet
from training.compile.compiler import CompileConfig, compile_models
from training.compile.engine import Engine
from training.compile.index import recall, tune
from training.compile.onnx_export import shapes
from training.judge.gate import GateError
from training.presets import tiny
from vivace import contract
from vivace.masks import seen_ids
from vivace.store.lmdb_store import LmdbStore


def test_inner_product_and_bias_by_hand():
    table = np.array([[9, 9], [9, 9], [9, 9], [1, 0], [0, 1], [1, 1], [-1, 0]], np.float32)  # ids 0 to 2 are special
    index = ItemIndex.build(table, np.array([9, 9, 9, 0, 0.5, 0, 3], np.float32))
    ids, scores = index.search(np.array([[2, 1]], np.float32), 4)
    assert ids.tolist() == [[5, 3, 4, 6]] and scores.tolist() == [[3, 2, 1.5, 1]]
    ids, scores = index.search(np.array([[2, 1], [2, 1]], np.float32), 4, [np.array([5, 4]), np.array([], np.int64)])
    assert ids.tolist() == [[3, 6, 0, 0], [5, 3, 4, 6]] and scores[0, 2] < -1e29
    assert recall(np.array([[3, 4, 0]]), np.array([[4, 9]])) == 0.5


def test_seen_ids_by_hand():
    found = seen_ids([np.array([5, 7, 5, 9]), np.arange(3, 2003)])
    assert found[0, -3:].tolist() == [7, 5, 9] and not found[0, :-3].any()
    assert found[1].tolist() == list(range(2003 - contract.MAX_SEEN, 2003))


def test_an_index_that_finds_too_little_is_refused():
    rng = np.random.default_rng(0)
    table, states = (rng.normal(size=(n, 32)).astype(np.float32) for n in (4000, 40))
    index = ItemIndex.build(table, np.zeros(4000, np.float32))
    exact = np.argsort(-states @ table[3:].T, 1)[:, :20] + 3
    tuned = tune(index, states, exact, 0.98)
    assert tuned.recall >= 0.98 and tuned.effort == index.effort and max(tuned.tried) == tuned.effort
    wrong = (exact + 1000 - 3) % 3997 + 3  # another catalogue's answers
    with pytest.raises(GateError, match="not published"):
        tune(index, states, wrong)


@pytest.fixture(scope="module")
def indexed(features, root, tmp_path_factory):
    own = tmp_path_factory.mktemp("indexed") / "shop"
    shutil.copytree(root, own, ignore=shutil.ignore_patterns("compiled", "model_repository", "compressed", "*.log"))
    return own, compile_models(features, tiny(), own, 3, quiet, CompileConfig(index="HNSW32"))


def test_the_live_ensemble_answers_as_the_exact_one(features, root, served, indexed):
    own, manifest = indexed
    assert manifest["results"]["index"]["recall"] > 0.98 and manifest["results"]["gate"]["passed"]
    store = LmdbStore(own / "feature_store", readonly=True)
    users = [u for u, _ in zip(store.users(), range(30), strict=False)]
    histories = {u: {e.item_id for e in store.events(u)} for u in users}
    store.close()
    exact, _ = served
    with PatientClient(f"{exact.host}:{exact.grpc_port}") as client:
        expected = [client.recommend(u, top_k=10) for u in [*users, ""]]
    options = on_free_ports(own / "model_repository")
    with (
        service(options, quiet) as (server, _),
        PatientClient(f"{server.host}:{server.grpc_port}") as client,
    ):
        got = [client.recommend(u, top_k=10) for u in [*users, ""]]
    shared = [len(set(a.items) & set(b.items)) / 10 for a, b in zip(expected, got, strict=True)]
    assert np.mean(shared) > 0.97
    assert list(got[-1].items) == list(expected[-1].items)  # nobody's history: the most popular
    for user, answer in zip(users, got, strict=False):
        assert len(answer.items) == 10 and not histories[user] & set(answer.items)


def test_batch_equals_single(features, indexed):
    own, _ = indexed
    s = contract.StageTensors(**{**shapes(tiny(), features.item_count()).__dict__, "indexed": True})
    engine, rng = Engine(own / "compiled", s), np.random.default_rng(0)
    history = rng.integers(3, s.items, (8, s.history))
    history[3] = 0
    inputs = [history, seen_ids(list(history))]
    together = engine(inputs)
    for i in range(8):
        alone = engine([x[i : i + 1] for x in inputs])
        np.testing.assert_allclose(together[1][i : i + 1], alone[1], atol=1e-5)
