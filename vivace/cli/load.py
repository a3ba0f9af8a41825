"""``vivace load``."""

from __future__ import annotations

from typing import Annotated

import typer

from vivace.cli.options import DEFAULT_ARTIFACTS, MAX_PORT, Artifacts, Host, Name
from vivace.cli.query import require_server
from vivace.cli.runs import find_run
from vivace.cli.values import choice, values_of

PROTOCOLS = values_of("loadtest.generate.run_locust:USERS")
SHAPES = values_of("loadtest.generate.run_locust:SHAPES")


def load(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    host: Host = "127.0.0.1",
    http_port: Annotated[int, typer.Option(min=1, max=MAX_PORT)] = 8000,
    grpc_port: Annotated[int, typer.Option(min=1, max=MAX_PORT)] = 8001,
    protocol: Annotated[str, choice("--protocol", PROTOCOLS, "of the calls")] = "both",
    users: Annotated[int, typer.Option(help="concurrent users", min=1)] = 8,
    seconds: Annotated[int, typer.Option(help="length of the run", min=1)] = 20,
    web: Annotated[bool, typer.Option(help="locust's own page on 127.0.0.1:8089 instead of a headless run")] = False,
    shape: Annotated[str, choice("--shape", SHAPES, "open loop, latency from the moment due")] = "",
    qps: Annotated[float, typer.Option(help="with --shape: mean rate offered", min=0.01)] = 100.0,
) -> None:
    """Replay held-out requests with locust."""
    run = find_run(artifacts, name)
    for kind, port in (("http", http_port), ("grpc", grpc_port)):
        if protocol in (kind, "both"):
            require_server(f"{host}:{port}", run)
    from loadtest.generate.run_locust import run_locust

    code = run_locust(run.root, host, http_port, grpc_port, protocol, users, seconds, web, shape=shape, qps=qps)
    raise typer.Exit(code)
