"""A retriever that reads times: the live ensemble takes them from the feature store."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from serving.service import service
from tests.support import PatientClient, on_free_ports, quiet, users_of_data
from training.checkpoints import load_ranker, load_retrieval
from training.compile.compiler import compile_models
from training.data import batches
from training.judge.evaluate import RANKED, RANKS, RETRIEVAL, WITHOUT_TIMES, evaluate
from training.learn.ranker import train_ranker
from training.learn.retriever import train_retrieval
from training.models.ranking import RankingGraph
from training.models.retrieval import RetrievalGraph
from training.presets import shapes, tiny
from vivace.contract import FIRST_ID
from vivace.store.lmdb_store import LmdbStore


def test_stored_times_reach_the_retriever(features, root, tmp_path):
    preset = replace(tiny(), encoder=replace(tiny().encoder, time_bias=True, types=False, context=False))
    own = tmp_path / "timed"
    for folder in ("features", "feature_store"):
        shutil.copytree(root / folder, own / folder)
    train_retrieval(features, preset, own, 3, quiet, quiet=True)
    weights = torch.load(own / "retrieval" / "weights.pt", weights_only=True)
    with torch.no_grad():  # two epochs teach it little: make times matter
        weights["encoder.blocks.0.time.bias_RA"].copy_(torch.linspace(-15, 15, 64).reshape(32, 2))
    torch.save(weights, own / "retrieval" / "weights.pt")
    train_ranker(features, preset, own, 3, quiet, quiet=True)
    compile_models(features, preset, own, 3, quiet)
    evaluate(features, preset, own, 3, quiet)
    with np.load(own / "evaluation" / RANKS) as ranks:  # the table says what a request without times gets
        for method in (RETRIEVAL, RANKED):
            assert (ranks[method] != ranks[method + WITHOUT_TIMES]).mean() > 0.2

    names = features.items()["item_id"].tolist()
    ids = {name: i for i, name in enumerate(names, FIRST_ID)}
    store = LmdbStore(own / "feature_store", readonly=True)
    of_data = users_of_data(root)
    users = list(itertools.islice((u for u in store.users() if u in of_data), 20))
    stored = [[(ids.get(e.item_id, 2), e.timestamp_ms) for e in store.events(u)] for u in users]
    store.close()
    request = batches.of_sequences([np.array(s) for s in stored], 20, torch.zeros(len(users)), {})
    graph = RetrievalGraph(load_retrieval(features, preset, own), shapes(preset, features).candidates)
    ranking = RankingGraph(load_ranker(features, preset, own))
    exclude = request.exclude(features.item_count(), True)

    def answer(times: torch.Tensor) -> tuple[list[list[str]], np.ndarray]:
        with torch.no_grad():
            found = graph(request.history_BT, exclude, times)
            ranked, values = ranking(request.history_BT, *found)
        return [[names[i - FIRST_ID] for i in row[:10]] for row in ranked.tolist()], values[:, 0, :10].numpy()

    items, scores = answer(request.time_BT)
    blind, blind_scores = answer(torch.zeros_like(request.time_BT))
    options = on_free_ports(own / "model_repository")
    with (
        service(options, quiet) as (server, _),
        PatientClient(f"{server.host}:{server.grpc_port}") as client,
    ):
        for row, user in enumerate(users):
            got = client.recommend(user, top_k=10)
            assert got.status == "ok"
            assert got.scores == pytest.approx(scores[row].tolist(), abs=1e-4)
        same = sum(list(client.recommend(u, top_k=10).items) == items[row] for row, u in enumerate(users))
        given = client.recommend("", [names[i - FIRST_ID] for i, _ in stored[0] if i >= FIRST_ID], 10)
    assert same >= 18  # items of equal score may change places
    assert list(given.items) == blind[0]  # a history in the request carries no times
    assert (np.abs(scores - blind_scores).max(1) > 1e-3).sum() > 15  # and they matter: ten times the tolerance above
