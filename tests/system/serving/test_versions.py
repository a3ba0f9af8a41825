"""A server stays with the version it started with, whatever is published or damaged meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from serving.launcher import TritonServer
from serving.releases import DamagedError, publishing
from serving.service import service
from tests.support import NOON, PatientClient, on_free_ports, quiet, wait_until
from vivace import contract
from vivace.run import Run

HISTORY = ["sku-00001", "sku-00002"]


def as_served(root: Path, folder: Path) -> Run:
    """A copy of the small shop as it is served."""
    copy = Run(folder / "shop")
    release = Run(root).repository.resolve()
    shutil.copytree(release, copy.root / release.name)
    copy.repository.symlink_to(release.name)
    shutil.copytree(Run(root).feature_store, copy.feature_store)
    return copy


@pytest.fixture
def run(root, tmp_path) -> Run:
    return as_served(root, tmp_path)


def publish_with_other_items(run: Run) -> None:
    """A new version whose ids mean other items, as after training on other data."""
    old = run.repository.resolve()
    (number,) = {p.name for p in (old / contract.RESPONSE).iterdir() if p.name.isdigit()}
    with publishing(run.repository) as (folder, version):
        shutil.copytree(old, folder, dirs_exist_ok=True)
        for model in folder.iterdir():
            if (model / number).is_dir():
                (model / number).rename(model / str(version))
        items = folder / contract.RESPONSE / str(version) / "items.json"
        items.write_text(json.dumps(json.loads(items.read_text())[::-1]))


def test_a_worker_that_dies_after_a_publish_comes_back_as_it_was(run):
    with service(on_free_ports(run.repository, guard=True), quiet) as (server, watchdog):
        client = PatientClient(f"{server.host}:{server.grpc_port}")
        expected = client.recommend(history=HISTORY, top_k=5, context=NOON).items
        for _ in range(3):  # more than are kept: what is served stays all the same
            publish_with_other_items(run)
        restarts = watchdog.metrics.restarts.labels(contract.RESPONSE)._value
        (worker,) = [pid for pid, model in watchdog.workers().items() if model == contract.RESPONSE]
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: restarts.get() >= 1, "a new worker")
        assert client.recommend(history=HISTORY, top_k=5, context=NOON).items == expected
        os.kill(server.pid, signal.SIGKILL)
        assert client.recommend(history=HISTORY, top_k=5, context=NOON).items == expected
        client.close()
    with TritonServer(on_free_ports(run.repository)) as server:  # started anew: the newest
        client = PatientClient(f"{server.host}:{server.grpc_port}")
        assert client.recommend(history=HISTORY, top_k=5, context=NOON).items != expected
        client.close()


def test_a_damaged_version_is_not_served(run):
    graph = next(run.repository.resolve().glob(f"{contract.RETRIEVAL}/*/model.onnx"))
    content = bytearray(graph.read_bytes())
    for place in range(1000, 1020):
        content[place] ^= 0xFF
    graph.write_bytes(content)
    with (
        pytest.raises(DamagedError, match=r"changed: retrieval/\d+/model.onnx"),
        TritonServer(on_free_ports(run.repository)),
    ):
        pass


def test_a_store_that_is_gone_is_not_made_anew(run):
    shutil.rmtree(run.feature_store)
    for _ in range(2):
        with pytest.raises(Exception, match="no store at"), service(on_free_ports(run.repository), quiet):
            pass
        assert not (run.feature_store / "data.mdb").exists()
