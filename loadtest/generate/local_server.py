"""Options of a server of one's own, for the length of a measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serving.launcher import TritonServer
from serving.server_options import ServerOptions


def on_free_ports(repository: Path, profile: str = "", log: Path | None = None, **more: Any) -> ServerOptions:
    """Options of a server of a model repository that takes whatever ports are free; ``more`` as ``ServerOptions``."""
    return ServerOptions(repository, http_port=0, grpc_port=0, metrics_port=0, profile=profile, log=log, **more)


def grpc_address(server: TritonServer) -> str:
    """host:port of a running server."""
    return f"{server.host}:{server.grpc_port}"
