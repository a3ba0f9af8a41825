"""Round trips to a Valkey, each within a time limit.

A server that does not answer is left alone for a while, longer each time up to a second, so that a request waits for it
once and not at every stage. The next trip that is answered ends that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any, Literal

from vivace.store.interface import StoreError, StoreUnreachableError
from vivace.store.remote.address import Address, shown

log = logging.getLogger(__name__)
Kind = Literal["read", "bulk", "write", "slow"]
Command = tuple[Any, ...]
BULK = 20  # a read of many rows may take so many times the limit of a read
SLOW_S = 30.0  # of copies, fills and sweeps, which nobody waits for
PAUSES_S = (0.0, 0.05, 0.2, 0.5, 1.0)  # after the first, second, … trip in a row that was not answered
PASSING = ("NOREPLICAS", "MISCONF")  # errors that pass, beside those that have a class


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
        try:
            self._clients = {
                kind: valkey.Valkey.from_url(
                    address.url, socket_timeout=limit_s, socket_connect_timeout=limit_s, retry=Retry(NoBackoff(), 0),
                    lib_name=None, lib_version=None, protocol=2,
                )
                for kind, limit_s in limits_s.items()
            }  # fmt: skip
        except (TypeError, ValueError) as error:
            raise ValueError(f"--store: {shown(address.url)}: {error}") from None
        self._limits_s, self._lock = limits_s, threading.Lock()
        self._failures, self._closed_until = 0, 0.0

    def __call__(self, commands: Sequence[Command], kind: Kind = "read") -> list[Any]:
        """The reply of each command, all sent in one trip. Raises StoreUnreachableError where there is no answer within
        the limit of ``kind``, and StoreError where the server refuses."""
        if not commands:
            return []
        if kind != "slow" and time.monotonic() < self._closed_until:
            raise StoreUnreachableError(f"store: it has not answered within {self._limits_s['read'] * 1000:g} ms")
        try:
            pipeline = self._clients[kind].pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            replies = pipeline.execute(raise_on_error=False)
        except (self._errors.ConnectionError, self._errors.TimeoutError, OSError) as error:
            raise self._failed(kind, error) from error
        for reply in replies:
            if isinstance(reply, Exception):
                self._refused(reply, kind)
        if self._failures:
            with self._lock:
                self._failures, self._closed_until = 0, 0.0
            log.info("store: %s answers again", shown(self.address.url))
        return list(replies)

    def script(self, script: Script, calls: Sequence[tuple[Sequence[Any], Sequence[Any]]], kind: Kind) -> list[Any]:
        """The reply of a script to each of ``calls``, (keys, arguments); by its digest, and whole where the server does
        not know it."""
        commands = [("EVALSHA", script.sha, len(keys), *keys, *arguments) for keys, arguments in calls]
        try:
            return self(commands, kind)
        except _UnknownScriptError:  # none of them was run: they are all of one script
            self([("SCRIPT LOAD", script.source)], kind)
            return self(commands, kind)

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
        if isinstance(error, e.NoScriptError):
            raise _UnknownScriptError(words)
        if isinstance(error, e.OutOfMemoryError):
            raise StoreError("store: not stored, as its memory is full; try again when there is room") from error
        passing = e.BusyLoadingError | e.ReadOnlyError | e.MasterDownError | e.ClusterDownError | e.TryAgainError
        if isinstance(error, passing) or words.startswith(PASSING):
            raise self._failed(kind, error) from error
        raise StoreError(f"store: refused: {words}") from error

    def close(self) -> None:
        for client in self._clients.values():
            client.close()


class _UnknownScriptError(Exception):
    pass


class Script:
    """Lua that the server runs whole or not at all."""

    def __init__(self, source: str) -> None:
        import hashlib

        self.source = source.strip()
        self.sha = hashlib.sha1(self.source.encode()).hexdigest()
