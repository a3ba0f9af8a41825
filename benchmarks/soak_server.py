"""``vivace serve`` as a process for a long run: what its processes use, killing a worker, what it leaves."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil

from serving.process import STUB
from serving.repository import ALL_MODELS
from serving.start_checks import free_port
from vivace.run import Run

START_S = 180.0
HOST = "127.0.0.1"
SHM = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) .* (/dev/shm/vivace_\S+)( \(deleted\))?$")
COUNTED = (
    "vivace_model_restarts_total", "vivace_server_restarts_total", "vivace_shm_segments_removed_total",
    "vivace_canary_failures_total", "vivace_ready",
)  # fmt: skip


def role(process: psutil.Process) -> str:
    """tritonserver, envoy, supervisor or a worker's model; "" for anything else."""
    line = process.cmdline()
    if not line:
        return ""
    if STUB in line[0]:
        return next((m for m in ALL_MODELS if any(f"/{m}/" in a for a in line)), "worker")
    name = Path(line[0]).name
    return name if name in ("tritonserver", "envoy") else "supervisor"


def mapped_segments(pid: int) -> dict[str, float]:
    """Shared memory of workers that a process maps: segments and MiB, and how many of them have no name any more."""
    sizes: dict[str, int] = {}
    gone: set[str] = set()
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if (segment := SHM.match(line)) is not None:
            low, high, name, deleted = segment.groups()
            sizes[name] = sizes.get(name, 0) + int(high, 16) - int(low, 16)
            if deleted:
                gone.add(name)
    return {"mapped": len(sizes), "mapped_mib": round(sum(sizes.values()) / 2**20, 1), "mapped_deleted": len(gone)}


class ServedProcess:
    """A context manager: ready inside, stopped after."""

    def __init__(self, run: Run) -> None:
        self.run, self.killed = run, 0
        self.ports = {name: free_port(HOST) for name in ("http", "grpc", "metrics", "status")}
        self.http_url, self.grpc_url = f"{HOST}:{self.ports['http']}", f"{HOST}:{self.ports['grpc']}"
        self.log = run.root / "serve.log"
        self._prefixes: set[str] = set()
        self._processes: list[psutil.Process] = []

    def __enter__(self) -> ServedProcess:
        command = [
            sys.executable, "-m", "vivace.cli.main", "serve", "--name", self.run.root.name, "--artifacts",
            str(self.run.root.parent), *(a for n, port in self.ports.items() for a in (f"--{n}-port", str(port))),
        ]  # fmt: skip
        with self.log.open("w") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        deadline = time.monotonic() + START_S
        while "ready:" not in self.log.read_text():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                raise RuntimeError(f"vivace serve did not start\n{self.log.read_text()[-3000:]}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGTERM)

    def stop(self, number: int) -> int:
        """Its exit code."""
        if self._process.poll() is None:
            self._processes = self.processes()
            self._process.send_signal(number)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
        return self._process.wait()

    def leftovers(self) -> list[str]:
        """Processes and shared memory that it left."""
        _, alive = psutil.wait_procs(self._processes, timeout=10)
        segments = [p.name for p in Path("/dev/shm").glob("vivace_*") if p.name[:20] in self._prefixes]
        return [f"process {p.pid}" for p in alive] + segments

    def ends(self) -> list[str]:
        """What the supervisor said of processes that ended by themselves."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if "starting it again" in line or "ending it" in line]

    def processes(self) -> list[psutil.Process]:
        root = psutil.Process(self._process.pid)
        return [root, *root.children(recursive=True)]

    def kill_worker(self, rng: random.Random) -> None:
        workers = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and STUB in "".join(process.cmdline()[:1]):
                    workers.append(process.pid)
        if workers:
            os.kill(rng.choice(workers), signal.SIGKILL)
            self.killed += 1

    def use(self) -> dict[str, dict[str, float]]:
        """Memory (proportional set size, MiB) and descriptors by role, and shared memory."""
        pss: dict[str, float] = {}
        descriptors: dict[str, float] = {}
        shm: dict[str, float] = {}
        count, zombies = 0, 0
        for process in self.processes():
            with contextlib.suppress(psutil.Error, OSError):
                if process.status() == psutil.STATUS_ZOMBIE:
                    zombies += 1
                    continue
                name, count = role(process), count + 1
                pss[name] = pss.get(name, 0.0) + round(process.memory_full_info().pss / 2**20, 1)
                descriptors[name] = descriptors.get(name, 0) + process.num_fds()
                if name == "tritonserver":
                    shm |= mapped_segments(process.pid)
                    text = Path(f"/proc/{process.pid}/maps").read_text()
                    self._prefixes |= {m[:20] for m in re.findall(r"/dev/shm/(vivace_\w{12}_)", text)}
        files = [p for p in Path("/dev/shm").glob("vivace_*") if p.name[:20] in self._prefixes]
        shm |= {"files": len(files), "processes": count, "zombies": zombies}
        return {"pss_mib": pss, "descriptors": descriptors, "shm": shm}

    @staticmethod
    def larger(a: dict[str, dict[str, float]], b: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        """The larger of each figure."""
        return {
            kind: {n: max(a[kind].get(n, 0), b[kind].get(n, 0)) for n in sorted({*a[kind], *b[kind]})} for kind in a
        }

    def metrics(self) -> dict[str, float]:
        """What the watchdog counted."""
        with urllib.request.urlopen(f"http://{HOST}:{self.ports['status']}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith(COUNTED)}
