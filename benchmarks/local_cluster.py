"""A Valkey cluster of one's own: nodes on loopback that share the slots, and replicas of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.local_valkey import ValkeyServer

SLOTS = 16_384
WAIT_S = 60.0
QUICK = ("--cluster-node-timeout", "1500", "--cluster-replica-validity-factor", "0")


def _until(true: object, what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError(f"cluster: expected {what} within {WAIT_S:.0f} s")
        time.sleep(0.05)


def info(node: ValkeyServer) -> dict[str, str]:
    with node.client() as client:
        answer: dict[str, str] = client.execute_command("CLUSTER INFO")
        return answer


def name_of(node: ValkeyServer) -> str:
    with node.client() as client:
        return str(client.execute_command("CLUSTER MYID").decode())


@contextlib.contextmanager
def cluster(folder: Path, nodes: int = 3, replicas: int = 0, *settings: str) -> Iterator[list[ValkeyServer]]:
    """``nodes`` primaries with the slots in equal parts, then the ``replicas`` of the first ones; all well."""
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(ValkeyServer(folder / str(n), "--cluster-enabled", "yes", *QUICK, *settings))
            for n in range(nodes + replicas)
        ]
        for number, server in enumerate(servers):
            with server.client() as client:
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
                if number < nodes:
                    first, last = (SLOTS * n // nodes for n in (number, number + 1))
                    client.execute_command("CLUSTER ADDSLOTSRANGE", first, last - 1)
                if number:
                    client.execute_command("CLUSTER MEET", "127.0.0.1", servers[0].port)
        known = str(len(servers))
        _until(lambda: all(info(s)["cluster_known_nodes"] == known for s in servers), "nodes that know each other")
        for number in range(replicas):
            with servers[nodes + number].client() as client:
                client.execute_command("CLUSTER REPLICATE", name_of(servers[number]))
        _until(lambda: all(info(s)["cluster_state"] == "ok" for s in servers), "a cluster that is well")
        yield servers


def is_primary(node: ValkeyServer) -> bool:
    with node.client() as client:
        return bool(client.execute_command("ROLE")[0] == b"master")
