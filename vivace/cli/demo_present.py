"""The last events of a prepared log, sent to the server once more as of now: to live counters, which forget within
days, the log of a public data set is over for years."""

from __future__ import annotations

import time

from preprocessing.features import Features
from vivace.client import Event, VivaceClient
from vivace.contract import FIRST_ID, ITEM, LIVE_HALF_LIVES_MS, TIME, USER

SENT = 2_000  # events that are sent once more
WAIT_S = 1.0  # within which every process has counted them
FORGOTTEN_MS = 2 * LIVE_HALF_LIVES_MS[-1]  # since an event: it counts for a quarter at most, whatever its counter
READER = "log-{}"  # a name of its own for each user, so that no stored history changes


def is_over(features: Features) -> bool:
    """Whether the newest event is older than twice the longest half-life of the counters."""
    times = features.events()[TIME]
    return not len(times) or time.time() * 1000 - int(times[-1]) > FORGOTTEN_MS


def last_events(features: Features, most: int = SENT) -> list[Event]:
    """The newest events of items of the vocabulary, oldest first, without a time, which is now."""
    events = features.events()
    names = features.items()[ITEM].to_numpy()
    known = events[ITEM] >= FIRST_ID
    pairs = zip(events[USER][known][-most:].tolist(), events[ITEM][known][-most:].tolist(), strict=True)
    return [Event(READER.format(user), str(names[item - FIRST_ID])) for user, item in pairs]


def event_id() -> str:
    """What the events are called: the same until the counters have forgotten them, by UTC, so that a demo that runs
    again counts them once."""
    return f"{READER.format('')}{int(time.time() * 1000) // FORGOTTEN_MS}"


def send_again(features: Features, client: VivaceClient) -> int:
    """Sends them and waits until they are counted; how many they were, with those that an earlier demo has sent."""
    events = last_events(features)
    client.append_many(events, event_id())
    time.sleep(WAIT_S)
    return len(events)
