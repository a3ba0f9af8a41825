"""The fuzzer of requests against the served shop: every kind a few times, beside neighbours that compare answers."""

from __future__ import annotations

import contextlib
import random

from benchmarks.fuzz_requests import KINDS, LEAK, Neighbours, Strangers, Watch, same
from preprocessing.requests import recorded
from tests.support import NOON, waited_too_long
from vivace import contract
from vivace.store.lmdb_store import LmdbStore


def test_every_kind_beside_neighbours(root, served):
    server, _ = served
    histories = [list(h)[-20:] for h in recorded(root)[contract.ITEM][:10]]
    neighbours, strangers, watch = Neighbours(server, histories), Strangers(server, 7, list(KINDS)), Watch(server)
    with neighbours.at_work():
        for n in range(3):
            for kind in KINDS:
                strangers.send(f"7/0/{n}/{kind}")
    faults = [fault for fault in neighbours.faults if not waited_too_long(fault)]
    assert not strangers.faults and not faults and neighbours.right > 20
    assert watch.first <= watch.pids()
    answers = sum(sum(c.values()) for c in strangers.outcomes.values())
    assert answers == 3 * len(KINDS)
    with contextlib.closing(LmdbStore(root / "feature_store", readonly=True)) as store:
        for user, events in neighbours.acknowledged.items():
            assert [e.item_id for e in store.events(user)] == events


def test_a_request_is_the_same_for_its_key():
    """So that ``--replay`` sends what was sent."""
    for kind, make in KINDS.items():
        assert make(random.Random(f"1/0/5/{kind}")) == make(random.Random(f"1/0/5/{kind}")), kind


def test_the_comparison_and_the_leaks_see_faults(client):
    answer = client.recommend(history=["sku-00001"], top_k=5, context=NOON)
    other = client.recommend(history=["sku-00002"], top_k=5, context=NOON)
    assert same(answer, answer) and not same(answer, other)
    for text in ("Traceback (most recent call last)", "/tmp/x/model_repository", 'File "stages.py", line 5'):
        assert LEAK.search(text), text
