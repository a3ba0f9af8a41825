"""Green means works: whatever a caller would miss makes the server say that it is not ready, and why."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from serving.health import store_fault
from serving.service import service
from serving.start_checks import free_port
from serving.status import start_status_page
from serving.watchdog import HUNG_S
from tests.support import PATIENCE_S, PatientClient, on_free_ports, quiet, vivace, wait_until
from tests.system.serving.test_versions import HISTORY, run
from vivace import contract
from vivace.run import Run

__all__ = ["run"]  # the fixture
FEW_ITEMS = """
name = "few"
[interactions]
files = "events.csv"
user = "user_id"
item = "item_id"
time = "ts"
time_unit = "s"
[heads]
click = 0
"""


def probe(server) -> tuple[int, bool]:
    """What an orchestrator sees at the public ports: HTTP's status, and whether gRPC says ready."""
    connection = http.client.HTTPConnection(server.host, server.http_port, timeout=PATIENCE_S)
    connection.request("GET", "/v2/health/ready")
    status = connection.getresponse().status
    with grpcclient.InferenceServerClient(f"{server.host}:{server.grpc_port}") as client:
        try:
            ready = client.is_server_ready()
        except InferenceServerException as error:
            assert "try again" in str(error)
            ready = False
    return status, ready


def turns_red(server, watchdog, part: str, why: str) -> None:
    wait_until(lambda: why in watchdog.health.faults[part], f"{part} red: {why}")
    wait_until(lambda: probe(server) == (503, False), "not ready at the public ports")
    value = watchdog.metrics.registry.get_sample_value
    assert value("vivace_health", {"part": part}) == 0 and value("vivace_ready") == 0


def turns_green(server, watchdog) -> None:
    wait_until(lambda: watchdog.health.ready, "ready")
    wait_until(lambda: probe(server) == (200, True), "ready at the public ports")


@pytest.mark.parametrize("items", [1])
def test_a_server_of_few_items_is_ready(items, tmp_path):
    rows = [f"user-{u},item-{(u + n) % items},{1_700_000_000 + u * 1000 + n * 60}" for u in range(40) for n in range(5)]
    (tmp_path / "events.csv").write_text("\n".join(["user_id,item_id,ts", *rows]) + "\n")
    (tmp_path / "mapping.toml").write_text(FEW_ITEMS)
    where = ("--name", "few", "--artifacts", str(tmp_path))
    for step in (
        ("prepare", "--data", "tables", "--path", str(tmp_path / "mapping.toml")), ("train", "--preset", "tiny"),
        ("compile",),
    ):  # fmt: skip
        done = vivace(*step, *where)
        assert done.returncode == 0, done.stdout + done.stderr
    with service(on_free_ports(Run(tmp_path / "few").repository, guard=True), quiet) as (server, watchdog):
        turns_green(server, watchdog)


def test_an_ensemble_that_is_gone_is_red_and_comes_back(served):
    server, watchdog = served
    turns_green(server, watchdog)
    revived = []

    def when_red(model: str) -> float:
        turns_red(server, watchdog, "ensemble", "no available versions")
        revived.append(model)
        return revive(model)

    revive, watchdog.revive = watchdog.revive, when_red
    try:
        with server.control_client() as control:
            control.unload_model(contract.ENSEMBLE)
        wait_until(lambda: revived, "the watchdog notices")
    finally:
        watchdog.revive = revive
    turns_green(server, watchdog)
    with PatientClient(f"{server.host}:{server.grpc_port}") as client:
        assert client.recommend(history=HISTORY, top_k=5).items
    restarts = watchdog.metrics.registry.get_sample_value("vivace_model_restarts_total", {"model": contract.ENSEMBLE})
    assert restarts and restarts >= 1


def test_another_answer_is_red(served):
    server, watchdog = served
    canary = watchdog.health.canary
    kept = wait_until(lambda: canary.expected, "a known answer")
    canary.expected = kept[::-1]
    turns_red(server, watchdog, "ensemble", "another answer")
    canary.expected = kept
    turns_green(server, watchdog)


def test_the_known_answer_does_not_change_with_the_hour(served):
    """The shop's models read the clock; the canary's question says what time it is."""
    server, watchdog = served
    canary = watchdog.health.canary
    assert set(canary.context) == {"hour", "weekday"}
    with PatientClient(f"{server.host}:{server.grpc_port}") as client:
        answers = {
            str(client.recommend(history=HISTORY, top_k=20, context={"hour": str(hour)}).scores) for hour in range(24)
        }
    assert len(answers) > 1, "by the hour the scores differ"


def test_a_guard_that_hangs_is_red_and_replaced(served):
    server, watchdog = served
    hanging = server.door.pid
    os.kill(hanging, signal.SIGSTOP)
    wait_until(lambda: watchdog.health.faults["guard"], "guard red")
    wait_until(lambda: server.door.pid != hanging, "another Envoy")
    turns_green(server, watchdog)


def test_a_server_that_hangs_is_red_and_replaced(served):
    server, watchdog = served
    hanging, watchdog.silence.patience_s = server.pid, 3.0
    os.kill(hanging, signal.SIGSTOP)
    wait_until(lambda: watchdog.health.faults["server"], "server red")
    wait_until(lambda: server.pid != hanging, "another tritonserver")
    watchdog.silence.patience_s = HUNG_S
    turns_green(server, watchdog)


@pytest.fixture
def other(run):
    """A server of a copy of the run, that may be damaged."""
    with service(on_free_ports(run.repository, guard=True), quiet) as (server, watchdog):
        watchdog.health.slow_s = 0.2
        turns_green(server, watchdog)
        yield run, server, watchdog


def test_a_version_that_is_damaged_and_a_store_that_is_gone_are_red(other):
    run, server, watchdog = other
    graph = next(run.repository.resolve().glob(f"{contract.RETRIEVAL}/*/model.onnx"))
    whole = graph.read_bytes()
    graph.write_bytes(whole[:2000] + bytes(20) + whole[2020:])
    turns_red(server, watchdog, "version", "model.onnx")
    graph.write_bytes(whole)
    turns_green(server, watchdog)
    away = run.root / "away"
    run.feature_store.rename(away)
    turns_red(server, watchdog, "store", "no store at")
    shutil.copytree(away, run.feature_store)
    turns_red(server, watchdog, "store", "another file than the server opened")
    shutil.rmtree(run.feature_store)
    away.rename(run.feature_store)
    turns_green(server, watchdog)


def test_the_status_port_says_why(fleet, served):
    server, watchdog = served
    turns_green(server, watchdog)
    port = free_port("127.0.0.1")
    start_status_page("127.0.0.1", port, fleet)

    def get(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    assert get("/ready")[0] == 200 and get("/live")[0] == 200
    assert "vivace_ready 1.0" in get("/metrics")[1] and get("/other")[0] == 404
    watchdog.health.starting = "warming up"
    status, text = get("/ready")
    assert status == 503 and json.loads(text)["why"] == "warming up" and get("/health")[0] == 200
    wait_until(lambda: probe(server) == (503, False), "not ready at the public ports")
    watchdog.health.starting = ""
    turns_green(server, watchdog)
    parts = json.loads(get("/health")[1])["parts"]
    assert set(parts) == {"server", "guard", "watchdog", "models", "ensemble", "store", "disk", "version"}
    assert all(part["ok"] for part in parts.values())


SCRIPT = """
import sys
from pathlib import Path
from serving.health import store_fault
folder = Path(sys.argv[1])
if sys.argv[2] == "full":
    try:
        with (folder / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
    except OSError:
        pass
print(store_fault(folder, None))
"""


@pytest.mark.parametrize("disk", ["full", "read-only"])
def test_a_store_that_cannot_be_written_is_red(root, tmp_path, disk):
    """On a small file system of its own, mounted for a process of its own."""
    commands = f"mount -t tmpfs -o size=64k none {tmp_path} && touch {tmp_path}/data.mdb"
    if disk == "read-only":
        commands += f" && mount -o remount,ro {tmp_path}"
    commands += f" && {sys.executable} -c '{SCRIPT}' {tmp_path} {disk}"
    out = subprocess.run(["unshare", "-m", "sh", "-c", commands], capture_output=True, text=True)
    if "Operation not permitted" in out.stderr or "permission denied" in out.stderr.lower():
        pytest.skip("this user cannot mount a file system of its own")
    expected = "No space left on device" if disk == "full" else "Read-only file system"
    assert f"cannot be written to: {expected}" in out.stdout, out.stderr
    assert store_fault(Run(root).feature_store, None) == ""


def test_little_space_is_red(served, monkeypatch):
    server, watchdog = served
    monkeypatch.setattr(watchdog.health, "slow_s", 0.2)
    whole = shutil.disk_usage("/")._replace(free=1 << 20)
    monkeypatch.setattr("serving.health.shutil.disk_usage", lambda folder: whole)
    turns_red(server, watchdog, "disk", "MiB left in")
    monkeypatch.setattr("serving.health.shutil.disk_usage", lambda folder: whole._replace(free=whole.total))
    turns_green(server, watchdog)
