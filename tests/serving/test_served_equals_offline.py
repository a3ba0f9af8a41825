"""The served answers are the evaluated ones: PyTorch offline, then ONNX, then the live ensemble."""

from __future__ import annotations

import asyncio

import numpy as np
import pandas as pd
import pytest
import torch
import tritonclient.grpc as grpcclient

from preprocessing import contract as c
from serving.client import AsyncVivaceClient
from training import data
from training.evaluation import metrics
from training.presets import tiny
from training.ranking_model import RankingGraph
from training.retrieval_model import RetrievalGraph
from training.train import load_ranker, load_retrieval

USERS = 500
TIE = 1e-4  # scores closer than float32 sums in another order can tell apart


@pytest.fixture(scope="module")
def offline(features, root):
    """(raw histories, raw targets, ranked names [USERS][N], scores [USERS, N]) by PyTorch on NVTabular's parquet."""
    preset = tiny()
    retriever, ranker = load_retrieval(features, preset, root).cpu(), load_ranker(features, preset, root).cpu()
    names = np.array([""] * c.FIRST_ID + features.items()[c.ITEM].tolist(), object)
    names[c.OOV_ID] = "(not in the vocabulary)"
    request = next(iter(data.requests(features.files("test"), ["click", "buy"], preset.encoder.history, USERS)))
    with torch.no_grad():
        ids, scores, encoded = RetrievalGraph(retriever, 100)(
            request.history_BT, request.exclude(features.item_count(), True)
        )
        ranked, score, *_ = RankingGraph(ranker)(request.history_BT, ids, scores, encoded)
    histories = [names[h].tolist() for h in request.histories]
    return histories, names[request.target_B.numpy()], names[ranked.numpy()], score.numpy(), request


@pytest.fixture(scope="module")
def answers(offline, served):
    server, _ = served

    async def ask():
        limit = asyncio.Semaphore(32)
        async with AsyncVivaceClient(f"{server.host}:{server.grpc_port}") as client:

            async def one(history):
                async with limit:
                    return await client.recommend("", history, 100)

            return await asyncio.gather(*(one(h) for h in offline[0]))

    return asyncio.run(ask())


def test_items_and_order_are_equal_but_for_ties(offline, answers):
    _, _, ranked, score, _ = offline
    assert len(answers) == USERS
    for row, answer in enumerate(answers):
        expected = [i for i in ranked[row] if i]
        assert sorted(answer.items) == sorted(expected)
        np.testing.assert_allclose(answer.scores, score[row][: len(expected)], atol=TIE)
        for place, (mine, theirs) in enumerate(zip(answer.items, expected, strict=True)):
            if mine != theirs:  # only between neighbours that score the same
                other = expected.index(mine)
                assert abs(score[row][place] - score[row][other]) < TIE


def test_ndcg_agrees(offline, answers):
    _, targets, ranked, _, _ = offline

    def rank(items, target):
        return list(items).index(target) if target in items else 1 << 20

    served = metrics(np.array([rank(a.items, t) for a, t in zip(answers, targets, strict=True)]))
    evaluated = metrics(np.array([rank(r, t) for r, t in zip(ranked, targets, strict=True)]))
    assert served["NDCG@10"] == pytest.approx(evaluated["NDCG@10"], abs=1e-3)
    assert evaluated["NDCG@10"] > 0


def test_the_live_transform_gives_nvtabulars_ids(offline, served):
    """Skew: raw histories through the live first stage equal what NVTabular wrote offline, unseen and null included."""
    server, _ = served
    histories, _, _, _, request = offline
    with grpcclient.InferenceServerClient(f"{server.host}:{server.grpc_port}") as client:
        for row in range(40):
            raw = np.array([[i.encode() for i in histories[row]]], object)
            values = {"USER_ID": [[b""]], "QUERY": [[b""]], "HISTORY": raw, "TOP_K": np.array([[1]], np.int32)}
            inputs = []
            for tensor in c.REQUEST:
                value = np.array(values[tensor.name], np.int32 if tensor is c.TOP_K else object)
                item = grpcclient.InferInput(tensor.name, value.shape, tensor.datatype)
                item.set_data_from_numpy(value)
                inputs.append(item)
            result = client.infer(c.FEATURE_TRANSFORM, inputs)
            assert result.as_numpy("HISTORY_IDS")[0].tolist() == request.history_BT[row].tolist()
            excluded = set(np.flatnonzero(result.as_numpy("EXCLUDE")[0]).tolist())
            assert excluded == set(request.histories[row].tolist()) | set(range(c.FIRST_ID))


def test_the_feature_store_holds_every_event(root, features):
    from serving.feature_store import LmdbStore

    store = LmdbStore(root / "feature_store", readonly=True)
    rows = pd.concat(pd.read_parquet(f) for f in features.files("test"))
    names = dict(enumerate(features.items()[c.ITEM], c.FIRST_ID))
    stored = store.histories(rows[c.USER].tolist())
    for history, target, kept in zip(rows[c.ITEM], rows[c.TARGET], stored, strict=True):
        assert len(kept) == len(history) + 1
        if target in names:
            assert kept[-1] == names[target]
    store.close()
