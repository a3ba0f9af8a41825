"""The server that the page is about: its calls, which find it again after it was started anew, and what it says of
itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from vivace import contract
from vivace.client import VivaceClient, VivaceError
from vivace.explain_contract import EXPLAIN

T = TypeVar("T")


class AwayError(RuntimeError):
    """The server cannot be reached; the message is for people."""


class RefusedError(RuntimeError):
    """The server refused the call; the message is for people."""


class Served:
    """Calls of the server that listens where ``find()`` says, host:port; asked again after each failure, as a server
    that is started anew may listen elsewhere. For any number of threads."""

    def __init__(self, find: Callable[[], str], protocol: str, access: Mapping[str, Any], start: str) -> None:
        """``start``: the command that starts the server, for messages."""
        self._find, self._protocol, self._access, self._start = find, protocol, access, start
        self._lock = threading.Lock()
        self._client: VivaceClient | None = None
        self.address = self._tried = find()
        """Where the server answered last, or is to."""

    def call(self, what: Callable[[VivaceClient], T]) -> T:
        """``what(client)``. Raises AwayError, RefusedError, and ValueError for values of a wrong type."""
        client = self._connected()
        try:
            out = what(client)
            self.address = self._tried
            return out
        except VivaceError as error:
            if not error.passing:
                raise RefusedError(f"The server refused this: {error}") from error
            if self._lives(client):
                raise RefusedError(f"The server has no room for this just now: {error}. Try again.") from error
            self._leave(client)
            raise AwayError(
                f"The server at {self.address} does not answer. Start it with: {self._start}. "
                "This page goes on by itself when it is back."
            ) from error

    def _connected(self) -> VivaceClient:
        with self._lock:
            if self._client is None:
                self._tried = self._find()
                self._client = VivaceClient(self._tried, self._protocol, timeout_s=5.0, **self._access)
            return self._client

    @staticmethod
    def _lives(client: VivaceClient) -> bool:
        """Whether the server answers what costs it nothing: then it refused for want of room."""
        try:
            client.configuration()
        except VivaceError:
            return False
        return True

    def _leave(self, client: VivaceClient) -> None:
        """A channel that failed waits longer and longer before it tries again; a new one does not."""
        with self._lock:
            if self._client is client:
                self._client = None
        client.close()

    def about(self) -> dict[str, Any]:
        """What is served: ``data``, ``heads`` by name, ``search`` and ``explain``, whether there are such. Raises as
        ``call``."""
        config = self.call(lambda client: client.configuration())
        outputs = [output["name"] for output in config.get("output", [])]
        parameters = {key: value.get("string_value", "") for key, value in config.get("parameters", {}).items()}
        usual = {t.name for t in (contract.ITEM_ID, contract.SCORE, contract.STATUS, contract.UNDERSTOOD)}
        return {
            "data": parameters.get(contract.DATA, ""),
            "precision": parameters.get("precision", ""),
            "heads": [name.lower() for name in outputs if name not in usual],
            "search": contract.UNDERSTOOD.name in outputs,
            "explain": self.call(lambda client: client.offers(EXPLAIN)),
        }

    def close(self) -> None:
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()
