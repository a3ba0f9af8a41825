"""What is looked at before a server starts: its ports, and what a launcher left that was killed outright."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path

from serving.releases import HELD, is_free
from serving.wheel import ServerError

LEFTOVER = "vivace-triton-"  # how a launcher's folder for temporary files is called


def free_port(host: str) -> int:
    with socket.socket() as s:
        s.bind((host, 0))
        return int(s.getsockname()[1])


def port_in_use(host: str, port: int) -> bool:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError:
            return True
    return False


def check_ports(host: str, ports: dict[str, int]) -> None:
    """Raises ServerError for options of one port, or a port that is taken. 0 stands for any free one."""
    chosen = {name: port for name, port in ports.items() if port}
    for name, port in chosen.items():
        same = [other for other, value in chosen.items() if value == port]
        if len(same) > 1:
            raise ServerError(f"{' and '.join(same)}: expected ports of their own, got {port} for both")
        if port_in_use(host, port):
            raise ServerError(
                f"{name.removeprefix('--').replace('-', ' ')} {port} on {host} is taken; choose another with {name}"
            )


def sweep_leftovers() -> None:
    """Removes folders of launchers that were killed outright: those that nobody holds (``serving.releases.held``)."""
    for folder in Path(tempfile.gettempdir()).glob(f"{LEFTOVER}*"):
        if folder.stat().st_uid == os.getuid() and (folder / HELD).exists() and is_free(folder):
            shutil.rmtree(folder, ignore_errors=True)
