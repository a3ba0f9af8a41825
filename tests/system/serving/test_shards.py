"""Retrieval in shards on real servers: the answers of one server, also where scores are equal, and what a shard that
hangs or dies costs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import time
from functools import partial
from http.client import HTTPSConnection
from pathlib import Path

import numpy as np
import pytest
import torch

from serving.acceptance import Acceptance
from serving.door.options import AccessOptions
from serving.door.tls import make_pair
from serving.fleet import Fleet
from serving.releases import releases
from serving.runtime.sharded import merged, rows_of_shards
from serving.shard_addresses import ShardAddresses
from serving.shards.calls import RemoteShards
from serving.shards.servers import check_hosts
from serving.start_checks import check_exposure
from serving.wheel import ServerError
from tests.support import NOON, PatientClient, on_free_ports, quiet, untouched_store, users_of_data, wait_until
from training.checkpoints import WEIGHTS
from training.compile.compiler import CompileConfig, compile_models
from training.presets import tiny
from vivace import contract
from vivace.client import Recommendation
from vivace.credentials import Credentials
from vivace.masks import excluded, seen_ids
from vivace.onnx_session import open_session
from vivace.run import Run

SHARDS, SEED, WAIT_MS = 2, 3, 400


@pytest.fixture(scope="module")
def run(features, root, tmp_path_factory):
    """The small shop, every second item a copy of the one before it to the retriever; version 1 scores all items in
    one graph, version 2 in shards."""
    run = Run(tmp_path_factory.mktemp("shards") / "shop", features.folder)
    left = shutil.ignore_patterns("compiled", "model_repository*", "compressed", "feature*", "*.log")
    shutil.copytree(root, run.root, ignore=left)
    shutil.copytree(untouched_store(root), run.root / "feature_store")
    file = run.retrieval / WEIGHTS
    weights = torch.load(file, weights_only=True)
    for name in ("items.id.weight", "bias"):
        weights[name][4::2] = weights[name][3:-1:2][: len(weights[name][4::2])]
    torch.save(weights, file)
    compile_models(features, tiny(), run.root, SEED, quiet)
    shutil.copy(run.compiled / "retrieval.onnx", run.root / "one.onnx")
    compile_models(features, tiny(), run.root, SEED, quiet, CompileConfig(shards=SHARDS))
    return run


def answers(fleet: Fleet, users: list[str], hung: str = "") -> list[tuple[list[str], bytes, str]]:
    """``hung``: the shard that the test has stopped. Asked again where another was late, as on a busy machine."""

    def late(answer: Recommendation) -> bool:
        return bool(set(re.findall(r"(\d+) \(late\)", answer.status)) - {hung})

    given = []
    with PatientClient(f"127.0.0.1:{fleet.replicas[0].server.grpc_port}") as client:
        for user in users:
            ask = partial(client.recommend, user, top_k=100, context=NOON)
            given.append(wait_until(lambda ask=ask: None if late(a := ask()) else a, "an answer of shards in time"))
    return [(a.items, a.scores.tobytes(), a.status) for a in given]


@pytest.fixture(scope="module")
def served(run, root):
    """(fleet, users, their answers by one graph): first version 1, whose place version 2 has taken."""
    users = [*sorted(users_of_data(root))[:60], "nobody", ""]
    first, second = releases(run.repository)
    options = on_free_ports(first, guard=True, shard_twins=2, shard_wait_ms=WAIT_MS)
    with Fleet(options, quiet) as fleet:
        with PatientClient(f"127.0.0.1:{fleet.replicas[0].server.grpc_port}") as client:
            client.remove_items([answers(fleet, [""])[0][0][0]])  # the most popular
        by_one = answers(fleet, users)
        fleet.serve(second, Acceptance([]), quiet)
        wait_until(lambda: fleet.replicas[0].watchdog.health.ready, "a ready server")
        yield fleet, users, by_one


def test_answers_are_those_of_one_server_bit_for_bit(served):
    fleet, users, by_one = served
    assert len(fleet.shards.servers) == 2 * SHARDS and all(not each.fault() for each in fleet.shards.servers)
    assert answers(fleet, users) == by_one


def test_equal_scores_are_ordered_as_by_one_graph(run, served):
    fleet, *_ = served
    s, (version,) = run.shapes(), [p.name for p in (fleet.release / contract.RETRIEVAL).iterdir() if p.name.isdigit()]
    rng = np.random.default_rng(SEED)
    history_BT = rng.integers(contract.FIRST_ID, s.items, (16, s.history))
    one = open_session(run.root / "one.onnx")
    moment = {t.name: np.full((16, *t.dims), contract.NULL_ID, np.int64) for t in s.moment}
    given: dict[str, np.ndarray] = {i.name: moment.get(i.name, history_BT) for i in one.get_inputs()}
    given[s.exclude.name] = excluded(list(history_BT), s.items)
    ids, scores, _ = one.run(None, given)
    assert (np.diff(scores, axis=1) == 0).mean() > 0.2, "ties"
    (encoder,) = fleet.release.glob(f"{contract.RETRIEVAL}/*/encoder.onnx")
    state, *_ = open_session(encoder).run(None, {k: v for k, v in given.items() if k != s.exclude.name})
    state_BD = state if state.ndim == 2 else state[:, -1]
    with contextlib.closing(RemoteShards(addresses_of(fleet), version, s, wait_s=5.0)) as shards:
        parts, missing = shards(state_BD, rows_of_shards(seen_ids(list(history_BT), s.seen), SHARDS))
    assert missing == ""
    together = merged(parts, 16, s.candidates)
    assert together[0].tolist() == ids.tolist() and together[1].tobytes() == scores.tobytes()


def test_a_hung_shard_is_left_to_its_twin_then_left_out_and_comes_back(run, served):
    fleet, users, by_one = served
    hung = [each for each in fleet.shards.servers if each.shard == 1]
    names = dict(zip(fleet_items(run), range(10_000), strict=False))
    user = by_one.index(max(by_one, key=lambda a: len(a[0])))
    try:
        os.kill(hung[0].server.pid, signal.SIGSTOP)
        assert answers(fleet, users) == by_one, "the twin answers in its place"
        os.kill(hung[1].server.pid, signal.SIGSTOP)
        without = answers(fleet, [users[user]] * 8, hung="1")
        assert {status for *_, status in without} == {"degraded: shards: without 1 of 2: 1 (late)"}
        assert all(names[item] % SHARDS == 0 for items, *_ in without for item in items) and without[0][0]
        assert answers(fleet, [""]) == by_one[-1:], "no shard is asked for what is popular"

        def quick() -> bool:
            began = time.monotonic()
            answers(fleet, [users[user]], hung="1")
            return time.monotonic() - began < WAIT_MS / 1000

        wait_until(quick, "an answer that does not wait for who is late again and again")
        assert fleet.ready, "the server answers all the same"
    finally:
        for each in hung:
            os.kill(each.server.pid, signal.SIGCONT)
    wait_until(lambda: answers(fleet, users[:1]) == by_one[:1], "the shard again")


def test_a_dead_shard_is_named_and_started_again(served):
    fleet, users, by_one = served
    registry = fleet.registry
    labels = [{"shard": shard, "twin": twin} for shard, twin in (("0", "0"), ("1", "1"))]
    restarts = [registry.get_sample_value("vivace_shard_restarts_total", of) or 0 for of in labels]
    for each in fleet.shards.servers:
        os.kill(each.server.pid, signal.SIGKILL)
    (items, _, status), *_ = answers(fleet, users[:1])
    assert items and status.startswith("degraded: shards: popular items, without 2 of 2: 0 (does not answer), 1")
    wait_until(lambda: answers(fleet, users[:1]) == by_one[:1], "all shards again")
    wait_until(lambda: all(not each.fault() for each in fleet.shards.servers), "well shards")
    for of, before in zip(labels, restarts, strict=True):
        assert registry.get_sample_value("vivace_shard_up", of) == 1
        assert registry.get_sample_value("vivace_shard_restarts_total", of) == before + 1


def test_shards_elsewhere_are_asked_before_anything_starts(run, served):
    fleet, *_ = served
    second = fleet.release
    good = str(addresses_of(fleet))
    said: list[str] = []
    check_hosts(on_free_ports(second, shards=good), said.append)
    check_hosts(on_free_ports(second, shards=f"{good.split(',')[0]},127.0.0.1:9"), said.append)
    assert len(said) == 1 and said[0].startswith("shard 1 at 127.0.0.1:9: does not answer")
    with contextlib.closing(RemoteShards(addresses_of(fleet), "9", run.shapes(), wait_s=5.0)) as other:
        assert other.ask_once() == {0: "has another version", 1: "has another version"}
    faults = {
        good.split(",")[0]: "the addresses of 2 shards",
        "127.0.0.1:9,127.0.0.1:9": "expected servers of version 2",
        "nowhere,127.0.0.1:9": "expected host:port",
    }
    for shards, words in faults.items():
        with pytest.raises(ServerError, match=words):
            check_hosts(on_free_ports(second, shards=shards), quiet)
    with pytest.raises(ServerError, match="no shards"):
        check_hosts(on_free_ports(releases(run.repository)[0], shards=good), quiet)


def addresses_of(fleet: Fleet) -> ShardAddresses:
    """Of the running shards, as the server in front was told."""
    return ShardAddresses.parse(fleet.replicas[0].server.options.shards, SHARDS)


def fleet_items(run: Run) -> list[str]:
    (file,) = releases(run.repository)[-1].glob(f"{contract.RESPONSE}/*/items.json")
    items: list[str] = json.loads(file.read_text())
    return items


def test_a_shard_elsewhere_answers_only_servers_with_a_certificate(run, served, tmp_path):
    """Shard 0 behind mutual TLS, shard 1 as before: the same answers, and nobody else is heard."""
    fleet, users, by_one = served
    of_shard, of_server, stranger = (make_pair(tmp_path / name, ["127.0.0.1"]) for name in ("shard", "server", "else"))
    access = AccessOptions(certificate=of_shard[0], private_key=of_shard[1], client_ca=of_server[0])
    alone = on_free_ports(fleet.release, guard=True, shard=0, access=access)
    pair = tmp_path / "pair.pem"
    pair.write_text(of_server[0].read_text() + of_server[1].read_text())
    with Fleet(alone, quiet) as shard:
        address = f"127.0.0.1:{shard.replicas[0].server.http_port}"
        shards = f"{address},{str(addresses_of(fleet)).split(',')[1]}"
        secure = dict(shards=shards, shard_cert=pair, shard_ca=of_shard[0], shard_wait_ms=2000)
        with Fleet(on_free_ports(fleet.release, guard=True, **secure), quiet) as over_tls:
            assert answers(over_tls, users[:20]) == by_one[:20]
        unknown = tmp_path / "unknown.pem"
        unknown.write_text(stranger[0].read_text() + stranger[1].read_text())
        for one, why in (
            (dict(), "it takes TLS only"), (dict(shard_ca=of_shard[0]), "it wants a certificate"),
            (dict(shard_ca=stranger[0], shard_cert=pair), "its certificate is not of the authority in --shard-ca"),
            (dict(shard_ca=of_shard[0], shard_cert=unknown), "the authority of --shard-cert is none of its"),
        ):  # fmt: skip
            for _ in range(20):  # a port may close the connection before its reason is read
                with pytest.raises(ServerError, match=f"got: 0 at {address}: no trust by TLS: {why}"):
                    check_hosts(on_free_ports(fleet.release, shards=shards, **one), quiet)
        swapped = ",".join(reversed(shards.split(",")))
        with pytest.raises(ServerError, match=f"1 at {address}: is not this shard"):
            check_hosts(on_free_ports(fleet.release, shards=swapped, shard_cert=pair, shard_ca=of_shard[0]), quiet)
        with pytest.raises(ServerError, match="with a certificate and its key"):
            check_hosts(on_free_ports(fleet.release, shards=shards, shard_cert=of_server[0]), quiet)
        trusted = Credentials(key="", ca=of_shard[0], cert=of_server).ssl_context()
        host, port = address.split(":")
        connection = HTTPSConnection(host, int(port), context=trusted, timeout=5)
        for method, path in (("POST", "/v2/repository/index"), ("GET", "/v2/models/shard_1"), ("GET", "/v2/logging")):
            connection.request(method, path, b"{}" if method == "POST" else None)
            answer = connection.getresponse()
            assert answer.status == 404 and b"shard_0" in answer.read(), path


@pytest.mark.parametrize(
    ("access", "words"),
    [
        (AccessOptions(), "--client-ca"),
        (AccessOptions(certificate=Path("c.pem"), private_key=Path("k.pem")), "expected --client-ca"),
        (AccessOptions(keys=Path("keys.toml"), insecure_network=True), "--keys"),
    ],
)
def test_a_shard_that_others_reach_wants_certificates(access, words):
    with pytest.raises(ServerError, match=words):
        check_exposure("10.0.0.5", "10.0.0.5", access.certificate is not None, access, shard=True)
