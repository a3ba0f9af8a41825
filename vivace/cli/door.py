"""``vivace door``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from vivace.cli.options import Host, say
from vivace.cli.serve import (
    ClientCaOption,
    InsecureNetworkOption,
    KeysOption,
    PortOption,
    TlsCertOption,
    TlsKeyOption,
)
from vivace.cli.values import choice

HostsOption = Annotated[
    str,
    typer.Option(
        metavar="HOSTS",
        help="where 'vivace serve' runs, by commas: HOST, HOST:HTTP or HOST:HTTP:GRPC (ports 8000 and 8001)",
    ),
]
HostsCaOption = Annotated[
    Path | None, typer.Option(help="PEM: the authority of the servers' certificates", exists=True, dir_okay=False)
]
HostsCertOption = Annotated[
    Path | None, typer.Option(help="PEM, with its key: shown to servers that ask for one", exists=True, dir_okay=False)
]
BALANCES = ("load", "user")
BalanceOption = Annotated[
    Any, choice("--balance", BALANCES, "the server of a call: one with few calls, or its user's, where caches pay")
]


def door(
    hosts: HostsOption,
    host: Host = "127.0.0.1",
    http_port: PortOption = 8000,
    grpc_port: PortOption = 8001,
    metrics_port: PortOption = 8002,
    keys: KeysOption = None,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    client_ca: ClientCaOption = None,
    insecure_network: InsecureNetworkOption = False,
    hosts_ca: HostsCaOption = None,
    hosts_cert: HostsCertOption = None,
    balance: BalanceOption = "load",
) -> None:
    """One door before servers on several machines: calls are spread, and a machine that is cut off is left out."""
    from serving.door.hosts import Upstream, parse_hosts
    from serving.door.options import AccessOptions
    from serving.hosts import HostsDoorOptions, run_door

    access = AccessOptions(
        keys=keys, certificate=tls_cert, private_key=tls_key, client_ca=client_ca, insecure_network=insecure_network
    )
    options = HostsDoorOptions(
        upstream=Upstream(hosts=parse_hosts(hosts), ca=hosts_ca, cert=hosts_cert), access=access,
        balance=balance,
        **dict(host=host, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port),  # type: ignore[arg-type]
    )  # fmt: skip
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    run_door(options, say)
