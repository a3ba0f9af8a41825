"""Who stands behind the door: tritonservers of this machine, or guards of others, in files that Envoy watches.

A file a cluster, exchanged by a rename: Envoy takes the new endpoints within milliseconds, and no call that is under
way is touched (Envoy's "filesystem subscriptions").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from vivace.manifest import write_json

RECOMMEND, OTHERS, GRPC, METRICS = "triton_recommend", "triton_http", "triton_grpc", "triton_metrics"  # clusters
EXPLAINS = "triton_explain"
TRIAL = "triton_trial"  # of ``recommend`` by the version on trial


@dataclass(frozen=True)
class Sockets:
    """Triton's Unix sockets, in a folder that only the owner enters."""

    folder: Path

    @property
    def http(self) -> Path:
        return self.folder / "http"

    @property
    def grpc(self) -> Path:
        return self.folder / "grpc:1"  # gRPC appends the port to the address

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics"

    @property
    def grpc_url(self) -> str:
        """For a gRPC client of the same user."""
        return f"unix:{self.grpc}"

    def of(self, cluster: str) -> Path:
        """The socket that a cluster of the door speaks to."""
        return {GRPC: self.grpc, METRICS: self.metrics}.get(cluster, self.http)

    def address(self, cluster: str) -> dict[str, Any]:
        """The same as Envoy's address."""
        return pipe(self.of(cluster))

    def sign(self, cluster: str) -> str:
        """How Envoy's page of clusters calls it."""
        return str(self.of(cluster))


class Endpoint(Protocol):
    """Where a server is: ``Sockets`` of this machine, or a ``serving.door.hosts.Host``."""

    def address(self, cluster: str) -> dict[str, Any]: ...
    def sign(self, cluster: str) -> str: ...


class Turn(Enum):
    """What an endpoint is sent: everything, nothing new, nothing unless no other is there, or what the callers of a
    version on trial ask."""

    TAKES = "HEALTHY"
    LEAVES = "DRAINING"
    ILL = "UNHEALTHY"
    TRIES = "on trial"


Endpoints = Mapping[Endpoint, Turn]


def endpoints_file(folder: Path, cluster: str) -> Path:
    return folder / f"endpoints-{cluster}.json"


def pipe(path: Path) -> dict[str, Any]:
    """A Unix socket as Envoy's address."""
    return {"pipe": {"path": str(path)}}


def write_endpoints(folder: Path, endpoints: Endpoints, metrics: Path | None = None) -> None:
    """Exchanges the files of all clusters. ``metrics``: the socket where those of all servers are, in the place of
    theirs."""
    for cluster in (TRIAL, RECOMMEND, EXPLAINS, OTHERS, GRPC, METRICS):
        of_cluster = [(s, t) for s, t in endpoints.items() if (t is Turn.TRIES) == (cluster == TRIAL)]
        places = [(s.address(cluster), Turn.TAKES if t is Turn.TRIES else t) for s, t in of_cluster]
        if cluster == METRICS and metrics is not None:
            places = [(pipe(metrics), Turn.TAKES)]
        listed = [{"endpoint": {"address": address}, "health_status": turn.value} for address, turn in places]
        assignment = {
            "@type": "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            "cluster_name": cluster,
            "endpoints": [{"lb_endpoints": listed}],
        }
        write_json(endpoints_file(folder, cluster), {"resources": [assignment]})
