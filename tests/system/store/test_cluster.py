"""A Valkey of several nodes when one of them dies: what it had is answered by its replica, the rest as before."""

from __future__ import annotations

import time

import pytest

from benchmarks.local_cluster import cluster, is_primary
from tests.support import wait_until
from vivace.store.interface import Event, StoreError, StoreUnreachableError
from vivace.store.remote.store import ValkeyStore

USERS = [f"user-{n}" for n in range(60)]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Three, and a replica of the first; each writes every event to its disk."""
    always = ("--appendonly", "yes", "--appendfsync", "always")
    with cluster(tmp_path_factory.mktemp("cluster"), 3, 1, *always) as nodes:
        yield nodes


def test_one_node_of_a_cluster_is_named_as_such(nodes):
    store = ValkeyStore(f"{nodes[0].url}?limit_ms=2000&write_ms=5000")
    with pytest.raises(StoreError, match="add cluster=1 to the URL of --store"):
        for user in USERS:
            store.append([Event(user, "a")])
    store.close()


def test_an_append_waits_for_replicas_of_each_node_that_has_part_of_it(nodes):
    store = ValkeyStore(f"{nodes[0].url}?limit_ms=2000&write_ms=2000&cluster=1&replicas=1&prefix=waits")
    with pytest.raises(StoreUnreachableError, match="0 of 1 replicas have it after 1000 ms"):  # one node has one
        store.append([Event(user, "a") for user in USERS])
    store.close()


def test_a_node_that_dies_takes_its_own_users_alone_until_its_replica_is_there(nodes):
    store = ValkeyStore(f"{nodes[1].url}?limit_ms=1000&write_ms=5000&cluster=1")
    store.append([Event(user, "first", event_id=f"{user} 1") for user in USERS])
    each = [keys_of(node) for node in nodes[:3]]
    assert min(each) > 5, f"users are spread over the nodes: {each}"
    wait_until(lambda: keys_of(nodes[3]) == keys_of(nodes[0]), "a replica that has it all")
    nodes[0].kill()
    known = [len(events) for events in map(store.events, USERS)]  # what was read before is known, and none was
    assert 0 < sum(known) < len(USERS) and "store: " in store.fault()
    began = time.monotonic()
    wait_until(lambda: is_primary(nodes[3]), "the replica in its place")
    wait_until(lambda: all_there(store), "every user again")
    print(f"again after {time.monotonic() - began:.1f} s")
    store.append([Event(user, "first", event_id=f"{user} 1") for user in USERS])  # sent again: it is there already
    store.append([Event(user, "second", event_id=f"{user} 2") for user in USERS])
    assert {" ".join(e.item_id for e in store.events(user)) for user in USERS} == {"first second"}
    assert store.fault() == "" and store.live_events(0)[0] >= 2 * len(USERS)
    store.close()


def keys_of(node) -> int:
    with node.client() as client:
        return int(client.dbsize())


def all_there(store: ValkeyStore) -> bool:
    there = [len(events) for events in map(store.events, USERS)]
    return store.fault() == "" and min(there) == 1
