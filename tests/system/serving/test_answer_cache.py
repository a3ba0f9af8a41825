"""The cache of answers on the real Triton: hits are the computed answers bit by bit, nothing is ever old, equal
requests are computed once, and two servers over one Valkey answer from each other's work."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.local_valkey import ValkeyServer, stopped
from serving.launcher import TritonServer
from serving.runtime import moment
from serving.runtime.answer_memory import CLAIM_S
from serving.runtime.cache_settings import CacheSettings
from serving.runtime.stages import FeatureTransform, Row
from tests.support import NOON, PatientClient, on_free_ports, own_copy, quiet, users_of_data, wait_until
from vivace.client import Recommendation
from vivace.contract import FEATURE_TRANSFORM
from vivace.run import Run
from vivace.store.lmdb_store import LmdbStore
from vivace.store.remote.copying import copy, end_of
from vivace.store.remote.store import ValkeyStore

LINE = re.compile(r'vivace_answer_cache_total\{[^}]*result="(\w+)"[^}]*\} (\d+)')
CACHE = CacheSettings(8 << 20, 600.0)


@pytest.fixture(scope="module")
def own_root(root, tmp_path_factory):
    return own_copy(root, tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def users(root):
    return sorted(users_of_data(root))[20:26]


def server_of(own_root, **more) -> TritonServer:
    return TritonServer(on_free_ports(own_root / "model_repository", profile="fused", answer_cache=CACHE, **more))


def counts(server: TritonServer) -> dict[str, int]:
    with urllib.request.urlopen(f"http://{server.host}:{server.metrics_port}/metrics") as page:
        return {result: int(value) for result, value in LINE.findall(page.read().decode())}


class Counted:
    """What the counters of a server must say; they reach its page with a later batch of the same worker."""

    def __init__(self, server: TritonServer, client: PatientClient) -> None:
        self.server, self.client = server, client
        self.expected = dict.fromkeys(("memory", "shared", "joined", "miss", "passed"), 0)

    def more(self, **results: int) -> None:
        for result, count in results.items():
            self.expected[result] += count
        wait_until(lambda: self.ask() == self.expected, f"{self.expected}, got {self.ask()}", 0.3)

    def ask(self) -> dict[str, int]:
        with ThreadPoolExecutor(8) as pool:  # both workers
            list(pool.map(lambda _: self.client.recommend(""), range(8)))
        return counts(self.server)


def same(a: Recommendation, b: Recommendation) -> bool:
    """Bit by bit."""
    return (a.items, list(a.scores), a.status, {k: list(v) for k, v in a.heads.items()}) == (
        b.items, list(b.scores), b.status, {k: list(v) for k, v in b.heads.items()}
    )  # fmt: skip


def asked(client: PatientClient, users: Sequence[str]) -> list[Recommendation]:
    return [client.recommend(user, top_k=7, context=NOON) for user in users]


def test_a_hit_is_the_computed_answer_and_no_append_or_change_is_missed(own_root, users):
    with server_of(own_root) as server, PatientClient(f"{server.host}:{server.grpc_port}") as client:
        counted = Counted(server, client)
        first = asked(client, users)
        assert all(answer.status == "ok" and len(answer.items) == 7 for answer in first)
        again = [answer for _ in range(3) for answer in asked(client, users)]  # whichever worker computed it
        assert all(same(a, b) for a, b in zip(first * 3, again, strict=True))
        counted.more(miss=len(users), memory=3 * len(users))

        assert len(client.recommend(users[0], top_k=6, context=NOON).items) == 6  # another question
        assert client.recommend(users[0], history=first[0].items[:2], top_k=7, context=NOON).items != first[0].items

        for user, answer in zip(users, first, strict=True):
            for place in range(2):  # an event, then another
                client.append(user, answer.items[place], "view")
                now = client.recommend(user, top_k=7, context=NOON)
                assert not set(answer.items[: place + 1]) & set(now.items), "an answer of before the append"
                assert same(now, client.recommend(user, top_k=7, context=NOON))
        counted.more(miss=2 + 2 * len(users), memory=2 * len(users))
        moved = client.recommend(users[0], top_k=7, context=NOON)
        assert client.remove_items([moved.items[0]]) == ["ok"]
        assert moved.items[0] not in client.recommend(users[0], top_k=7, context=NOON).items

        assert client.forget(users[0]).startswith("ok")
        for _ in range(3):  # what is degraded is computed each time
            assert "is unknown" in client.recommend(users[0], top_k=7, context=NOON).status
        assert client.recommend("", ["no such item"], 7, context=NOON).status.startswith("degraded")
        counted.more(memory=1, miss=1 + 4)

        many, began = 64, time.monotonic()
        with ThreadPoolExecutor(many) as pool:
            answers = list(pool.map(lambda _: client.recommend(users[1], top_k=9, context=NOON), range(many)))
        assert all(same(answers[0], answer) for answer in answers)
        once = 1 + (time.monotonic() - began) / CLAIM_S  # who takes longer to compute it is no longer waited for
        wait_until(lambda: sum(counted.ask().values()) >= sum(counted.expected.values()) + many, f"{many} more")
        assert counts(server)["miss"] <= counted.expected["miss"] + once
        file = Path(server.options.answer_cache.path)
        assert file.exists()
    assert not file.exists()


def test_what_a_state_is_of(own_root, users, monkeypatch):
    """The hour that the models read, and what the store says of the user."""
    run = Run(own_root)
    store = LmdbStore(run.feature_store, readonly=True)
    graph = run.repository / FEATURE_TRANSFORM / str(run.version()) / "transform.onnx"
    transform = FeatureTransform(graph, store, run.shapes())

    def state(minutes: int, user: str = users[2]) -> list:
        monkeypatch.setattr(moment, "time", SimpleNamespace(time=lambda: (1_700_000_000 // 3600 * 60 + minutes) * 60))
        return transform.known([Row(user, None, 5)]).state(0)

    assert state(1) == state(59) and state(59) != state(61)
    assert state(1) != state(1, users[3])
    store.close()


def test_two_servers_over_one_valkey_share_answers_and_neither_is_old(own_root, users, tmp_path):
    with ExitStack() as life:
        shared = life.enter_context(ValkeyServer(tmp_path / "valkey"))
        with end_of(Run(own_root).feature_store) as own, end_of(shared.url) as target:
            copy(own, target, False, quiet)
        store = f"{shared.url}?limit_ms=2000&write_ms=20000"  # all but the last lines is not about time
        servers = [life.enter_context(server_of(own_root, store=store, log=tmp_path / f"{n}.log")) for n in "ab"]
        a, b = (life.enter_context(PatientClient(f"{s.host}:{s.grpc_port}")) for s in servers)
        users = users[2:]
        counted = Counted(servers[1], b)
        first = asked(a, users)
        valkey = life.enter_context(shared.client())
        wait_until(lambda: len(list(valkey.scan_iter("*answer*"))) >= len(users), "shared answers")
        assert all(same(x, y) for x, y in zip(first, asked(b, users), strict=True))
        counted.more(shared=len(users))
        for user, answer in zip(users, first, strict=True):
            a.append(user, answer.items[0], "view")
            now = b.recommend(user, top_k=7, context=NOON)
            assert answer.items[0] not in now.items, "an answer of before the append"
            b.append(user, now.items[0], "view")
            assert not {now.items[0], answer.items[0]} & set(a.recommend(user, top_k=7, context=NOON).items)
        gone = b.recommend(users[0], top_k=7, context=NOON).items[0]
        assert a.remove_items([gone]) == ["ok"] and gone not in b.recommend(users[0], top_k=7, context=NOON).items
        assert all(valkey.pttl(key) > 0 for key in valkey.scan_iter("*answer*"))

        valkey.config_set("maxmemory-policy", "volatile-lru")  # answers alone make room where memory is full
        valkey.config_set("maxmemory", valkey.info("memory")["used_memory"] + (1 << 20))
        with closing(ValkeyStore(store)) as full:
            for start in range(0, 4_000, 100):
                full.keep_answers([(b"%016d" % n, b"v" * 1000) for n in range(start, start + 100)], 60_000)
        assert 0 < len(list(valkey.scan_iter("*answer*"))) < 2_000
        assert a.append(users[2], first[2].items[1], "view").status == "ok"
        assert len(asked(b, users)[2].items) == 7
        valkey.config_set("maxmemory", 0)

        with stopped(shared):
            away = b.recommend(users[1], top_k=7, context=NOON)  # as it was last known, and said so
            assert away.status.startswith("degraded: ") and "store: " in away.status and away.items
        wait_until(lambda: b.recommend(users[1], top_k=7, context=NOON).status == "ok", "a store that answers")
