"""``vivace load``."""

from __future__ import annotations

from typing import Annotated

import typer

from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, Host, Name, reported


def load(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    host: Host = "127.0.0.1",
    http_port: int = 8000,
    grpc_port: int = 8001,
    protocol: Annotated[str, typer.Option(help="grpc, http or both")] = "both",
    users: Annotated[int, typer.Option(help="concurrent users")] = 8,
    seconds: int = 20,
    web: Annotated[bool, typer.Option(help="locust's own page on 127.0.0.1:8089 instead of a headless run")] = False,
    shape: Annotated[
        str, typer.Option(help="open loop, latency from the moment due: constant, ramp, burst or diurnal")
    ] = "",
    qps: Annotated[float, typer.Option(help="with --shape: mean rate offered")] = 100.0,
) -> None:
    """Replay held-out requests with locust."""
    from loadtest.generate.run_locust import run_locust

    with reported():
        code = run_locust(
            artifacts / name, host, http_port, grpc_port, protocol, users, seconds, web, shape=shape, qps=qps
        )
        raise typer.Exit(code)
