"""Servers on other machines behind a door of their own: where they are, and how they are asked.

Each is a ``vivace serve`` whose guard answers for it: it says whether its models work, and refuses what it does not
take. A machine that is cut off says nothing more, so a connection whose bytes nobody acknowledges is given up by the
kernel (TCP_USER_TIMEOUT, RFC 5482), and what it carried is asked of another.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from serving.door.endpoints import GRPC, METRICS, OTHERS
from serving.door.tls import check_ca
from serving.door.trust import HOSTS, distrust
from serving.wheel import ServerError
from vivace.credentials import Credentials
from vivace.http_pool import HttpPool

HTTP_PORT, GRPC_PORT = 8000, 8001
READY = "/v2/health/ready"
ASK_S = 1.0
SILENT_MS = 1500  # nothing acknowledged for so long: the machine, or the way to it, is gone
_SOL_SOCKET, _SO_KEEPALIVE, _IPPROTO_TCP = socket.SOL_SOCKET, socket.SO_KEEPALIVE, socket.IPPROTO_TCP
_TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3"
# a server that says that it works and cannot store, as its own way to the store is cut
_EJECTED = {
    "consecutive_gateway_failure": 2, "enforcing_consecutive_gateway_failure": 100, "enforcing_consecutive_5xx": 0,
    "enforcing_success_rate": 0, "interval": "0.25s", "base_ejection_time": "1s", "max_ejection_time": "5s",
    "max_ejection_percent": 50,
}  # fmt: skip


@dataclass(frozen=True)
class Host:
    """Public ports of a server's guard."""

    name: str
    """As it was given, for people."""
    ip: str
    http_port: int = HTTP_PORT
    grpc_port: int = GRPC_PORT

    @classmethod
    def parse(cls, text: str) -> Host:
        """``10.0.0.5``, ``10.0.0.5:8000`` or ``10.0.0.5:8000:8001``, HTTP's and gRPC's port. Raises ServerError."""
        name, *ports = text.strip().split(":")
        wrong = f"--hosts: expected HOST, HOST:HTTP or HOST:HTTP:GRPC, got {text!r}"
        if not name or len(ports) > 2 or not all(p.isdecimal() and 0 < int(p) < 65536 for p in ports):
            raise ServerError(wrong)
        try:
            ip = socket.gethostbyname(name)
        except (OSError, UnicodeError) as error:
            raise ServerError(f"--hosts: {name}: expected an IPv4 address or a name that has one; {error}") from None
        return cls(name, ip, *map(int, ports))

    def address(self, cluster: str) -> dict[str, Any]:
        """Envoy's, of the port that a cluster of the door speaks to."""
        port = self.grpc_port if cluster == GRPC else self.http_port
        return {"socket_address": {"address": self.ip, "port_value": port}}

    def sign(self, cluster: str) -> str:
        """How Envoy's page of clusters calls it."""
        return f"{self.ip}:{self.grpc_port if cluster == GRPC else self.http_port}"


def parse_hosts(text: str) -> tuple[Host, ...]:
    """Of several by commas. Raises ServerError for none, or one twice."""
    hosts = tuple(Host.parse(part) for part in text.split(",") if part.strip())
    if not hosts:
        raise ServerError("--hosts: expected where the servers are, as 10.0.0.5:8000,10.0.0.6:8000; got none")
    places = [(host.ip, host.http_port) for host in hosts]
    for host in hosts:
        if places.count((host.ip, host.http_port)) > 1:
            raise ServerError(f"--hosts: {host.name}:{host.http_port} is there twice; name each server once")
    return hosts


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """How servers on other machines are asked."""

    hosts: tuple[Host, ...]
    ca: Path | None = None
    """PEM: the authority by which they are known; None: they are asked in the clear."""
    cert: Path | None = None
    """PEM with its key, shown to those that ask for one."""

    def __post_init__(self) -> None:
        if self.cert is not None and self.ca is None:
            raise ServerError("--hosts-cert: expected --hosts-ca with it, the authority of the servers' certificates")
        if self.ca is not None:
            check_ca(self.ca, "--hosts-ca")
        if self.cert is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(self.cert, password=lambda: "")
            except OSError as error:  # SSLError too
                raise ServerError(
                    f"--hosts-cert {self.cert}: expected a certificate and its key without a passphrase, as PEM in one "
                    f"file: {error}"
                ) from None

    def why_not(self, host: Host) -> str:
        """What stands between this door and a server that it does not count as well, in a few words; "" where only
        that server knows."""
        pair = None if self.cert is None else (self.cert, self.cert)
        tls = Credentials(key="", ca=self.ca or "", cert=pair, server_name=host.name if self.ca else "")
        pool = HttpPool(f"{host.ip}:{host.http_port}", tls)
        try:
            answer = pool.post(READY, b"", {}, ASK_S, method="GET")
        except ssl.SSLError as error:
            return distrust(error, HOSTS)
        except TimeoutError:
            return f"no answer in {ASK_S:g} s"
        except (OSError, HTTPException) as error:
            return f"no answer ({str(error) or type(error).__name__})"
        finally:
            pool.close()
        return distrust(ValueError(answer.body), HOSTS) if b"TLS" in answer.body else ""

    def cluster(self, name: str) -> dict[str, Any]:
        """Of Envoy's cluster, beside what one of this machine has."""
        if name == METRICS:
            return {}
        seconds = max(1, SILENT_MS // 1000)
        ints = [(_SOL_SOCKET, _SO_KEEPALIVE, 1), (_IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds),
                (_IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds), (_IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
                (_IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_MS)]  # fmt: skip
        options = [{"level": level, "name": number, "int_value": value} for level, number, value in ints]
        kept = {"upstream_bind_config": {"socket_options": options}} | self._tls()
        return kept | ({"outlier_detection": _EJECTED} if name == OTHERS else {})

    def _tls(self) -> dict[str, Any]:
        if self.ca is None:
            return {}
        names = [(host.name, "IP_ADDRESS" if _is_ip(host.name) else "DNS") for host in self.hosts]
        validation = {
            "trusted_ca": {"filename": str(self.ca)},
            "match_typed_subject_alt_names": [
                {"san_type": kind, "matcher": {"exact": name}} for name, kind in dict.fromkeys(names)
            ],
        }
        common: dict[str, Any] = {"validation_context": validation}
        if self.cert is not None:
            pair = {"certificate_chain": {"filename": str(self.cert)}, "private_key": {"filename": str(self.cert)}}
            common["tls_certificates"] = [pair]
        config = {"@type": f"{_TLS}.UpstreamTlsContext", "common_tls_context": common}
        return {"transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": config}}


def _is_ip(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
