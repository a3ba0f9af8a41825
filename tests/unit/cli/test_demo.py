"""What the demo sends once more of a log that is over."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from vivace.cli.demo_present import event_id, is_over, last_events
from vivace.contract import FIRST_ID, ITEM, TIME, USER
from vivace.store.lmdb_store import LmdbStore


def test_the_last_events_of_a_log_are_sent_as_of_now_by_readers_of_their_own(features):
    events, names = features.events(), features.items()[ITEM].tolist()
    known = np.flatnonzero(events[ITEM] >= FIRST_ID)[-5:]
    sent = last_events(features, 5)
    assert [e.item_id for e in sent] == [names[i - FIRST_ID] for i in events[ITEM][known]]
    assert [e.user_id for e in sent] == [f"log-{user}" for user in events[USER][known]]
    assert {replace(e, user_id="", item_id="") for e in sent} == {type(sent[0])("", "")}  # no time: now


def test_a_log_is_over_when_its_counters_have_forgotten_it(features, monkeypatch):
    newest = int(features.events()[TIME][-1]) / 1000
    monkeypatch.setattr(time, "time", lambda: newest + 3600)
    assert not is_over(features)
    monkeypatch.setattr(time, "time", lambda: newest + 2 * 86400)
    assert is_over(features)


def test_a_demo_that_runs_again_sends_nothing_twice(features, monkeypatch, tmp_path):
    """The store takes the events of one day once, and those of the next day anew."""
    store, sent, now = LmdbStore(tmp_path / "store"), last_events(features, 5), 1_700_000_000.0

    def send(at: float) -> int:
        monkeypatch.setattr(time, "time", lambda: at)
        store.append([replace(event, event_id=f"{event_id()}/{n}") for n, event in enumerate(sent)])
        return len(store.live_events(0)[1])

    assert [send(now), send(now + 60), send(now + 86_400)] == [5, 5, 10]
    store.close()
