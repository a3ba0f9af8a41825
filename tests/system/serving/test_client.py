"""The client against the real server: many threads, deadlines of its own, events that are sent twice, odd values."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as grpcclient

from tests.support import PATIENCE_S, PatientClient, wait_until
from vivace import AsyncVivaceClient, VivaceClient, VivaceError, VivaceTimeoutError, contract
from vivace.client import inputs_of
from vivace.client_request import append_tensors
from vivace.store.lmdb_store import LmdbStore

HISTORY = ["sku-00001", "sku-00002"]
NOW_MS = int(time.time() * 1000)


def address(server, protocol: str) -> str:
    return f"{server.host}:{server.grpc_port if protocol == 'grpc' else server.http_port}"


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_one_client_serves_many_threads(served, protocol):
    """Each gets the answer of its own question, used from threads that did not make the client."""
    server, _ = served
    with PatientClient(address(server, protocol), protocol) as client:
        expected = [client.recommend(history=HISTORY, top_k=n).items for n in range(1, 9)]

        def caller(n: int) -> list[list[str]]:
            return [client.recommend(history=HISTORY, top_k=n + 1).items for _ in range(20)]

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(caller, range(8)))
    assert answers == [[items] * 20 for items in expected]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_within_ms_bounds_the_wait_for_a_server_that_stands_still(served, protocol):
    server, _ = served
    with VivaceClient(address(server, protocol), protocol, timeout_s=PATIENCE_S) as client:
        client.recommend(history=HISTORY)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            with pytest.raises(VivaceTimeoutError, match="within_ms: no answer came within 300 ms"):
                client.recommend(history=HISTORY, within_ms=300)
            assert time.monotonic() - began < 5
            asyncio.run(asyncio_times_out(address(server, protocol), protocol))
        finally:
            os.kill(server.pid, signal.SIGCONT)
    with PatientClient(address(server, protocol), protocol) as client:
        assert wait_until(lambda: client.recommend(history=HISTORY).items, "answers")


async def asyncio_times_out(url: str, protocol: str) -> None:
    async with AsyncVivaceClient(url, protocol, timeout_s=0.3) as client:
        with pytest.raises(VivaceTimeoutError, match=r"timeout_s: no answer came within 0\.3 s"):
            await client.recommend(history=HISTORY)


def test_an_event_that_is_sent_again_is_stored_once(client, root, request):
    user = f"sender-{request.node.callspec.params['client']}"
    assert client.append(user, HISTORY[0], "view", event_id="order 7") == 1
    again = client.append(user, HISTORY[0], "view", event_id="order 7")
    assert again == 1 and again.status == contract.STATUS_OK
    assert client.append(user, HISTORY[0], "view") == 2 and client.append(user, HISTORY[0], "view") == 3
    events = LmdbStore(root / "feature_store", readonly=True).events(user)
    assert [e.item_id for e in events] == [HISTORY[0]] * 3
    with pytest.raises(VivaceError, match="event_id: expected at most 128 bytes, got 129"):
        client.append(user, HISTORY[0], event_id="x" * 129)


def test_rows_of_one_request_are_events_of_their_own(served, root):
    server, _ = served
    rows = [dict(append_tensors("rows", item, "view", 0)) for item in HISTORY * 2]
    tensors = [(t, np.concatenate([row[t] for row in rows])) for t in rows[0]]
    with grpcclient.InferenceServerClient(address(server, "grpc")) as client:
        for _ in range(3):
            result = client.infer(
                contract.APPEND_EVENT, inputs_of(grpcclient, tensors), parameters={contract.EVENT_ID: "one"},
                client_timeout=PATIENCE_S,
            )  # fmt: skip
            assert result.as_numpy(contract.HISTORY_LENGTH.name).tolist() == [[4]] * 4
        with pytest.raises(Exception, match="event_id: expected a text, got int"):
            client.infer(contract.APPEND_EVENT, inputs_of(grpcclient, tensors), parameters={contract.EVENT_ID: 7})
    assert [e.item_id for e in LmdbStore(root / "feature_store", readonly=True).events("rows")] == HISTORY * 2


def test_appends_through_deaths_of_the_worker_are_stored_once(served, root):
    """Nobody knows whether the event under way was stored; its client sends it again under the same id."""
    server, watchdog = served
    kills, acknowledged, n = 0, [], 0
    with VivaceClient(address(server, "grpc"), timeout_s=PATIENCE_S) as client:
        while kills < 3 or n % 20:
            if n % 20 == 10:
                (worker,) = [pid for pid, model in watchdog.workers().items() if model == contract.APPEND_EVENT]
                os.kill(worker, signal.SIGKILL)
                kills += 1
            event_id, deadline = f"event {n}", time.monotonic() + PATIENCE_S
            while True:  # the caller's own repeats, under the same id
                try:
                    client.append("survivor", f"item {n}", event_id=event_id)
                    break
                except VivaceError:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            acknowledged.append(f"item {n}")
            n += 1
    store = LmdbStore(root / "feature_store", readonly=True)
    assert [e.item_id for e in store.events("survivor")] == acknowledged


REFUSED = {
    "EVENT_TYPE: expected at most 128 bytes, got 10000": ("u", "a", "e" * 10_000, 0),
    "EVENT_TYPE: expected UTF-8, got byte 0xff": ("u", "a", b"\xff", 0),
    "ITEM_ID: expected at most 1024 bytes, got 1025": ("u", "a" * 1025, "", 0),
    "ITEM_ID: expected UTF-8, got byte 0xff": ("u", b"\xff", "", 0),
    "USER_ID: expected at most 1024 bytes, got 1000000": ("u" * 1_000_000, "a", "", 0),
    "TIMESTAMP_MS: expected Unix time in ms.*got -1;": ("u", "a", "", -1),
    "TIMESTAMP_MS: expected Unix time in ms.*got -9223372036854775808;": ("u", "a", "", -(1 << 63)),
    "TIMESTAMP_MS: expected Unix time in ms.*got 9223372036854775807;": ("u", "a", "", (1 << 63) - 1),
    "TIMESTAMP_MS: expected Unix time in ms.*a day from now": ("u", "a", "", NOW_MS + 3 * 86_400_000),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_has_no_bound_or_no_sense_is_not_stored(client, message):
    with pytest.raises(VivaceError, match=message):
        client.append(*REFUSED[message])


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_server_of_another_kind_is_an_error_of_ours(served, protocol):
    server, _ = served
    wrong = address(server, "http" if protocol == "grpc" else "grpc")
    with VivaceClient(wrong, protocol, timeout_s=10) as client, pytest.raises(VivaceError) as error:
        client.recommend("u")
    assert str(error.value)
