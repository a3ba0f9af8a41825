"""The cache of encoded user states: a user who did nothing new pays no encoder, a new event misses, answers stay."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import tritonclient.grpc as grpcclient

from loadtest.generate.statistics import cache_counts
from serving.launcher import TritonServer
from serving.repository import PROFILES, model_configs
from serving.watchdog import question
from tests.support import NOON, PatientClient, on_free_ports, users_of_data, wait_until
from vivace import contract
from vivace.store.lmdb_store import LmdbStore


def test_only_a_new_event_pays_the_encoder(root, tmp_path, served):
    for folder in ("model_repository", "feature_store"):
        shutil.copytree(root / folder, tmp_path / folder)
    store = LmdbStore(tmp_path / "feature_store", readonly=True)
    of_data = users_of_data(root)
    known = [u for u in store.users() if u in of_data][:40]
    users = list({tuple(h or ()): u for u, h in zip(known, store.histories(known), strict=True)}.values())[:20]
    store.close()
    plain, _ = served
    with PatientClient(f"{plain.host}:{plain.grpc_port}") as client:
        expected = [client.recommend(u, top_k=10, context=NOON) for u in users]
    options = on_free_ports(tmp_path / "model_repository", cache_bytes=64 << 20, profile="cached")
    with (
        TritonServer(options) as server,  # no watchdog: its questions would count
        PatientClient(f"{server.host}:{server.grpc_port}") as client,
        grpcclient.InferenceServerClient(f"{server.host}:{server.grpc_port}") as inner,
    ):

        def counted(hits: int, misses: int) -> None:  # a moment after the answer
            wait_until(lambda: cache_counts(inner) == (hits, misses), f"{hits} hits, {misses} misses")

        first = [client.recommend(u, top_k=10, context=NOON) for u in users]
        counted(0, len(users))
        again = [client.recommend(u, top_k=5, context=NOON) for u in users]  # another TOP_K is the same state
        counted(len(users), len(users))
        client.append(users[0], expected[0].items[0])
        moved = client.recommend(users[0], top_k=10, context=NOON)
        counted(len(users), len(users) + 1)
        assert expected[0].items[0] not in moved.items  # seen now
    for a, b, d in zip(expected, first, again, strict=True):
        assert list(a.items) == list(b.items) and list(d.items) == list(a.items)[:5]
        assert b.scores == pytest.approx(a.scores, abs=1e-5)


def test_a_cached_model_is_asked_what_nobody_asked():
    s = contract.StageTensors(history=20, candidates=10, items=50, width=8)
    config = model_configs(s, (contract.TaskHead("click", 0.0),), PROFILES["cached"])[contract.RETRIEVAL]
    assert config.response_cache.enable
    rng = np.random.default_rng(0)
    asked = [question(config, rng)[0]._raw_content for _ in range(2)]
    ids = [np.frombuffer(raw, np.int64) for raw in asked]
    assert not np.array_equal(*ids)
    assert all(((i[-4:] >= contract.FIRST_ID) & (i[-4:] < 50)).all() and not i[:-4].any() for i in ids)
