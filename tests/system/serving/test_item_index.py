"""Candidates from a FAISS index: what it finds, what it may not answer, and the live ensemble over it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from preprocessing.features import Features
from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers.shop import Shop, ShopConfig
from serving.runtime.item_index import IndexedRetrieval
from serving.service import service
from tests.support import NOON, PatientClient, on_free_ports, quiet
from training.checkpoints import load_retrieval
from training.compile.compiler import CompileConfig, compile_models
from training.compile.engine import Engine
from training.data import batches
from training.judge.evaluate import evaluate
from training.learn.ranker import train_ranker
from training.learn.retriever import train_retrieval
from training.presets import shapes, tiny
from vivace import contract
from vivace.masks import seen_ids
from vivace.store.interface import Event
from vivace.store.lmdb_store import LmdbStore


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
        expected = [client.recommend(u, top_k=10, context=NOON) for u in [*users, ""]]
    options = on_free_ports(own / "model_repository")
    with (
        service(options, quiet) as (server, _),
        PatientClient(f"{server.host}:{server.grpc_port}") as client,
    ):
        got = [client.recommend(u, top_k=10, context=NOON) for u in [*users, ""]]
    shared = [len(set(a.items) & set(b.items)) / 10 for a, b in zip(expected, got, strict=True)]
    assert np.mean(shared) > 0.97
    assert list(got[-1].items) == list(expected[-1].items)  # nobody's history: the most popular
    for user, answer in zip(users, got, strict=False):
        assert len(answer.items) == 10 and not histories[user] & set(answer.items)


def test_of_a_user_of_3000_events_nothing_comes_back(tmp_path):
    """More distinct items than went to an index once: through the store, the live ensemble and one process."""
    root = tmp_path / "wide"
    prepare(Shop(ShopConfig(users=300, items=1_600, events=6_000, seed=4)), PrepareConfig(), root, 4, quiet)
    features = Features(root / "features")
    train_retrieval(features, tiny(), root, 4, quiet, quiet=True)
    train_ranker(features, tiny(), root, 4, quiet, quiet=True)
    evaluate(features, tiny(), root, 4, quiet)
    compile_models(features, tiny(), root, 4, quiet, CompileConfig(index="HNSW32", force=True))
    names = features.items()[contract.ITEM].tolist()
    assert len(names) > 1_500
    seen = names[:1_450]  # the most popular, which any answer would begin with
    store = LmdbStore(root / "feature_store")
    store.append([Event("reader", seen[n % len(seen)], "view", n + 1) for n in range(3_000)])
    store.close()
    for profile in ("", "fused"):
        options = on_free_ports(root / "model_repository", profile=profile)
        with service(options, quiet) as (server, _), PatientClient(f"{server.host}:{server.grpc_port}") as client:
            answer = client.recommend("reader", top_k=50)
            assert answer.status == contract.STATUS_OK and len(answer.items) == 50
            assert not set(answer.items) & set(seen)


def test_batch_equals_single(features, indexed):
    own, _ = indexed
    s = contract.StageTensors(**{**shapes(tiny(), features).__dict__, "indexed": True})
    engine, rng = Engine(own / "compiled", s), np.random.default_rng(0)
    history = rng.integers(3, s.items, (8, s.history))
    history[3] = 0
    types, context = np.where(history, rng.integers(3, 6, history.shape), 0), rng.integers(1, 4, (8, s.context))
    inputs = [history, seen_ids(list(history), s.seen), types, context]
    together = engine(inputs)
    for i in range(8):
        alone = engine([x[i : i + 1] for x in inputs])
        np.testing.assert_allclose(together[1][i : i + 1], alone[1], atol=1e-5)


def test_int8_tables_are_read_from_a_mapped_file(features, root, tmp_path):
    own = tmp_path / "shop"
    shutil.copytree(root, own, ignore=shutil.ignore_patterns("compiled", "model_repository", "compressed", "*.log"))
    config = CompileConfig(index="HNSW32", tables="int8", force=True)
    compile_models(features, tiny(), own, 3, quiet, config)
    (rows,) = (own / "model_repository").glob("retrieval/*/encoder.rows")
    items, width = features.item_count(), tiny().encoder.width
    assert items * (width + 4) <= rows.stat().st_size < 2 * items * (width + 4) + 100_000
    tensors = replace(shapes(tiny(), features), indexed=True, seen=items)
    retrieval = IndexedRetrieval(rows.parent, tensors)
    assert str(rows.resolve()) in Path("/proc/self/maps").read_text()  # pages of the file, no copy
    request = next(batches.requests(features.files("test"), ["click", "buy"], tiny().encoder.history, 64))
    inputs = request.inputs(tensors, exclude_seen=True)
    ids, _, encoded = retrieval(inputs)
    exact = load_retrieval(features, tiny(), own)
    with torch.no_grad():
        expected = exact.encode(request.history_BT, times=request.time_BT, types=request.type_BT)
        scores = exact.scores(request.history_BT, expected, request.exclude(items, True), context=request.context)
    np.testing.assert_allclose(encoded, expected[:, -encoded.shape[1] :], atol=0.1)
    best = scores.topk(10).indices.numpy()
    assert np.mean([len(set(a) & set(b[:20])) / 10 for a, b in zip(best, ids, strict=True)]) > 0.9
