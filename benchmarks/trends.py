"""Planted trends: how soon a product that begins to be clicked is among the first ten of an answer.

    python -m benchmarks.trends artifacts/shop --traffic 10 --trend 2 --seeds 3

A run with live counters is served. An hour of events of its own log, in their order, is appended as the hour before,
and the log goes on at ``--traffic`` events a second. Then one product after the other rises: ``--trend`` events a
second of users who were never there before, all on one device. Twice a second the server is asked for ten items for
nobody, for nobody on that device and for nobody on another, until all of the three have the product or ``--limit``
seconds are over. Beside it: the product's rank by the clicks of the last hour, counted here, when it is first answered.
Another seed is another part of the log and other products.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from benchmarks.catalogue import rows_of, with_store_of_its_own
from benchmarks.tables import record_line
from loadtest.generate.local_server import grpc_address, on_free_ports
from preprocessing.features import EVENTS_FILE, Features
from preprocessing.requests import recorded
from serving.launcher import TritonServer
from training.data.counters import popularity
from vivace import contract
from vivace.client import Event, VivaceClient
from vivace.run import Run

DEVICE, OTHER = "phone", "tablet"
VIEWS: dict[str, dict[str, str]] = {"nobody": {}, "its device": {"device": DEVICE}, "another device": {"device": OTHER}}
TOP_K, ASK_S, HOUR_S, EVENT = 10, 0.5, 3600, "view"
KNOWN_USERS = 50  # recorded requests that are asked when a product's trend ends
FILL = 4096  # events of a call while the hour before is appended


@dataclass
class Trend:
    """One product. Of each view seconds and events of the trend until it is among the first ten, None: not within the
    limit; ``hour_rank``: by the clicks of the last hour, at the moment of the first such answer, else at the end;
    ``known_users``: share of recorded requests whose first ten have it at the end."""

    product: str
    item: str
    training_events: int
    seconds: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(VIEWS))
    events: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(VIEWS))
    hour_rank: int = 0
    known_users: float = 0.0


class Sent:
    """What was appended, by item and time: the clicks of the last hour."""

    def __init__(self) -> None:
        self._events: list[tuple[float, str]] = []

    def add(self, item: str, at_s: float) -> None:
        self._events.append((at_s, item))

    def rank(self, item: str) -> int:
        """1 for the item that was clicked most in the last hour; items of equal counts share the best rank."""
        since = time.time() - HOUR_S
        counts = Counter(name for at, name in list(self._events) if at > since)
        return 1 + sum(count > counts[item] for count in counts.values())


class Appending(threading.Thread):
    """Appends events at a rate until ``over`` is set; ``count``: how many are acknowledged."""

    def __init__(self, address: str, events: Iterator[Event], per_second: float, sent: Sent) -> None:
        super().__init__(daemon=True)
        self._address, self._events, self._every_s, self._sent = address, events, 1 / per_second, sent
        self.over, self.count = threading.Event(), 0
        self.start()

    def run(self) -> None:
        began = time.monotonic()
        with VivaceClient(self._address) as client:
            while not self.over.wait(max(0.0, began + self.count * self._every_s - time.monotonic())):
                event = next(self._events)
                client.append(event.user_id, event.item_id, EVENT, context={"device": event.context})
                self._sent.add(event.item_id, time.time())
                self.count += 1

    def stop(self) -> None:
        self.over.set()
        self.join(10)


def traffic(features: Features, seed: int) -> Iterator[Event]:
    """The log's events from a random place on, with users of this run of it and the device as ``context``."""
    frame = pd.read_parquet(features.folder / EVENTS_FILE, columns=[contract.ITEM, contract.USER, "device"])
    file = features.folder / "workflow" / "categories" / "unique.device.parquet"
    devices = dict(enumerate(pd.read_parquet(file)["device"].tolist(), contract.FIRST_ID))
    names = features.items()[contract.ITEM].tolist()
    start = int(np.random.default_rng(seed).integers(len(frame)))
    for at in range(start, start + len(frame)):
        item, user, device = (int(value) for value in frame.iloc[at % len(frame)])
        if item >= contract.FIRST_ID:
            yield Event(f"visitor {user}", names[item - contract.FIRST_ID], EVENT, context=devices.get(device, DEVICE))


def products(features: Features, answered: set[str], seed: int) -> list[tuple[str, str, int]]:
    """(kind, item, its training events) of those that are to rise; none is among the ``answered`` ones."""
    names = features.items()[contract.ITEM].tolist()
    counts = popularity(features.files("train"), features.item_count())[contract.FIRST_ID :]
    order = [int(i) for i in np.argsort(-counts, kind="stable") if names[i] not in answered]
    clicked = [i for i in order if counts[i] > 0]
    unseen = [i for i in order if counts[i] == 0]
    rng = np.random.default_rng([seed, 1])
    parts = {"popular": clicked[:50], "middle": clicked[len(clicked) // 2 - 50 : len(clicked) // 2 + 50]}
    parts |= {"tail": [i for i in clicked if counts[i] <= 2] or clicked[-50:], "never seen in training": unseen}
    chosen = {kind: int(rng.choice(of)) for kind, of in parts.items() if of}
    return [(kind, names[i], int(counts[i])) for kind, i in chosen.items()]


def fill_hour(client: VivaceClient, events: Iterator[Event], count: int, sent: Sent) -> None:
    """Appends ``count`` events as those of the hour that ends now."""
    now_s, done = time.time(), 0
    while done < count:
        part = []
        for n in range(done, min(done + FILL, count)):
            event, at_s = next(events), now_s - HOUR_S * (1 - n / count)
            context = f'{{"device": "{event.context}"}}'
            part.append(Event(event.user_id, event.item_id, EVENT, int(at_s * 1000), context=context))
            sent.add(event.item_id, at_s)
        client.append_many(part)
        done += len(part)


def rise(address: str, trend: Trend, per_second: float, limit_s: float, sent: Sent, seed: int) -> None:
    """Lets one product rise until every view has it, or the limit; writes into ``trend``."""
    crowd = (Event(f"crowd {seed} {trend.item} {n}", trend.item, EVENT, context=DEVICE) for n in range(1_000_000))
    with VivaceClient(address) as client:
        began, asked = time.monotonic(), 0
        rising = Appending(address, crowd, per_second, sent)
        while None in trend.seconds.values() and time.monotonic() < began + limit_s:
            time.sleep(max(0.0, began + asked * ASK_S - time.monotonic()))
            asked += 1
            for view, context in VIEWS.items():
                if trend.seconds[view] is None and trend.item in client.recommend(top_k=TOP_K, context=context).items:
                    trend.seconds[view], trend.events[view] = round(time.monotonic() - began, 1), rising.count
                    trend.hour_rank = trend.hour_rank or sent.rank(trend.item)
        trend.hour_rank = trend.hour_rank or sent.rank(trend.item)
        rising.stop()


def known_users(client: VivaceClient, root: Path, item: str) -> float:
    """Share of recorded requests whose first ten have the item."""
    histories = [list(map(str, history)) for history in recorded(root)[contract.ITEM][:KNOWN_USERS]]
    return sum(item in client.recommend(history=history, top_k=TOP_K).items for history in histories) / len(histories)


def measured(root: Path, seed: int, per_second: float, trend_rate: float, limit_s: float) -> list[Trend]:
    """The trends of one seed, one after the other on one server."""
    whole, sent = Run(root), Sent()
    features, events = Features(whole.features), traffic(Features(whole.features), seed)
    trends = []
    with tempfile.TemporaryDirectory() as folder:
        own = with_store_of_its_own(whole, Path(folder))
        with TritonServer(on_free_ports(Run(own).repository, "")) as server:
            address = grpc_address(server)
            with VivaceClient(address) as client:
                fill_hour(client, events, int(per_second * HOUR_S), sent)
                usual = Appending(address, events, per_second, sent)
                time.sleep(3)  # until all is counted
                answered = {
                    i for context in VIEWS.values() for i in client.recommend(top_k=TOP_K, context=context).items
                }
                chosen = products(features, answered, seed)
                twin = next(row for row in rows_of(whole) if row[contract.ITEM] == chosen[1][1])
                client.upsert_items([{**twin, contract.ITEM: f"risen {seed}"}])
                for kind, item, count in [*chosen, ("new by upsert", f"risen {seed}", 0)]:
                    trend = Trend(kind, item, count)
                    rise(address, trend, trend_rate, limit_s, sent, seed)
                    trend.known_users = known_users(client, root, item)
                    trends.append(trend)
                    print(f"seed {seed} {asdict(trend)}", flush=True)
                usual.stop()
    return trends


def table(trends: list[Trend]) -> dict[str, Any]:
    """Of each kind of product the values of its seeds."""
    kinds = dict.fromkeys(t.product for t in trends)
    of = {kind: [t for t in trends if t.product == kind] for kind in kinds}
    return {
        kind: {
            **{f"seconds, {view}": [t.seconds[view] for t in seeds] for view in VIEWS},
            **{f"events, {view}": [t.events[view] for t in seeds] for view in VIEWS},
            "rank by the last hour": [t.hour_rank for t in seeds],
            "known users": [t.known_users for t in seeds],
            "training events": [t.training_events for t in seeds],
        }
        for kind, seeds in of.items()
    }


def main(
    root: Annotated[Path, typer.Argument(help="a compiled run of the demo shop with live counters")],
    traffic: Annotated[float, typer.Option(help="events a second of the log that is replayed")] = 10.0,
    trend: Annotated[float, typer.Option(help="events a second of the product that rises")] = 2.0,
    limit: Annotated[float, typer.Option(help="seconds until a product counts as not found")] = 60.0,
    seeds: int = 3,
) -> None:
    if not Run(root).shapes().rising:
        raise typer.BadParameter(f"{root} has no live counters; train with ranker.rising above 0, see docs/training.md")
    trends = [t for seed in range(seeds) for t in measured(root, seed, traffic, trend, limit)]
    print(record_line("planted trends", traffic=traffic, trend=trend, limit=limit, results=table(trends)))


if __name__ == "__main__":
    typer.run(main)
