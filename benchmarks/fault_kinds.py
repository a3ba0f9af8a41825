"""What is done to servers behind one door and to the Valkey that they share, and how a run is copied for that."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.local_valkey import ValkeyServer, stopped
from serving.acceptance import Acceptance, recorded_calls
from serving.fleet import Fleet
from serving.releases import publishing, releases
from vivace.explain_contract import EXPLAIN
from vivace.run import Run
from vivace.store.remote.copying import copy as copied, end_of

WINDOW_S, STOPPED_S, FULL_S, SILENT_S = 2.0, 10.0, 8.0, 3.0


@dataclass(frozen=True)
class Fault:
    """``do`` returns when it has passed. ``window_s``: what comes so soon after its begin is not judged; longer than
    WINDOW_S only where nobody is there who could answer."""

    do: Callable[[], None]
    window_s: float = WINDOW_S


def copy_of(run: Run, folder: Path) -> Run:
    """The served version of a run with its store, in a folder that is not there yet."""
    copy, release = Run(folder), run.repository.resolve()
    shutil.copytree(release, copy.root / release.name)
    copy.repository.symlink_to(release.name)
    shutil.copytree(run.feature_store, copy.feature_store)
    shutil.copytree(run.compiled, copy.compiled)
    return copy


def published_again(run: Run) -> Path:
    """The served version once more, under the next number."""
    old = run.repository.resolve()
    number = old.name.rpartition(".")[2]
    with publishing(run.repository) as (folder, version):
        shutil.copytree(old, folder, dirs_exist_ok=True)
        for model in folder.iterdir():
            if (model / number).is_dir():
                (model / number).rename(model / str(version))
    return releases(run.repository)[-1]


def filled(stack: contextlib.ExitStack, run: Run, *settings: str) -> ValkeyServer:
    """A Valkey with the run's store, until the stack ends. ``settings``: more of its own."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "valkey"
    always = ("--appendonly", "yes", "--appendfsync", "always")
    server = stack.enter_context(ValkeyServer(folder, *always, *settings))
    with end_of(run.feature_store) as source, end_of(server.url) as target:
        copied(source, target, False, lambda text: None)
    return server


def wait_well(fleet: Fleet) -> None:
    deadline = time.monotonic() + 60
    while not (fleet.ready and all(r.watchdog.health.ready for r in fleet.replicas)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not well again: {fleet.report()}")
        time.sleep(0.1)


def _halted(pids: Iterable[int], seconds: float) -> None:
    """Stops processes (SIGSTOP) for so long; one that was ended meanwhile stays so."""
    halted = list(pids)
    for pid in halted:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in halted:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def faults_of_servers(fleet: Fleet, rng: random.Random) -> dict[str, Fault]:
    """What is done to the processes of a fleet."""

    def kill_worker() -> None:
        workers = rng.choice(fleet.replicas).watchdog.workers()
        os.kill(rng.choice([pid for pid, model in workers.items() if model != EXPLAIN]), signal.SIGKILL)

    def kill_guard() -> None:
        assert fleet.door is not None
        os.kill(fleet.door.pid, signal.SIGKILL)

    return {
        "tritonserver killed": Fault(lambda: os.kill(rng.choice(fleet.replicas).server.pid, signal.SIGKILL)),
        "worker killed": Fault(kill_worker),
        f"server stopped for {STOPPED_S:.0f} s": Fault(
            lambda: _halted([rng.choice(fleet.replicas).server.pid], STOPPED_S)
        ),
        f"all servers stopped for {SILENT_S:.0f} s": Fault(
            lambda: _halted([r.server.pid for r in fleet.replicas], SILENT_S), SILENT_S + WINDOW_S
        ),
        "guard killed": Fault(kill_guard),
    }


def faults_of_versions(fleet: Fleet, run: Run) -> dict[str, Fault]:
    """The served version exchanged for the same under another number, and back."""
    first, second = run.repository.resolve(), published_again(run)
    accept = Acceptance(recorded_calls(run))
    return {
        "another version": Fault(lambda: fleet.serve(second, accept, print)),
        "and back": Fault(lambda: fleet.serve(first, accept, print)),
    }


def faults_of_store(server: ValkeyServer) -> dict[str, Fault]:
    """What is done to the Valkey that the servers share."""

    def start_again() -> None:
        server.send(signal.SIGTERM)
        assert server.process is not None
        server.process.wait()
        server.start()

    def kill() -> None:
        server.kill()
        server.start()

    def silent() -> None:
        with stopped(server):
            time.sleep(SILENT_S)

    def fill_up() -> None:
        with server.client() as client:
            client.config_set("maxmemory", "1mb")  # below what it holds: writes are refused, reads go on
            time.sleep(FULL_S)
            client.config_set("maxmemory", "0")

    return {
        "Valkey started again": Fault(start_again),
        "Valkey killed": Fault(kill),
        f"Valkey stopped for {SILENT_S:.0f} s": Fault(silent),
        f"Valkey full for {FULL_S:.0f} s": Fault(fill_up),
    }
