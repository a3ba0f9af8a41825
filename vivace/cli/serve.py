"""``vivace serve``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, Host, Name, Profile, reported, say


def serve(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    host: Host = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="0: any free port")] = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    status_port: Annotated[int, typer.Option(help="Prometheus metrics of the watchdog (0: none)")] = 8003,
    profile: Profile = "",
    cache_mb: Annotated[int, typer.Option(help="cache of encoded users (0: none); takes the profile cached")] = 0,
    trace_url: Annotated[
        str, typer.Option(help="OpenTelemetry collector, such as http://127.0.0.1:4318/v1/traces")
    ] = "",
    trace_rate: Annotated[int, typer.Option(help="one of so many requests is traced")] = 100,
    log_file: Annotated[Path | None, typer.Option(help="Triton's log; default artifacts/<name>/triton.log")] = None,
    verbose: int = 0,
) -> None:
    """Start the real Triton with the ensemble, watch its workers, stop cleanly on Ctrl-C."""
    from serving.launcher import ServerOptions
    from serving.repository import served_from
    from serving.service import run_until_signal

    with reported():
        root = artifacts / name
        served = served_from(root, profile)
        if served != root:
            say(f"profile {profile} serves {served}")
        options = ServerOptions(
            repository=served / "model_repository",
            host=host,
            http_port=http_port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            profile=profile or ("cached" if cache_mb else ""),
            cache_bytes=cache_mb << 20,
            trace_url=trace_url,
            trace_rate=trace_rate,
            log=log_file or root / "triton.log",
            verbose=verbose,
        )
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        run_until_signal(options, status_port, say)
