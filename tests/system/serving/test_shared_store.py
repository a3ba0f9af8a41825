"""The real Triton on a shared store: answers as with LMDB, and answers while the Valkey is away."""

from __future__ import annotations

import signal
import time

import numpy as np
import psutil
import pytest

from benchmarks.local_valkey import ValkeyServer, stopped
from serving.server_options import ServerOptions
from serving.service import check_options, service
from serving.wheel import ServerError
from tests.support import (
    NOON,
    PatientClient,
    on_free_ports,
    own_copy,
    quiet,
    users_of_data,
    vivace,
    wait_until,
)
from vivace.client import Recommendation, VivaceError
from vivace.contract import MAX_TOP_K, STATUS_DEGRADED
from vivace.store.remote.trips import PAUSES_S

PASSWORD = "not-for-logs"
LIMIT_MS = 100  # a busy machine lets a worker wait so long; the default is 5
MOST_S = 20.0  # of an answer on a machine that does other things too; a trip waits for LIMIT_MS
AWAY = "store: "


@pytest.fixture(scope="module")
def own_root(root, tmp_path_factory):
    """The small shop with a store of its own."""
    return own_copy(root, tmp_path_factory.mktemp("shared"))


@pytest.fixture
def shared(own_root, tmp_path):
    """A Valkey with that store's contents."""
    settings = ("--appendonly", "yes", "--appendfsync", "always")
    with ValkeyServer(tmp_path / "valkey", *settings, password=PASSWORD) as server:
        copied = vivace("store", "copy", "--name", "shop", "--artifacts", str(own_root.parent), "--to", server.url)
        assert copied.returncode == 0 and PASSWORD not in copied.stdout + copied.stderr, copied
        yield server


def answers_of(client: PatientClient, users: list[str]) -> list:
    return [answer_of(client, user) for user in users]


def answer_of(client: PatientClient, user: str) -> Recommendation:
    """Asked again where a trip took longer than LIMIT_MS, as a machine that stands still for a moment makes it."""

    def ask() -> Recommendation | None:
        answer = client.recommend(user, top_k=MAX_TOP_K, context=NOON)
        return None if AWAY in answer.status else answer

    return wait_until(ask, "an answer that is whole", every_s=PAUSES_S[-1] + 0.2)


def serve(own_root, shared=None, **more):
    store = f"{shared.url}?limit_ms={LIMIT_MS}&write_ms=5000" if shared else ""
    return service(on_free_ports(own_root / "model_repository", guard=True, store=store, **more), quiet)


def whole(client: PatientClient, user: str) -> bool:
    """Also in a process that left the store alone a moment ago: see PAUSES_S."""
    if AWAY in client.recommend(user).status:
        return False
    time.sleep(PAUSES_S[-1] + 0.2)
    return True


@pytest.mark.parametrize("profile", ["", "fused"])
def test_answers_are_those_of_lmdb_and_go_on_while_the_store_is_away(own_root, root, shared, profile):
    users = [*sorted(users_of_data(root))[:20], "nobody", ""]
    with serve(own_root, profile=profile) as (server, _), PatientClient(f"{server.host}:{server.grpc_port}") as client:
        expected = answers_of(client, users)
    with (
        serve(own_root, shared, profile=profile) as (server, watchdog),
        PatientClient(f"{server.host}:{server.grpc_port}") as client,
    ):
        for before, now in zip(expected, answers_of(client, users), strict=True):
            assert (now.items, now.status) == (before.items, before.status)
            np.testing.assert_array_equal(now.scores, before.scores)
        _is_kept_out_of_sight(server)

        user, first = users[0], expected[0].items[0]
        length = client.append(user, first, "view")
        assert length.status == "ok" and first not in answer_of(client, user).items
        assert client.remove_items([expected[0].items[1]]) == ["ok"]
        changed = answer_of(client, user)
        assert expected[0].items[1] not in changed.items and changed.status == "ok"
        wait_until(lambda: watchdog.health.ready, "ready")

        known = [] if profile else changed.items  # of two processes one may know less than the other
        with stopped(shared):
            _is_away(client, user, known)
            wait_until(lambda: watchdog.health.faults["store"], "a store that is red")
            assert watchdog.health.ready, watchdog.health.faults  # the others are as well as this one
        wait_until(lambda: whole(client, user), "an answer that is whole")
        assert answer_of(client, user).items == changed.items

        shared.kill()
        _is_away(client, user, known)
        shared.start()
        wait_until(lambda: whole(client, user), "an answer that is whole")
        after = answer_of(client, user)
        assert (after.items, after.status) == (changed.items, "ok")  # what was acknowledged is there
        wait_until(lambda: not watchdog.health.faults["store"], "a store that is well")
        assert client.append(user, after.items[0], "view") == length + 1
        assert after.items[0] not in answer_of(client, user).items
        assert client.forget(user).startswith("ok: forgotten")
        assert "is unknown" in answer_of(client, user).status
        assert not watchdog.metrics.restarts.labels("recommend")._value.get()  # nothing was started again for it


def _is_away(client: PatientClient, user: str, known: list[str]) -> None:
    """While the store is away: answers in time, of what is known; events are refused, none is acknowledged."""
    for n in range(20):
        began = time.monotonic()
        answer = client.recommend(user, top_k=MAX_TOP_K, context=NOON)
        assert time.monotonic() - began < MOST_S
        assert answer.status.startswith(STATUS_DEGRADED) and AWAY in answer.status
        assert answer.items and (not known or answer.items == known)
        assert client.recommend(f"never seen {n}", top_k=3).items
    assert AWAY in client.recommend("", answer.items[:3], 5).status  # its catalogue may be old
    with pytest.raises(VivaceError, match=AWAY):
        client.append(user, "an item", "view")
    with pytest.raises(VivaceError, match=AWAY):
        client.remove_items(["an item"])


def _is_kept_out_of_sight(server) -> None:
    process = psutil.Process(server.pid)
    for one in (process, *process.children(recursive=True)):
        assert PASSWORD not in " ".join(one.cmdline())
    assert PASSWORD not in server.log.read_text() and PASSWORD not in repr(server.options)


def test_a_server_on_a_shared_store_says_what_is_missing_before_it_starts(own_root, tmp_path):
    repository = own_root / "model_repository"
    with ValkeyServer(tmp_path / "valkey", password=PASSWORD) as empty:
        with pytest.raises(ServerError, match=r"nothing in it.*vivace store copy") as error:
            check_options(ServerOptions(repository, store=empty.url, http_port=0, grpc_port=0, metrics_port=0), 0)
        assert PASSWORD not in str(error.value)
        empty.send(signal.SIGSTOP)
        with pytest.raises(ServerError, match="no answer within"):
            check_options(ServerOptions(repository, store=empty.url, http_port=0, grpc_port=0, metrics_port=0), 0)
        empty.send(signal.SIGCONT)
    for url, words in ((empty.url, "cannot be reached"), ("http://:not-for-logs@x", "expected a URL such as valkey")):
        said = vivace("serve", "--name", "shop", "--artifacts", str(own_root.parent), "--store", url, "--http-port",
                      "0", "--grpc-port", "0", "--metrics-port", "0", "--status-port", "0")  # fmt: skip
        assert said.returncode == 1 and words in said.stderr and PASSWORD not in said.stderr + said.stdout, said
