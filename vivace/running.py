"""The servers of a run that run on this machine, as they say themselves (``serving.control`` answers)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil

from vivace.http_pool import UnixConnection
from vivace.run import Run

ASK_S = 5.0


@dataclass(frozen=True)
class Running:
    """One ``vivace serve``: its process, the socket that it takes orders by, and what it serves where."""

    pid: int
    socket: Path
    state: dict[str, Any]

    def address(self, protocol: str) -> str:
        """host:port of its "grpc" or "http"; "" of one that does not say."""
        host, port = self.state.get("address", ""), self.state.get(f"{protocol}_port", 0)
        return f"{host}:{port}" if host and port else ""


def running(run: Run) -> Iterator[Running]:
    """Those that answer, but for shards, which only servers ask; word of those that are gone is removed."""
    for word in sorted(run.servers.glob("*.json"), key=lambda word: int(word.stem)):
        try:
            told = json.loads(word.read_text())
            with contextlib.closing(UnixConnection(Path(told["socket"]), ASK_S)) as connection:
                connection.request("GET", "/")
                state = json.loads(connection.getresponse().read())
            if state.get("shard") is None:
                yield Running(int(told["pid"]), Path(told["socket"]), state)
        except (OSError, HTTPException, ValueError, KeyError):
            if not psutil.pid_exists(int(word.stem)):
                word.unlink(missing_ok=True)
