"""Where the shards of retrieval are: ``a:8101|b:8101,c:8102`` are two shards, the first with a twin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vivace.credentials import Credentials
from vivace.http_pool import UNIX

SHARDS_ENV = "VIVACE_SHARDS"  # of a worker: addresses
WAIT_ENV = "VIVACE_SHARD_WAIT_MS"
CERT_ENV, CA_ENV = "VIVACE_SHARD_CERT", "VIVACE_SHARD_CA"
WAIT_MS = 300


@dataclass(frozen=True)
class ShardAddresses:
    """Of each shard, by its number, the servers that have it: host:port, or unix: and the path of a socket."""

    twins: tuple[tuple[str, ...], ...]

    @classmethod
    def parse(cls, text: str, shards: int) -> ShardAddresses:
        """Raises ValueError for what is not ``shards`` addresses."""
        parsed = cls(tuple(tuple(twin.strip() for twin in shard.split("|")) for shard in text.split(",")))
        for address in (twin for shard in parsed.twins for twin in shard):
            host, _, port = address.rpartition(":")
            if not address.startswith(UNIX) and not (host and port.isdecimal() and 0 < int(port) < 65536):
                raise ValueError(f"--shard-hosts: expected host:port of each shard, got {address!r} in {text!r}")
        if len(parsed.twins) != shards:
            raise ValueError(
                f"--shard-hosts: expected the addresses of {shards} shards, by commas in their order (twins by |), got "
                f"{len(parsed.twins)} in {text!r}"
            )
        return parsed

    def __str__(self) -> str:
        return ",".join("|".join(shard) for shard in self.twins)


def credentials_from(told: Mapping[str, str]) -> Credentials | None:
    """What a server shows the shards and knows them by, of an environment; None where they are asked in the clear.
    Raises ValueError for files that are none."""
    certificate, ca = told.get(CERT_ENV, ""), told.get(CA_ENV, "")
    if not certificate and not ca:
        return None
    try:
        credentials = Credentials(key="", ca=ca, cert=(certificate, certificate) if certificate else None)
        credentials.ssl_context()
    except ValueError as error:
        raise ValueError(
            f"--shard-cert {certificate or '(none)'}, --shard-ca {ca or '(none)'}: expected PEM files, the first with "
            f"a certificate and its key: {error}"
        ) from None
    return credentials
