"""A refresh beside a server: no request fails, and what is published answers by the new taste."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from subprocess import CompletedProcess

import pytest

from serving.control import Control, control_socket
from serving.fleet import Fleet
from serving.service import service
from tests.support import PatientClient, on_free_ports, quiet, untouched_store, users_of_data, vivace, waited_too_long
from vivace.client import VivaceError
from vivace.contract import ITEM, TITLE
from vivace.run import Run
from vivace.store.interface import Event
from vivace.store.lmdb_store import LmdbStore

PARTS = ("features", "retrieval", "ranking", "evaluation", "compiled", "preset.json")


@pytest.fixture
def run(root, tmp_path) -> Run:
    """A copy of the small shop, of its own."""
    own = Run(tmp_path / "shop")
    own.root.mkdir()
    for name in PARTS:
        source = root / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, own.root / name)
    release = Run(root).repository.resolve()
    shutil.copytree(release, own.root / release.name)
    own.repository.symlink_to(release.name)
    shutil.copytree(untouched_store(root), own.feature_store)
    return own


def meanwhile(control: Control, *arguments: str) -> CompletedProcess[str]:
    """A command's end; until then the servers do what they are asked for."""
    with ThreadPoolExecutor(1) as pool:
        command = pool.submit(vivace, *arguments)
        while not command.done():
            control.work(0.1)
    return command.result()


def plant(run: Run, before: str, after: str, users: list[str]) -> None:
    """Everyone looks at ``before`` and half a minute later at ``after``."""
    now = int(time.time() * 1000)
    start = now - (len(users) + 40) * 1000
    events = [
        Event(user, item, "view", start + 1000 * i + wait)
        for i, user in enumerate(users)
        for item, wait in ((before, 0), (after, 30_500))
    ]
    store = LmdbStore(run.feature_store)
    store.append(sorted(events, key=lambda event: event.timestamp_ms))
    store.close()


def test_a_refresh_beside_a_server_changes_what_is_served_next_and_fails_no_request(run, root, features):
    items = features.items()[ITEM].tolist()
    before, after = items[200], items[-20]  # rare ones
    errors: list[str] = []
    answers, stop = [0], threading.Event()

    def ask(url: str) -> None:
        with PatientClient(url) as client:
            while not stop.is_set():
                try:
                    answers[0] += bool(client.recommend(history=[before], top_k=5).items)
                    if answers[0] % 20 == 1:  # more would be the newest events, and those of one user judge nothing
                        client.append("a visitor", items[3])
                except (VivaceError, OSError) as error:
                    errors.append(str(error))
                time.sleep(0.05)

    with Fleet(on_free_ports(run.repository, guard=True), quiet) as fleet, control_socket(fleet) as control:
        server = fleet.replicas[0].server
        url = f"{server.host}:{server.grpc_port}"
        with PatientClient(url) as client:
            assert after not in client.recommend(history=[before], top_k=10).items
            title = features.items().set_index(ITEM).loc[before, TITLE]
            assert client.upsert_items([{ITEM: "sku-upserted", TITLE: title}]) == ["ok"]
        plant(run, before, after, sorted(users_of_data(root))[:300])
        caller = threading.Thread(target=ask, args=(url,))
        caller.start()
        try:
            done = meanwhile(
                control, "refresh", "--name", run.root.name, "--artifacts", str(run.root.parent), "--min-events", "10"
            )
        finally:
            stop.set()
            caller.join()
        assert done.returncode == 0 and "published version 2" in done.stdout, done.stdout + done.stderr
        assert "version 2: 1 running server;" in done.stdout
        assert answers[0] > 20 and [e for e in errors if not waited_too_long(e)] == []
        faults = fleet.replicas[0].watchdog.health.faults
        assert faults["version"] == "" and faults["store"] == ""
        with PatientClient(url) as client:
            assert after in client.recommend(history=[before], top_k=10).items, "the same server, the new version"
        items = json.loads(next(fleet.release.glob("response/*/items.json")).read_text())
        assert items[-1] == "sku-upserted", "what the server was sent is in the trained catalogue now"
    assert os.readlink(run.repository) == "model_repository.2" and not run.doubt()
    with (
        service(on_free_ports(run.repository), quiet) as (server, _),
        PatientClient(f"{server.host}:{server.grpc_port}") as client,
    ):
        assert after in client.recommend(history=[before], top_k=10).items
    again = vivace("refresh", "--name", run.root.name, "--artifacts", str(run.root.parent), "--min-events", "100000")
    assert again.returncode == 0 and "nothing to refresh" in again.stdout


def test_what_the_gate_refuses_leaves_everything_and_says_so_with_its_exit_code(run):
    store = LmdbStore(run.feature_store)
    store.append([Event(f"nobody {i}", "sku-00001", "view", int(time.time() * 1000) - i) for i in range(20)])
    store.close()
    link, key = os.readlink(run.repository), run.key("compiled")
    command = ("refresh", "--name", run.root.name, "--artifacts", str(run.root.parent), "--min-events", "10")
    first = vivace(*command)
    assert first.returncode == 3 and "no request to judge by" in first.stdout, first.stdout + first.stderr
    assert (os.readlink(run.repository), run.key("compiled")) == (link, key)
    second = vivace(*command)
    assert second.returncode == 0 and "those before were refused" in second.stdout
    wrong = vivace(*command, "--every", "soon")
    assert wrong.returncode == 2 and "expected a time such as" in " ".join(wrong.stderr.split())
