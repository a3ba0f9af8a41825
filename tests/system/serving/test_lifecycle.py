"""How a server stops, what the next one finds, and what it refuses before it starts."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from serving.launcher import TritonServer
from serving.process import children, living, living_workers
from serving.segments import SHM_PREFIX
from serving.service import service
from serving.start_checks import LEFTOVER, MAKES_S, free_port
from serving.wheel import ServerError
from tests.support import PATIENCE_S, on_free_ports, quiet, wait_until, waited_too_long
from vivace import contract
from vivace.client import VivaceClient, VivaceError
from vivace.manifest import CHECKOUT

HISTORY = ["sku-00001", "sku-00002"]
GONE = (
    "try again",
    "refused",
    "reset",
    "closed",
    "unavailable",
    "not connect",
    "broken pipe",
    "goaway",
    "cancelled",
    "no available versions",
)


def signal_all(pids: list[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)


def stopping(root: Path, guard: bool, protocols: tuple[str, ...]) -> tuple[list, list]:
    """Stops a server under load: (calls that began before, those after), each its error or "". A worker is frozen so
    that the first ones have reached the server and are under way when it is told to stop."""
    before: list[str] = []
    after: list[str] = []
    stop, signalled = threading.Event(), threading.Event()

    def caller(url: str, protocol: str) -> None:
        with VivaceClient(url, protocol, timeout_s=PATIENCE_S) as client:
            while not stop.is_set():
                calls = after if signalled.is_set() else before
                try:
                    calls.append("" if client.recommend(history=HISTORY, top_k=5).items else "no items")
                except (VivaceError, OSError) as error:
                    calls.append(str(error))
                    time.sleep(0.01)

    with service(on_free_ports(root / "model_repository", guard=guard), quiet) as (server, watchdog):
        ports = {"grpc": server.grpc_port, "http": server.http_port}
        threads = [
            threading.Thread(target=caller, args=(f"{server.host}:{ports[p]}", p)) for p in protocols for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(before) > 30, "calls that are answered")
        workers = [pid for pid, model in watchdog.workers().items() if model == contract.RESPONSE]
        signal_all(workers, signal.SIGSTOP)
        time.sleep(0.5)
        signalled.set()
        answered = len(before)
        threading.Timer(0.3, signal_all, (workers, signal.SIGCONT)).start()
    stop.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(before) > answered, "calls under way when the server was told to stop"
    return before, after


@pytest.mark.parametrize(("guard", "protocols"), [(True, ("grpc", "http")), (False, ("grpc",))])
def test_what_is_under_way_is_answered_when_a_server_stops(root, guard, protocols):
    before, after = stopping(root, guard, protocols)
    assert [e for e in before if e and not waited_too_long(e)] == []
    assert after, "calls after the signal"
    errors = [e for e in after if e and not waited_too_long(e)]
    assert not [e for e in errors if not any(sign in e.lower() for sign in GONE)], set(errors)


@contextlib.contextmanager
def serving(root: Path, folder: Path, *more: str):
    """``vivace serve`` as a process that is ready; (process, its folder of temporary files)."""
    log = folder / "serve.log"
    command = [
        sys.executable, "-m", "vivace.cli.main", "serve", "--name", root.name, "--artifacts", str(root.parent),
        *(a for n in ("http", "grpc", "metrics", "status") for a in (f"--{n}-port", str(free_port("127.0.0.1")))),
        "--log-file", str(folder / "triton.log"), *more,
    ]  # fmt: skip
    environment = os.environ | {"TMPDIR": str(folder)}
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=CHECKOUT, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # as the tests may run under nohup
        )  # fmt: skip
    try:
        wait_until(lambda: "ready:" in log.read_text() or process.poll() is not None, "a ready server")
        assert process.poll() is None, log.read_text()
        yield process
    finally:
        process.kill()
        process.wait()


def segments_of(process: subprocess.Popen) -> list[Path]:
    """Shared memory that the processes below map."""
    names: set[Path] = set()
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{child.pid}/maps").read_text().splitlines()
            names |= {Path(line.split()[-1]) for line in lines if f"/dev/shm/{SHM_PREFIX}" in line}
    return sorted(names)


def test_a_closed_terminal_cleans_up_and_a_kill_is_swept_by_the_next_start(root, tmp_path):
    with serving(root, tmp_path) as process:
        segments = segments_of(process)
        assert segments and list(tmp_path.glob(f"{LEFTOVER}*"))
        below = psutil.Process(process.pid).children(recursive=True)
        servers = [child for child in below if child.is_running() and child.name().startswith("tritonserver")]
        for each in (process, *servers):  # the supervisor first, then all at once: nobody can clean up
            each.kill()
    left = set(tmp_path.glob(f"{LEFTOVER}*"))
    assert left and any(path.exists() for path in segments)
    with serving(root, tmp_path) as process:
        _, alive = psutil.wait_procs(below, timeout=PATIENCE_S)
        assert not alive
        assert not left & set(tmp_path.glob(f"{LEFTOVER}*")) and not any(path.exists() for path in segments)
        segments, below = segments_of(process), psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGHUP)
        assert process.wait(PATIENCE_S) == 0
    _, alive = psutil.wait_procs(below, timeout=PATIENCE_S)
    assert not alive and not list(tmp_path.glob(f"{LEFTOVER}*")) and not any(path.exists() for path in segments)
    assert "stopped" in (tmp_path / "serve.log").read_text()


def test_workers_that_were_killed_are_no_zombies_and_new_ones_hold_no_connection(root):
    with service(on_free_ports(root / "model_repository", guard=True), quiet) as (server, watchdog):
        with VivaceClient(f"{server.host}:{server.grpc_port}", timeout_s=PATIENCE_S) as client:
            client.recommend(history=HISTORY)
        for model in (contract.RESPONSE, contract.FEATURE_TRANSFORM):
            restarts = watchdog.metrics.restarts.labels(model)._value
            os.kill(next(p for p, m in watchdog.workers().items() if m == model), signal.SIGKILL)
            wait_until(lambda r=restarts: r.get() >= 1, f"another worker of {model}")
        assert all(living(pid) for pid in children(server.pid))
        for pid in watchdog.workers():
            sockets = [f for f in Path(f"/proc/{pid}/fd").iterdir() if os.readlink(f).startswith("socket:")]
            assert not sockets, pid


def test_a_worker_that_dies_while_it_is_loaded_again_is_not_waited_for(root):
    """Triton may wait for it for ever; then the server is started anew."""
    with service(on_free_ports(root / "model_repository", profile="fused"), quiet) as (server, watchdog):
        watchdog.reload_s = 8.0
        at_first, killed = set(watchdog.workers()), set[int]()

        def kill_new() -> None:
            while not killed:  # before it is known to Triton
                for pid in living_workers(server.pid) - at_first:
                    killed.add(pid)
                    os.kill(pid, signal.SIGKILL)

        os.kill(next(p for p, m in watchdog.workers().items() if m == contract.ENSEMBLE), signal.SIGKILL)
        killer = threading.Thread(target=kill_new)
        killer.start()
        killer.join(PATIENCE_S)
        assert killed
        with VivaceClient(f"{server.host}:{server.grpc_port}", timeout_s=PATIENCE_S) as client:

            def answers() -> bool:
                with contextlib.suppress(VivaceError):
                    return bool(client.recommend(history=HISTORY, top_k=5).items) and not watchdog.models_fault()
                return False

            wait_until(answers, "an answer of a model that was loaded again")


def test_a_server_that_crashes_while_it_starts_is_started_again(root):
    """Triton 2.51 ends by SIGSEGV or SIGABRT at one start of some hundred on a busy machine."""
    server = TritonServer(on_free_ports(root / "model_repository"))
    crashed: list[int] = []

    def crash() -> None:
        while not crashed:
            with contextlib.suppress(ServerError):
                crashed.append(server.pid)
        os.kill(crashed[0], signal.SIGSEGV)

    crasher = threading.Thread(target=crash)
    crasher.start()
    with server:
        assert crashed and server.pid != crashed[0]
        with VivaceClient(f"{server.host}:{server.grpc_port}", timeout_s=PATIENCE_S) as client:
            assert client.recommend(history=HISTORY, top_k=5).items
    crasher.join()


def test_what_a_killed_server_made_elsewhere_goes_too(root):
    def ours() -> dict[Path, float]:
        """When each was made; those of other servers may go meanwhile."""
        made = {}
        for path in Path("/tmp").glob("python_env_*"):
            with contextlib.suppress(FileNotFoundError):
                made |= {path: stat.st_ctime} if (stat := path.stat()).st_uid == os.getuid() else {}
        return made

    def beside(server: TritonServer) -> bool:
        """Whether another tritonserver started at about that time, whose folder it might be."""
        named = (p.info for p in psutil.process_iter(["pid", "name", "create_time"]))
        started = [i["create_time"] for i in named if i["name"] == "tritonserver" and i["pid"] != server.pid]
        return any(abs(at - server._launched) < 2 * MAKES_S for at in started)

    for _ in range(4):
        with TritonServer(on_free_ports(root / "model_repository")) as server:
            made, disturbed = {p for p, at in ours().items() if server._launched <= at}, beside(server)
            os.kill(server.pid, signal.SIGKILL)
        if not (disturbed or beside(server)):
            assert made and not made & ours().keys()
            return
        time.sleep(MAKES_S / 2)
    pytest.skip("tritonservers of others started all the while")


BAD = {
    "a status port that is taken": (("--status-port", "{taken}"), "status port {taken} on 127.0.0.1 is taken"),
    "one port twice": (("--http-port", "{free}", "--grpc-port", "{free}"), "expected ports of their own"),
    "no port": (("--http-port", "99999"), "less than or equal to 65535"),
    "a negative port": (("--grpc-port", "-1"), "greater than or equal to 0"),
    "a profile that is none": (("--profile", "nosuch"), "--profile: expected one of"),
    "a host that is none": (("--host", "no.such.host.invalid"), "--host no.such.host.invalid: expected an IPv4"),
    "a host of someone else": (("--host", "192.0.2.7"), "--host 192.0.2.7: expected an IPv4 address of this machine"),
    "a negative cache": (("--cache-mb", "-5"), "greater than or equal to 0"),
    "a cache beyond the memory": (("--cache-mb", "100000000"), "half of this machine's memory"),
    "a cache that nobody uses": (("--cache-mb", "8", "--profile", "fused"), "the profile fused has no cache"),
    "a cache of answers that nobody asks": (("--answer-cache-mb", "8", "--profile", "cached"), "keeps no answers"),
    "a collector that is no URL": (("--trace-url", "127.0.0.1:4318"), "--trace-url: expected a URL such as"),
    "a log that cannot be": (("--log-file", "/proc/none/triton.log"), "log /proc/none/triton.log: cannot be written"),
    "an open address without the guard": (("--host", "0.0.0.0", "--no-guard"), "leave --no-guard out"),
    "an open address that anyone calls": (("--host", "0.0.0.0"), "without --keys and --tls-cert"),
    "keys that are none": (("--keys", "/no/keys.toml"), "--keys /no/keys.toml: cannot be read"),
    "half a certificate": (("--tls-cert", "/no/cert.pem"), "--tls-cert and --tls-key: expected both"),
    "an authority without TLS": (("--client-ca", "/no/ca.pem"), "--client-ca: expected --tls-cert"),
    "two certificates": (("--tls", "self-signed", "--tls-cert", "/no/cert.pem"), "goes without --tls-cert"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_argument_that_is_wrong_is_named_before_anything_starts(root, name):
    arguments, expected = BAD[name]
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        ports = {"taken": s.getsockname()[1], "free": free_port("127.0.0.1")}
        run = f"serve --name {root.name} --artifacts {root.parent} --metrics-port 0".split()
        given = [a.format(**ports) for a in arguments]
        for port in ("http", "grpc", "status"):
            if f"--{port}-port" not in given:
                run += [f"--{port}-port", "0"]
        command = [sys.executable, "-m", "vivace.cli.main", *run, *given]
        out = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, timeout=PATIENCE_S)
    text = " ".join((out.stdout + out.stderr).replace("│", " ").split())
    assert out.returncode, text
    assert expected.format(**ports) in text and "starting Triton" not in text and "Traceback" not in text


def test_too_few_descriptors_are_named(root):
    command = (
        f"ulimit -n 64; exec {sys.executable} -m vivace.cli.main serve --name {root.name} --artifacts {root.parent}"
    )
    ports = " ".join(f"--{n}-port 0" for n in ("http", "grpc", "metrics", "status"))
    out = subprocess.run(["bash", "-c", f"{command} {ports}"], capture_output=True, text=True, cwd=CHECKOUT)
    text = " ".join((out.stdout + out.stderr).split())
    assert out.returncode and "open files: expected a limit of 512 and more, got 64" in text and "Traceback" not in text


def test_a_host_by_its_name(root):
    with TritonServer(on_free_ports(root / "model_repository", host="localhost")) as server:
        listening = {c.laddr.ip for c in psutil.Process(server.pid).net_connections("inet") if c.status == "LISTEN"}
        assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
