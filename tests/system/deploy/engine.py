"""A Docker Engine of the tests' own: started by hand, on a socket and in folders of its own, so that what runs on the
machine already is left alone."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vivace" / "compose"
PROGRAMS = {
    "dockerd": "docker.io",
    "docker": "docker.io",
    "docker-compose": "docker-compose",
    "debootstrap": "debootstrap",
}
START_S = 30.0
MOST_KIB = 10 << 20  # of images that are kept; beyond, all are built anew
PR_SET_PDEATHSIG = 1  # of prctl(2)


class NoEngineError(RuntimeError):
    """Why no engine can be started here."""


@dataclass(frozen=True)
class Engine:
    """``docker`` and ``docker-compose`` against one engine."""

    socket: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "DOCKER_HOST": f"unix://{self.socket}"}

    def docker(self, *arguments: str) -> str:
        done = subprocess.run(["docker", *arguments], env=self.environment, capture_output=True, text=True)
        assert not done.returncode, f"docker {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def last_words(self) -> str:
        """What containers that are not running wrote last."""
        ended = self.docker("ps", "-a", "--filter", "status=exited", "--format", "{{.Names}}").split()
        logs = (["docker", "logs", "--tail", "10", name] for name in ended)
        run = partial(subprocess.run, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return "\n".join(f"{log[-1]}: {run(log).stdout.decode()}" for log in logs)

    def inspect(self, container: str) -> dict[str, Any]:
        described: dict[str, Any] = json.loads(self.docker("inspect", container))[0]
        return described


def check_programs() -> None:
    """Raises NoEngineError that names what is missing."""
    if os.geteuid() != 0:
        raise NoEngineError("needs root, to start dockerd")
    missing = sorted({package for program, package in PROGRAMS.items() if not shutil.which(program)})
    if missing:
        raise NoEngineError(f"needs {', '.join(missing)} (apt-get install {' '.join(missing)})")
    if any(process.info["name"] == "dockerd" for process in psutil.process_iter(["name"])):
        raise NoEngineError("another dockerd runs here, whose iptables rules a second one would overwrite")


def end_with_parent() -> None:
    """In a process before it starts: the kernel ends it if its parent is killed outright."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def engine(folder: Path) -> Iterator[Engine]:
    """A running engine whose images stay in CACHE for the next one; ``folder`` takes what lasts as long as it does.
    Raises NoEngineError."""
    check_programs()
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NoEngineError(f"the engine of {CACHE} is in use by another run") from None
        kept = subprocess.run(["du", "-sk", str(CACHE / "engine")], capture_output=True, text=True).stdout
        if kept and int(kept.split()[0]) > MOST_KIB:
            shutil.rmtree(CACHE / "engine")
        runs = Engine(folder / "docker.sock")
        command = ["dockerd", "--host", f"unix://{runs.socket}", "--data-root", str(CACHE / "engine")]
        command += ["--exec-root", str(folder / "exec"), "--pidfile", str(folder / "pid"), "--bridge=none"]
        command += ["--ip-forward=false"]  # which would change the machine's forwarding policy for good
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, preexec_fn=end_with_parent
            )
        try:
            deadline = time.monotonic() + START_S
            while subprocess.run(["docker", "info"], env=runs.environment, capture_output=True).returncode:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise NoEngineError("dockerd does not start here: " + (folder / "log").read_text()[-500:])
                time.sleep(0.2)
            yield runs
        finally:
            process.terminate()
            process.wait(60)
            for line in Path("/proc/mounts").read_text().splitlines():  # of namespaces, which dockerd may leave
                if (mounted := line.split()[1]).startswith(str(folder)):
                    subprocess.run(["umount", "--lazy", mounted], check=True)
