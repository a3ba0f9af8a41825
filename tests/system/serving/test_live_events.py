"""Events that a server has taken outlive a prepare beside it, and its death: each is in the history once, in order."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time

import psutil

from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers.shop import Shop, ShopConfig
from serving.launcher import TritonServer
from serving.server_options import ServerOptions
from tests.support import PatientClient
from vivace import contract
from vivace.client import VivaceClient
from vivace.run import Run
from vivace.store.lmdb_store import LmdbStore


def serve(run: Run) -> TritonServer:
    return TritonServer(
        ServerOptions(run.repository, http_port=0, grpc_port=0, metrics_port=0, log=run.root / "live.log")
    )


def events_of(run: Run, *users: str) -> list[list[str]]:
    store = LmdbStore(run.feature_store, readonly=True)
    try:
        return [[event.item_id for event in store.events(user)] for user in users]
    finally:
        store.close()


class Clicks:
    """One click after another for each of ``users``, in a thread; ``items``: those that the server has acknowledged."""

    def __init__(self, server: TritonServer, users: tuple[str, ...]) -> None:
        self.url, self.users = f"{server.host}:{server.grpc_port}", users
        self.items: list[str] = []
        self.problem: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._click, daemon=True)

    def _click(self) -> None:
        try:
            with VivaceClient(self.url, timeout_s=60) as client:
                while not self._stop.is_set():
                    item = f"click {len(self.items)}"
                    for user in self.users:
                        client.append(user, item, "view")
                    self.items.append(item)
                    time.sleep(0.01)
        except Exception as error:
            self.problem = error

    def __enter__(self) -> Clicks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        assert self.problem is None


def test_what_was_appended_outlives_a_prepare_beside_the_server_and_a_kill(root, tmp_path):
    run = Run(tmp_path / "shop")
    for part in ("model_repository", "feature_store", "features"):
        shutil.copytree(root / part, run.root / part)
    users = ("user-00001", "newcomer")
    (old,) = events_of(run, users[0])
    with serve(run) as server, PatientClient(f"{server.host}:{server.grpc_port}") as client:
        assert [client.append(user, "before", "view") for user in users] == [len(old) + 1, 1]
        with Clicks(server, users) as clicks:
            while not clicks.items and clicks.problem is None:
                time.sleep(0.01)
            prepare(Shop(ShopConfig(users=60, items=50, events=900, seed=11)), PrepareConfig(), run.root, 11, print)
            under = len(clicks.items)
        assert under > 1
        assert client.recommend("newcomer", top_k=3).items  # its readers go on
        after = [client.append(user, "after", "view") for user in users]
        live = ["before", *clicks.items, "after"]
        assert after[1] == len(live)
        server_process = psutil.Process(server.pid)
        workers = server_process.children(recursive=True)
        server_process.kill()
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
    known, newcomer = events_of(run, *users)
    assert newcomer == live
    assert known[-len(live) :] == live and len(known) == after[0]
    assert known[: -len(live)] and known[: -len(live)] != old  # the new data's
    with serve(run) as server, PatientClient(f"{server.host}:{server.grpc_port}") as client:
        assert [client.append(user, "again", "view") for user in users] == [length + 1 for length in after]
        assert client.recommend("newcomer", top_k=3).items
    assert events_of(run, *users) == [[*known, "again"], [*newcomer, "again"]]


def test_append_reports_what_is_not_known(client, features, request):
    """The event is stored all the same."""
    user, item = f"reporter-{request.node.callspec.params['client']}", features.items()[contract.ITEM][0]
    assert client.append(user, item, "view").status == contract.STATUS_OK
    unknown_item = client.append(user, "no such item", "view")
    assert unknown_item == 2 and "ITEM_ID 'no such item' is not in the catalogue" in unknown_item.status
    unknown_type = client.append(user, item, "vieww")
    assert unknown_type == 3 and "no EVENT_TYPE 'vieww'" in unknown_type.status and "view" in unknown_type.status
    assert client.append(user, item).status == contract.STATUS_OK  # no type given
