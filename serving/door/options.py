"""What the door listens on and lets through, and where its files lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from serving.door.hosts import Upstream
from vivace import contract
from vivace.explain_contract import EXPLAIN

PUBLIC = (contract.ENSEMBLE, EXPLAIN, contract.APPEND_EVENT, contract.UPDATE_STORE)
Balance = Literal["load", "user"]
READING = (contract.ENSEMBLE, EXPLAIN)  # of a key that may not write


@dataclass(frozen=True, kw_only=True)
class DoorOptions:
    """What the door listens on and lets through."""

    host: str
    """Address of the three public ports."""
    http_port: int
    grpc_port: int
    metrics_port: int
    threads: int = 2
    """Workers of Envoy; each adds a copy of its buffers."""
    max_body_bytes: int = 8 << 20
    """Longest request body; a longer one is answered 413."""
    max_header_kib: int = 7
    """All headers of a request together; Triton drops the connection at 8."""
    max_connections: int = 4096
    """Open connections of all clients of one port that have said something; three times as many with those that have
    not."""
    silent_s: float = 10.0
    """A connection on which nothing came is closed after so long; until then it takes nobody's place."""
    idle_s: float = 60.0
    """A connection without a request is closed after so long."""
    max_recommends: int = 208
    """Calls of ``recommend`` at Triton; more are answered 503 at once. Triton's HTTP side hands an answer to the thread
    that sends it through a socket and forgets it where that is full, which it is with 278: of all calls together there
    must be fewer, as one thread may have them all."""
    max_others: int = 40
    """The same of all other calls, which a storm of those does not keep out."""
    max_explains: int = 8
    """The same of ``explain``, each of which is as much work as several of ``recommend``."""
    slow_client_s: float = 15.0
    """A request that has not arrived whole by then is dropped."""
    timeout_s: float = 60.0
    """An answer that has not come by then is given up."""
    try_s: float = 2.0
    """A call of ``recommend`` that one of ``several`` has not answered by then is asked of another as well: twice what
    its queue lets it wait."""
    several: bool = False
    """There are other servers to ask."""
    append_s: float = 5.0
    """An event whose end has not come by then is answered 504: sent again under its id, it is stored once."""
    recovery_s: float = 8.0
    """How long a call of ``recommend`` is sent again while the server comes back."""
    keys: bool = False
    """A caller needs a key of those in ``DoorFiles.keys``."""
    tls: bool = False
    """With the certificate in ``DoorFiles.certificate``."""
    client_ca: bool = False
    """A caller needs a certificate of those in ``DoorFiles.client_ca``."""
    upstream: Upstream | None = None
    """Servers of other machines; None: tritonservers of this one."""
    balance: Balance = "load"
    """Which server a call of ``recommend`` goes to: one that has few, or its user's, as long as that one has less than
    ``most_of_mean`` times the calls of the mean."""
    most_of_mean: float = 1.5
    models: tuple[str, ...] = PUBLIC
    """Whose calls it lets through: those of callers, or a shard of retrieval, which is asked over HTTP alone."""

    def __post_init__(self) -> None:
        if self.balance not in get_args(Balance):
            raise ValueError(f"--balance: expected one of {', '.join(get_args(Balance))}, got {self.balance!r}")

    @property
    def by_user(self) -> bool:
        return self.balance == "user"


@dataclass(frozen=True, kw_only=True)
class AccessOptions:
    """Who is let in, and how the ports are read by nobody else. Files are read again when they change, but for
    ``client_ca``."""

    keys: Path | None = None
    """Of callers (``serving.door.keys``); None: no caller needs one."""
    certificate: Path | None = None
    """PEM, with its chain; None: no TLS."""
    private_key: Path | None = None
    client_ca: Path | None = None
    """Authorities, PEM: a caller needs a certificate of theirs."""
    insecure_network: bool = False
    """An address that others reach is served without keys or TLS too."""


@dataclass(frozen=True)
class DoorFiles:
    """What Envoy reads and where its admin page listens, in a folder that only the owner enters. Endpoints:
    ``serving.door.endpoints``."""

    folder: Path

    @property
    def admin(self) -> Path:
        return self.folder / "envoy-admin"

    @property
    def bootstrap(self) -> Path:
        return self.folder / "envoy.json"

    @property
    def keys(self) -> Path:
        """The filter that knows the callers' keys, which Envoy reads again when it changes; so with the next two."""
        return self.folder / "keys.json"

    @property
    def limits(self) -> Path:
        return self.folder / "limits.json"

    @property
    def certificate(self) -> Path:
        return self.folder / "certificate.json"

    @property
    def rollout(self) -> Path:
        """The filter that says which callers a version on trial gets (``serving.door.rollout``)."""
        return self.folder / "rollout.json"

    @property
    def client_ca(self) -> Path:
        """Authorities of callers' certificates, PEM."""
        return self.folder / "client-ca.pem"
