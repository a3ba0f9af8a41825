"""Where a Valkey is, and how it is asked: ``valkey://[user:password@]host:port/0?limit_ms=5&prefix=shop``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

SCHEMES = ("valkey", "valkeys", "redis", "rediss", "unix")


@dataclass(frozen=True)
class Address:
    """``url``: for the client. Limits are of each wait for the server, in ms: of reads on the request path, and of
    writes."""

    url: str
    limit_ms: float = 5.0
    write_ms: float = 1000.0
    near_mb: float = 64.0
    """Of the values last read, kept in each process for when the server does not answer."""
    cluster: bool = False
    """The server is a node of a cluster: calls go to the node that has the key."""
    replicas: int = 0
    """An append is acknowledged when so many replicas have it too, within half of ``write_ms``."""
    prefix: str = "vivace"
    """Of every key: runs with prefixes of their own share a server."""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises ValueError that does not repeat the password."""
        parts = urlsplit(text)
        if parts.scheme not in SCHEMES or not (parts.hostname or parts.path):
            raise ValueError(
                f"--store: expected a URL such as valkey://127.0.0.1:6379/0 ({', '.join(SCHEMES)}), got {shown(text)!r}"
            )
        ours, others = dict[str, str](), list[tuple[str, str]]()
        for name, value in parse_qsl(parts.query):
            if name in ("limit_ms", "write_ms", "near_mb", "prefix", "cluster", "replicas"):
                ours[name] = value
            else:
                others.append((name, value))
        if "prefix" in ours and not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", ours["prefix"]):
            raise ValueError(f"--store: prefix: expected letters, digits, '-', '_' and '.', got {ours['prefix']!r}")
        cluster = ours.pop("cluster", "0") == "1"
        if dict(parse_qsl(parts.query)).get("cluster", "0") not in ("0", "1"):
            raise ValueError("--store: cluster: expected 1, for a node of a cluster, or 0")
        replicas = ours.pop("replicas", "0")
        if not re.fullmatch(r"1?\d", replicas):
            raise ValueError(f"--store: replicas: expected how many must have an append, 0 to 19, got {replicas!r}")
        numbers = {name: _number(name, value) for name, value in ours.items() if name != "prefix"}
        scheme = {"redis": "valkey", "rediss": "valkeys"}.get(parts.scheme, parts.scheme)
        url = urlunsplit((scheme, parts.netloc, parts.path, urlencode(others), ""))
        words = {"prefix": ours["prefix"]} if ours.get("prefix") else {}
        return cls(url, cluster=cluster, replicas=int(replicas), **numbers, **words)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"Address({shown(self.url)!r}, prefix={self.prefix!r})"


def _number(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise ValueError(f"--store: {name}: expected a number above 0, got {value!r}")
    return number


def shown(url: str) -> str:
    """A URL without its password, for logs and messages."""
    parts = urlsplit(url)
    secret, at, place = parts.netloc.rpartition("@")
    user = secret.partition(":")[0]
    netloc = f"{user}:***@{place}" if at and ":" in secret else parts.netloc
    query = urlencode([(n, "***" if "password" in n else v) for n, v in parse_qsl(parts.query)])
    return urlunsplit((parts.scheme, netloc, parts.path, query, ""))
