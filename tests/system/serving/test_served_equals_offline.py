"""The served answers are the evaluated ones: PyTorch offline, then ONNX, then the live ensemble."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import tritonclient.grpc as grpcclient

from benchmarks.parity import compare, offline_answers, served_answers
from tests.support import patient
from training.presets import tiny
from vivace import contract
from vivace.client import Recommendation
from vivace.store.lmdb_store import LmdbStore

USERS = 500


@pytest.fixture(scope="module")
def offline(features, root):
    return offline_answers(features, tiny(), root, USERS)


@pytest.fixture(scope="module")
def answers(offline, served):
    server, _ = served
    return patient(lambda: served_answers(f"{server.host}:{server.grpc_port}", offline.histories))


def test_items_and_order_are_equal_but_for_ties(offline, answers):
    found = compare(offline, answers)
    assert found["users"] == USERS and found["places_wrong"] == 0 and found["rows_equal"] > 0.9 * USERS, found
    assert found["largest_score_difference"] < 1e-4
    assert found["ndcg@10_served"] == pytest.approx(found["ndcg@10_offline"], abs=1e-3) and found["ndcg@10_served"] > 0


def test_the_comparison_sees_a_wrong_answer(offline, answers):
    swapped = list(answers)
    a = answers[0]
    swapped[0] = Recommendation([a.items[-1], *a.items[1:-1], a.items[0]], a.scores, a.heads, a.status)
    assert compare(offline, swapped)["places_wrong"] == 2


def test_the_live_transform_gives_nvtabulars_ids(offline, served):
    """Skew: raw histories through the live first stage equal what NVTabular wrote offline."""
    server, _ = served
    request = offline.requests
    with server.control_client() as client:
        for row in range(40):
            raw = np.array([[i.encode() for i in offline.histories[row]]], object)
            values = {contract.USER_ID: [[b""]], contract.QUERY: [[b""]], contract.HISTORY: raw, contract.TOP_K: [[1]]}
            inputs = []
            for tensor, value in values.items():
                array = np.array(value, np.int32 if tensor is contract.TOP_K else object)
                inputs.append(grpcclient.InferInput(tensor.name, array.shape, tensor.datatype))
                inputs[-1].set_data_from_numpy(array)
            result = client.infer(contract.FEATURE_TRANSFORM, inputs)
            assert result.as_numpy("HISTORY_IDS")[0].tolist() == request.history_BT[row].tolist()
            excluded = set(np.flatnonzero(result.as_numpy("EXCLUDE")[0]).tolist())
            assert excluded == set(request.histories[row].tolist()) | set(range(contract.FIRST_ID))


def test_the_feature_store_holds_every_event(root, features):
    store = LmdbStore(root / "feature_store", readonly=True)
    rows = pd.concat(pd.read_parquet(f) for f in features.files("test"))
    names = dict(enumerate(features.items()[contract.ITEM], contract.FIRST_ID))
    stored = store.histories(rows[contract.USER].tolist())
    for history, target, kept in zip(rows[contract.ITEM], rows[contract.TARGET], stored, strict=True):
        assert len(kept) == len(history) + 1
        if target in names:
            assert kept[-1] == names[target]
    store.close()
