"""The stores that one contract is held by: LMDB, a real valkey-server, and a cluster of three."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from benchmarks.local_cluster import cluster
from benchmarks.local_valkey import ValkeyServer
from vivace.store.lmdb_store import LmdbStore
from vivace.store.remote.store import ValkeyStore

PATIENT = "?limit_ms=2000&write_ms=20000"  # the machine may be busy, and this is not about time


@pytest.fixture(scope="session")
def servers(tmp_path_factory):
    """Of a kind, started when it is first asked for."""
    started: dict[str, list[ValkeyServer]] = {}
    with ExitStack() as stack:

        def of(kind: str) -> list[ValkeyServer]:
            if kind not in started:
                folder = tmp_path_factory.mktemp(kind)
                alone = kind == "valkey"
                nodes = [stack.enter_context(ValkeyServer(folder / "0"))] if alone else None
                started[kind] = nodes or stack.enter_context(cluster(folder))
            return started[kind]

        yield of


@pytest.fixture(params=["lmdb", "valkey", "cluster"])
def opening(request, tmp_path, servers) -> Callable:
    """Opens the store under test; ``retention`` as it takes it."""
    if request.param == "lmdb":
        return partial(LmdbStore, tmp_path / "store")
    for server in servers(request.param):
        with server.client() as client:
            client.flushall()
    more = "&cluster=1" if request.param == "cluster" else ""
    return partial(ValkeyStore, servers(request.param)[0].url + PATIENT + more)


@pytest.fixture
def store(opening):
    store = opening()
    yield store
    store.close()


@pytest.fixture
def place(store, tmp_path) -> tuple[Path, str]:
    """What ``open_store`` takes to open it in another process."""
    if isinstance(store, LmdbStore):
        return tmp_path / "store", ""
    return tmp_path, f"{store.address.url}{PATIENT}{'&cluster=1' if store.address.cluster else ''}"
