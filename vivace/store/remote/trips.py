"""Round trips to a Valkey, each within a time limit.

A server that does not answer is left alone for a while, longer each time up to a second, so that a request waits for it
once and not at every stage. The next trip that is answered ends that.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from vivace.store.interface import StoreError, StoreUnreachableError
from vivace.store.remote.address import Address, shown
from vivace.store.remote.nodes import MOVED, PAUSES_S, Command, FewReplicasError, Lasting, News, OneNode, SeveralNodes

log = logging.getLogger(__name__)
Kind = Literal["read", "bulk", "write", "slow"]
BULK = 20  # a read of many rows may take so many times the limit of a read
SLOW_S = 30.0  # of copies, fills and sweeps, which nobody waits for
PASSING = ("NOREPLICAS", "MISCONF", MOVED, "ASK ", "CLUSTERDOWN", "TRYAGAIN")  # errors that pass without a class


class Trips:
    """Thread-safe. ``valkey`` is imported here, so that a run on LMDB needs it not."""

    def __init__(self, address: Address) -> None:
        try:
            import valkey
            from valkey.backoff import NoBackoff
            from valkey.retry import Retry
        except ImportError:
            raise StoreError(
                "store: the package valkey is not installed; pip install 'vivace[valkey]', or serve from LMDB"
            ) from None
        self._errors = valkey.exceptions
        self.address = address
        limits_s = {
            "read": address.limit_ms / 1000, "bulk": BULK * address.limit_ms / 1000,
            "write": address.write_ms / 1000, "slow": SLOW_S,
        }  # fmt: skip
        nodes, news = SeveralNodes if address.cluster else OneNode, News()
        try:
            self._nodes: dict[str, OneNode | SeveralNodes] = {
                kind: nodes(
                    address.url, news, socket_timeout=limit_s, socket_connect_timeout=limit_s,
                    retry=Retry(NoBackoff(), 0), lib_name=None, lib_version=None, protocol=2,
                )
                for kind, limit_s in limits_s.items()
            }  # fmt: skip
        except (TypeError, ValueError) as error:
            raise ValueError(f"--store: {shown(address.url)}: {error}") from None
        self._lasting = Lasting(address.replicas, int(address.write_ms / 2)) if address.replicas else None
        self._limits_s, self._lock = limits_s, threading.Lock()
        self._failures, self._closed_until = 0, 0.0

    def __call__(self, commands: Sequence[Command], kind: Kind = "read") -> list[Any]:
        """The reply of each command, all sent in one trip (to each node of a cluster). Raises StoreUnreachableError
        where there is no answer within the limit of ``kind``, and StoreError where the server refuses."""
        return self._taken(self._sent(commands, kind), kind)

    def _sent(self, commands: Sequence[Command], kind: Kind, lasting: bool = False) -> list[Any]:
        """The same with what was refused as exceptions among the replies."""
        if not commands:
            return []
        if kind != "slow" and time.monotonic() < self._closed_until:
            raise StoreUnreachableError(f"store: it has not answered within {self._limits_s['read'] * 1000:g} ms")
        try:
            return self._nodes[kind].run(commands, self._lasting if lasting else None)
        except (self._errors.ConnectionError, self._errors.TimeoutError, OSError) as error:
            raise self._failed(kind, error) from error

    def _taken(self, replies: list[Any], kind: Kind) -> list[Any]:
        for reply in replies:
            if isinstance(reply, Exception):
                self._refused(reply, kind)
        if self._failures:
            with self._lock:
                self._failures, self._closed_until = 0, 0.0
            log.info("store: %s answers again", shown(self.address.url))
        return replies

    def everywhere(self, *command: Any, kind: Kind = "slow") -> list[Any]:
        """The reply of each node to a command that has no key. Raises as above."""
        with self._refusals(kind):
            replies = [client.execute_command(*command) for client in self._nodes[kind].each()]
        return self._taken(replies, kind)

    def scan(self, pattern: bytes, count: int) -> Iterator[list[bytes]]:
        """Keys of all nodes that match, ``count`` at a time or so; one may come twice. Raises as above."""
        with self._refusals("slow"):
            for client in self._nodes["slow"].each():
                cursor: int | None = None
                while cursor != 0:
                    cursor, keys = client.execute_command("SCAN", cursor or 0, "MATCH", pattern, "COUNT", count)
                    cursor = int(cursor)
                    yield list(keys)

    @contextlib.contextmanager
    def _refusals(self, kind: Kind) -> Iterator[None]:
        """What the package raises in the block, as errors of a store."""
        try:
            yield
        except (self._errors.ConnectionError, self._errors.TimeoutError, OSError) as error:
            raise self._failed(kind, error) from error
        except self._errors.ResponseError as error:
            self._refused(error, kind)

    def script(
        self,
        script: Script,
        calls: Sequence[tuple[Sequence[Any], Sequence[Any]]],
        kind: Kind,
        lasting: bool = False,
    ) -> list[Any]:
        """The reply of a script to each of ``calls``, (keys, arguments); by its digest, and whole where a server does
        not know it. What was run is not run again. ``lasting``: as many replicas as the address names must have it,
        and whatever the node was sent before; raises StoreUnreachableError where they have not."""
        commands = [("EVALSHA", script.sha, len(keys), *keys, *arguments) for keys, arguments in calls]
        replies = self._sent(commands, kind, lasting)
        unknown = [i for i, reply in enumerate(replies) if isinstance(reply, self._errors.NoScriptError)]
        if unknown:
            self.everywhere("SCRIPT LOAD", script.source, kind=kind)
            for i, reply in zip(unknown, self._sent([commands[i] for i in unknown], kind, lasting), strict=True):
                replies[i] = reply
        return self._taken(replies, kind)

    def _failed(self, kind: Kind, error: Exception) -> StoreUnreachableError:
        with self._lock:
            self._failures += 1
            self._closed_until = time.monotonic() + PAUSES_S[min(self._failures, len(PAUSES_S)) - 1]
            first = self._failures == 1
        if first:
            log.warning("store: %s: %s: %s", shown(self.address.url), type(error).__name__, error)
        if isinstance(error, self._errors.TimeoutError | TimeoutError):
            return StoreUnreachableError(f"store: no answer within {self._limits_s[kind] * 1000:g} ms")
        return StoreUnreachableError("store: it cannot be reached")

    def _refused(self, error: Exception, kind: Kind) -> None:
        words, e = str(error), self._errors
        if isinstance(error, FewReplicasError):
            raise StoreUnreachableError(
                f"store: {words}; the primary has it, and a failover may lose it. Send it again under the same event_id"
            ) from error
        if isinstance(error, e.ConnectionError | e.TimeoutError | OSError):
            raise StoreUnreachableError("store: a node of it does not answer") from error
        if words.startswith(MOVED) and not self.address.cluster:
            raise StoreError("store: it is one node of a cluster; add cluster=1 to the URL of --store") from error
        if isinstance(error, e.OutOfMemoryError):
            raise StoreError("store: not stored, as its memory is full; try again when there is room") from error
        passing = e.BusyLoadingError | e.ReadOnlyError | e.MasterDownError | e.ClusterDownError | e.TryAgainError
        if isinstance(error, passing) or words.startswith(PASSING):
            raise self._failed(kind, error) from error
        raise StoreError(f"store: refused: {words}") from error

    def close(self) -> None:
        for nodes in self._nodes.values():
            nodes.close()


class Script:
    """Lua that the server runs whole or not at all."""

    def __init__(self, source: str) -> None:
        import hashlib

        self.source = source.strip()
        self.sha = hashlib.sha1(self.source.encode()).hexdigest()
