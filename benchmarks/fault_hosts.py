"""Machines for a measurement: network namespaces with addresses of their own, each with a ``vivace serve``, joined by a
bridge to this one. Needs root and ``ip`` (iproute2)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.213.7"  # of the bridge; this machine is .1
CUT_S = 10.0
STATUS_PORT = 8003
START_S = 120.0


def _ip(*words: str) -> None:
    """Raises RuntimeError with what ``ip`` said."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}; network namespaces need root and iproute2")


@dataclass
class Machine:
    """One namespace with its server."""

    name: str
    address: str
    link: str
    """Its end at the bridge."""
    command: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(self.command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)

    def end(self) -> None:
        """As ``systemctl stop``: what is under way is answered."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def restart(self) -> None:
        self.end()
        self.start()

    def ready(self) -> bool:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://{self.address}:{STATUS_PORT}/ready", timeout=1),
        ):
            return True
        return False

    def cut(self, seconds: float = CUT_S) -> None:
        """Nothing goes to it or comes from it for so long; nobody is told."""
        _ip("link", "set", self.link, "down")
        time.sleep(seconds)
        _ip("link", "set", self.link, "up")

    def cut_off(self, port: int, seconds: float = CUT_S) -> None:
        """What it sends to a port elsewhere is dropped for so long."""
        rule = ["OUTPUT", "-p", "tcp", "--dport", str(port), "-j", "DROP"]
        inside = ["ip", "netns", "exec", self.name, "iptables"]
        subprocess.run([*inside, "-A", *rule], check=True)
        time.sleep(seconds)
        subprocess.run([*inside, "-D", *rule], check=True)


@contextlib.contextmanager
def machines(root: Path, count: int, store: str, profile: str) -> Iterator[list[Machine]]:
    """So many, with ready servers of the run in ``root`` that share the Valkey at ``store``; gone when the block ends.
    ``store`` is a URL whose server takes calls for this machine's address in the network."""
    mark = f"vf{os.getpid() % 10_000}"
    bridge, started = f"{mark}b", list[Machine]()
    with contextlib.ExitStack() as stack:
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "del", bridge)
        _ip("addr", "add", f"{NETWORK}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for number in range(count):
            started.append(stack.enter_context(_machine(root, f"{mark}n{number}", number, bridge, store, profile)))
        deadline = time.monotonic() + START_S
        while not all(machine.ready() for machine in started):
            if time.monotonic() > deadline or any(m.process is None or m.process.poll() is not None for m in started):
                raise RuntimeError("\n".join(m.log.read_text()[-2000:] for m in started))
            time.sleep(0.2)
        yield started


@contextlib.contextmanager
def _machine(root: Path, name: str, number: int, bridge: str, store: str, profile: str) -> Iterator[Machine]:
    address, link = f"{NETWORK}.{10 + number}", f"{name}v"
    with contextlib.ExitStack() as stack:
        _ip("netns", "add", name)
        stack.callback(_ip, "netns", "del", name)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        stack.callback(_ip, "link", "del", link)
        _ip("link", "set", link, "master", bridge, "up")
        for words in (["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"],
                      ["link", "set", "lo", "up"]):  # fmt: skip
            _ip("-n", name, *words)
        log = root.parent / f"{name}.log"
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "vivace.cli.main", "serve"]
        command += ["--artifacts", str(root.parent), "--name", root.name, "--host", address, "--insecure-network"]
        command += ["--profile", profile, "--store", store, "--log-file", str(root.parent / f"{name}-triton.log")]
        machine = Machine(name, address, link, command, log)
        machine.start()
        stack.callback(machine.end)
        yield machine
