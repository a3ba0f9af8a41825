"""To which server of a Valkey each command of a trip goes: the one there is, or a node of a cluster by the key's slot.

The package's own pipeline over a cluster sends a command again by itself where no answer came; ours may not be, as an
event without an id would be stored twice. So a trip is cut by node here, and only what a node has refused as another's
(MOVED) is sent again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Command = tuple[Any, ...]
MOVED = "MOVED "  # begin of a node's refusal of a key that is another's
PAUSES_S = (0.0, 0.05, 0.2, 0.5, 1.0)  # after the first, second, … trip in a row that was not answered


def key_of_command(command: Command) -> Any:
    """The first key: of a script behind its digest and the number of keys, else the first argument."""
    return command[3] if command[0] == "EVALSHA" else command[1]


@dataclass(frozen=True)
class Lasting:
    """What a trip writes must be on so many ``replicas`` of the node within ``wait_ms``."""

    replicas: int
    wait_ms: int


class FewReplicasError(Exception):
    """The node has what it was sent, and not enough of its replicas do."""

    def __init__(self, have: int, lasting: Lasting) -> None:
        super().__init__(f"{have} of {lasting.replicas} replicas have it after {lasting.wait_ms} ms")


def _sent(client: Any, commands: Sequence[Command], lasting: Lasting | None = None) -> list[Any]:
    pipeline = client.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)
    if lasting is None:
        return list(pipeline.execute(raise_on_error=False))
    pipeline.execute_command("WAIT", lasting.replicas, lasting.wait_ms)
    *replies, have = pipeline.execute(raise_on_error=False)
    fault = have if isinstance(have, Exception) else None
    if fault is None and int(have) < lasting.replicas:
        fault = FewReplicasError(int(have), lasting)
    return [reply if fault is None or isinstance(reply, Exception) else fault for reply in replies]


class News:
    """``count`` rises when a node did not answer, or had not what it was asked for: whoever speaks to the cluster asks
    whose each slot is before the next trip."""

    def __init__(self) -> None:
        self.count = 0


class OneNode:
    """``options``: as the package's client takes them. Nothing is sent before the first call."""

    def __init__(self, url: str, news: News, **options: Any) -> None:
        import valkey

        self._client = valkey.Valkey.from_url(url, **options)

    def run(self, commands: Sequence[Command], lasting: Lasting | None = None) -> list[Any]:
        """The reply of each, an exception where the server refuses it, FewReplicasError where it did not last. Raises
        ConnectionError or TimeoutError of the package."""
        return _sent(self._client, commands, lasting)

    def each(self) -> Iterator[Any]:
        """A client of each server, one after the other: for what has no key."""
        yield self._client

    def close(self) -> None:
        self._client.close()


class SeveralNodes:
    """A cluster, by the address of one of its nodes, from which the others are known. ``news``: shared by those that
    speak to the same cluster."""

    def __init__(self, url: str, news: News, **options: Any) -> None:
        import valkey

        self._errors = valkey.exceptions
        self._lock, self._news, self._heard = threading.Lock(), news, 0
        self._known_nodes: Any = None
        self._silent: dict[str, tuple[int, float]] = {}  # nodes: failures in a row, and until when it is left alone
        place = valkey.connection.parse_url(url)  # raises ValueError for what is none
        if "path" in place or place.get("db", 0):
            raise ValueError("cluster=1: expected a host and database 0, as a cluster has no other")
        self._start, self._options = (place["host"], place.get("port", 6379)), options | place

    def _nodes(self) -> Any:
        """The package's knowledge of whose each slot is; asked for anew after a node did not answer."""
        from valkey.cluster import ClusterNode, NodesManager, cleanup_kwargs

        with self._lock:
            heard = self._news.count
            try:
                if self._known_nodes is None:
                    kept = cleanup_kwargs(**self._options)
                    self._known_nodes = NodesManager([ClusterNode(*self._start)], from_url=True, **kept)
                elif self._heard != heard:
                    self._known_nodes.initialize()
            except self._errors.ValkeyClusterException as error:
                raise self._errors.ConnectionError(f"no node of the cluster answers: {error}") from error
            self._heard = heard
            return self._known_nodes

    def _client(self, node: Any) -> Any:
        if node.valkey_connection is None:
            with self._lock:
                if node.valkey_connection is None:
                    self._known_nodes.create_valkey_connections([node])
        return node.valkey_connection

    def run(self, commands: Sequence[Command], lasting: Lasting | None = None) -> list[Any]:
        """As ``OneNode.run``, node by node: the node of the last command last, so that what it says is the newest.
        Where a node does not answer, its replies are that error, and it is left alone for a while; raises it where
        none does."""
        replies: list[Any] = [None] * len(commands)
        left = list(range(len(commands)))
        for _ in range(2):
            self._run(commands, left, replies, lasting)
            left = [i for i in left if isinstance(replies[i], Exception) and str(replies[i]).startswith(MOVED)]
            if not left:
                break
            self._news.count += 1
        return replies

    def _run(
        self, commands: Sequence[Command], chosen: Sequence[int], replies: list[Any], lasting: Lasting | None
    ) -> None:
        from valkey.crc import key_slot

        nodes, of_node = self._nodes(), dict[str, tuple[Any, list[int]]]()
        try:
            for i in chosen:
                node = nodes.get_node_from_slot(key_slot(key_of_command(commands[i])))
                of_node.setdefault(node.name, (node, []))[1].append(i)
        except self._errors.SlotNotCoveredError as error:
            self._news.count += 1
            raise self._errors.ConnectionError(str(error)) from error
        answered, last = False, None
        for node, indices in sorted(of_node.values(), key=lambda pair: pair[1][-1]):
            sent = self._ask(self._client(node), node.name, [commands[i] for i in indices], lasting)
            for i, reply in zip(indices, sent if isinstance(sent, list) else [sent] * len(indices), strict=True):
                replies[i] = reply
            answered, last = answered or isinstance(sent, list), last if isinstance(sent, list) else sent
        if not answered and last is not None:
            raise last

    def _ask(self, client: Any, name: str, commands: list[Command], lasting: Lasting | None) -> list[Any] | Exception:
        failures, until = self._silent.get(name, (0, 0.0))
        if time.monotonic() < until:
            return self._errors.ConnectionError(f"{name}: it did not answer a moment ago")  # type: ignore[no-any-return]
        try:
            replies = _sent(client, commands, lasting)
        except (self._errors.ConnectionError, self._errors.TimeoutError, OSError) as error:
            self._silent[name] = failures + 1, time.monotonic() + PAUSES_S[min(failures, len(PAUSES_S) - 1)]
            self._news.count += 1
            return error
        self._silent.pop(name, None)
        return replies

    def each(self) -> Iterator[Any]:
        from valkey.cluster import PRIMARY

        for node in self._nodes().get_nodes_by_server_type(PRIMARY):
            yield self._client(node)

    def close(self) -> None:
        if self._known_nodes is not None:
            self._known_nodes.close()
