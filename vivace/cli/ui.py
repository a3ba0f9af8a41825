"""``vivace ui``."""

from __future__ import annotations

import errno
import secrets
import socket
from functools import partial
from typing import Annotated

import typer

from vivace.cli.options import (
    DEFAULT_ARTIFACTS,
    MAX_PORT,
    Artifacts,
    Key,
    Name,
    Protocol,
    TlsCa,
    TlsCert,
    credentials,
    say,
)
from vivace.cli.query import require_server
from vivace.cli.runs import find_run, run_name, runs
from vivace.cli.served import address_of, served_run
from vivace.client import VivaceClient
from vivace.run import Run
from vivace.running import running

LOOPBACK = "127.0.0.1"
PORT = 8010


def ui(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    url: Annotated[str, typer.Option(help="host:port of the server; of the run's server if empty")] = "",
    protocol: Protocol = "grpc",
    port: Annotated[int, typer.Option(help="of the page (0: a free one)", min=0, max=MAX_PORT)] = PORT,
    host: Annotated[str, typer.Option(help="address that the page listens on")] = LOOPBACK,
    insecure_network: Annotated[
        bool,
        typer.Option(
            "--insecure-network",
            help="take another --host: only in a container whose port is published on 127.0.0.1 alone",
        ),
    ] = False,
    key: Key = "",
    tls_ca: TlsCa = "",
    tls_cert: TlsCert = "",
    metrics_url: Annotated[str, typer.Option(help="host:port of the server's metrics; as the run's server says")] = "",
    status_url: Annotated[str, typer.Option(help="host:port of its health; as the run's server says")] = "",
    operator_key: Annotated[
        str, typer.Option(envvar="VIVACE_OPERATOR_KEY", show_default=False, help="for rollouts; one is made if empty")
    ] = "",
) -> None:
    """Open a page over the running server: try it as a person, watch it as an operator, judge its models. On this
    machine alone."""
    import uvicorn

    from vivace.cli.page import judged, watch
    from vivace.cli.page.app import answered, make_app
    from vivace.cli.page.catalogue import Catalogue
    from vivace.cli.page.load import Load
    from vivace.cli.page.operations import Operations, ports_of
    from vivace.cli.page.served import Served

    if host not in (LOOPBACK, "localhost", "::1") and not insecure_network:
        raise typer.BadParameter(
            f"expected {LOOPBACK}, as whoever reaches the page may store events and send load; in a container whose "
            f"port is published on {LOOPBACK} alone, give --insecure-network", param_hint="--host",
        )  # fmt: skip
    there = runs(artifacts)
    run = find_run(artifacts, name) if name or (there and not url) else None
    address = address_of(url, protocol, run)
    require_server(address, run)
    access = credentials(key, tls_ca, tls_cert)
    if not name and (url or not list(running(run or Run(artifacts)))):  # nobody says which run that server serves
        with VivaceClient(address, protocol, **access) as client:
            run, why = served_run(client, address, artifacts)
        if run is None:
            say(f"{why}: ids alone are shown; --name names the run")
    called = run_name(run, artifacts) if run else ""
    served = Served(lambda: address_of(url, protocol, run), protocol, access, f"vivace serve --name {called or 'RUN'}")
    with listen(host, port) as listening:
        port = listening.getsockname()[1]
        operator_key = operator_key or secrets.token_urlsafe(9)
        ports = partial(ports_of, run, served, metrics_url, status_url)
        operations = Operations(run, artifacts, ports, access, operator_key)
        catalogue = Catalogue(run)
        watched = watch.routes(operations, Load(protocol, access), lambda: served.address, catalogue.some_users)
        app = make_app(served, catalogue, called, port, (*watched, *judged.routes(judged.Judged(run), answered)))
        say(f"page: http://{LOOPBACK}:{port}/ over the server at {address}; Ctrl-C stops")
        say(f"operator's key, for rollouts: {operator_key}")
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
        uvicorn.Server(config).run(sockets=[listening])
    served.close()
    catalogue.close()


def listen(host: str, port: int) -> socket.socket:
    """The page's socket. Raises BadParameter where another process has the port."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise typer.BadParameter(
            f"{port} is taken, perhaps by the page of another run; give another, or 0 for a free one",
            param_hint="--port",
        ) from error
