"""The launcher and the watchdog against the real server: clean shutdown, clear errors, dead workers revived."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from benchmarks.deaths import CLEAR
from preprocessing.requests import recorded
from serving.launcher import TritonServer
from serving.releases import seal
from serving.segments import SHM
from serving.server_options import ServerOptions
from serving.service import service
from serving.start_checks import free_port
from serving.wheel import ServerError
from tests.support import PATIENCE_S, on_free_ports, wait_until, waited_too_long
from vivace import contract
from vivace.client import VivaceClient


def _options(root: Path, **more) -> ServerOptions:
    return on_free_ports(root / "model_repository", **more)


def _ours() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(n in " ".join(process.cmdline()) for n in ("tritonserver", "triton_python_backend_stub")):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("model", contract.STAGES)
def test_a_killed_worker_is_revived_under_load(root, model):
    """kill -9 under load: clear errors meanwhile, answers again, counted, nothing left in /dev/shm."""
    events: list[str] = []
    frame = recorded(root)
    user, history = frame[contract.USER][0], list(frame[contract.ITEM][0])
    with service(_options(root, log=root / "kill.log"), events.append) as (server, watchdog):
        segments, workers = len(server.segments.names()), len(watchdog.workers())
        outcomes: list[tuple[float, str]] = []  # when it was asked, "" or the error
        stop = threading.Event()

        def hammer() -> None:
            with VivaceClient(f"{server.host}:{server.grpc_port}", timeout_s=PATIENCE_S) as client:
                while not stop.is_set():
                    began = time.monotonic()
                    try:
                        problem = "" if client.recommend(user, history, 5).items else "no items"
                    except Exception as error:
                        problem = str(error)
                    outcomes.append((began, problem))

        threads = [threading.Thread(target=hammer, daemon=True) for _ in range(4)]
        for t in threads:
            t.start()
        try:
            wait_until(lambda: len(outcomes) > 20, "answers before the kill")
            pid = next(p for p, m in watchdog.workers().items() if m == model)
            killed, earlier = time.monotonic(), len(outcomes)
            os.kill(pid, signal.SIGKILL)
            # Triton 2.51 may crash while it loads a worker anew; then the whole server is
            back = (f"{model}: answers again", "tritonserver: ready again")
            wait_until(lambda: any(e.startswith(back) for e in events), f"{model} answers again")
            recovered = time.monotonic()
            wait_until(lambda: sum(not e for at, e in outcomes if at > recovered) > 10, "ten answers")
        finally:
            stop.set()
        for t in threads:
            t.join(PATIENCE_S)
        assert not {e for _, e in outcomes[:earlier] if e and not waited_too_long(e)}
        assert not {e for _, e in outcomes if e and not any(sign in e for sign in CLEAR)}
        assert not {e for at, e in outcomes if e and at > recovered and not waited_too_long(e)}
        assert any(f"{model}: its worker died" in e for e in events) and recovered > killed
        counted = watchdog.metrics.registry.get_sample_value("vivace_model_restarts_total", {"model": model})
        assert counted == 1
        wait_until(  # a sibling worker of the dead one may take a moment to go
            lambda: len(server.segments.names()) == segments and len(watchdog.workers()) == workers, "as many as before"
        )
        prefix = server.segments.prefix
    assert not list(SHM.glob(f"{prefix}*"))


def test_shutdown_leaves_nothing(root):
    before = {p.pid for p in _ours()}
    with TritonServer(_options(root)) as server:
        prefix, folder = server.segments.prefix, server._root
        assert folder.exists() and {p.pid for p in _ours()} > before
    assert {p.pid for p in _ours()} == before
    assert not list(SHM.glob(f"{prefix}*")) and not folder.exists()


def test_the_server_binds_to_loopback_only(served):
    """The guard listens there; Triton and its workers listen on no address at all."""
    server, _ = served

    def listens(pid: int) -> set[str]:
        connections = psutil.Process(pid).net_connections("inet")
        return {c.laddr.ip.removeprefix("::ffff:") for c in connections if c.status == psutil.CONN_LISTEN}

    assert listens(server.door.pid) == {"127.0.0.1"}
    workers = [child.pid for child in psutil.Process(server.pid).children(recursive=True)]
    assert not any(listens(pid) for pid in (server.pid, *workers))


def test_an_empty_repository_or_a_taken_port_is_named(root, tmp_path, served):
    with pytest.raises(ServerError, match="nothing to serve"), TritonServer(_options(tmp_path)):
        pass
    server, _ = served
    taken = ServerOptions(root / "model_repository", http_port=server.http_port, grpc_port=0, metrics_port=0)
    with pytest.raises(ServerError, match=f"http port {server.http_port} on 127.0.0.1 is taken"), TritonServer(taken):
        pass


def test_a_model_that_does_not_fit_its_config_is_refused(root, tmp_path):
    import shutil

    broken = tmp_path / "model_repository"
    shutil.copytree(root / "model_repository", broken)
    shutil.copytree(root / "feature_store", tmp_path / "feature_store")
    config = broken / "retrieval" / "config.pbtxt"
    config.write_text(config.read_text().replace("CANDIDATE_SCORES", "CANDIDATE_POINTS"))
    seal(broken)  # else it would be refused as damaged
    with pytest.raises(ServerError, match="CANDIDATE_POINTS"), TritonServer(_options(tmp_path)):
        pass


def test_serve_stops_cleanly_on_ctrl_c(root, tmp_path):
    log, status_port = tmp_path / "serve.log", free_port("127.0.0.1")
    command = [
        sys.executable, "-m", "vivace.cli.main", "serve", "--name", root.name, "--artifacts", str(root.parent),
        "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--status-port", str(status_port),
        "--log-file", str(tmp_path / "triton.log"),
    ]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            wait_until(lambda: "ready:" in log.read_text() or process.poll() is not None, "a ready server")
            assert process.poll() is None, log.read_text()
            with urllib.request.urlopen(f"http://127.0.0.1:{status_port}/metrics") as answer:
                assert "vivace_model_healthy" in answer.read().decode()
            children = psutil.Process(process.pid).children(recursive=True)
            assert len(children) > 3
            os.kill(process.pid, signal.SIGINT)
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()
    _, alive = psutil.wait_procs(children, timeout=PATIENCE_S)
    assert not alive
    assert "stopped" in log.read_text()
