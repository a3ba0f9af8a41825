"""Replays recorded events through the live ensemble and measures what a cache answers: that of encoded user states
(profile ``cached``), or that of whole answers (``fused``).

    python -m benchmarks.replay artifacts/globo --users 2000 --cache-mb 64
    python -m benchmarks.replay artifacts/shop --users 500 --profile fused --reloads 0.3

The events of the sampled users are replayed in the order of time into an empty feature store. A user who comes back
after half an hour first opens a page (a request); each event is stored and followed by a request, as the page of that
item shows recommendations too. ``--reloads`` opens some of these pages again. So a request can be answered from the
cache only where nothing happened since that user's last one. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import tritonclient.grpc as grpcclient
import typer
from rich.progress import track

from benchmarks.answer_cache import looked_up
from loadtest.generate.local_server import grpc_address, on_free_ports
from loadtest.generate.statistics import cache_counts
from loadtest.reports.record import record_line
from serving.launcher import TritonServer
from serving.runtime.cache_settings import CacheSettings
from vivace.client import VivaceClient
from vivace.run import Run
from vivace.store.interface import Event
from vivace.store.lmdb_store import LmdbStore

PAUSE_MS = 30 * 60 * 1000
STATES, ANSWERS = "cached", "fused"  # profiles by what their cache keeps
PAID = {STATES: "encoder", ANSWERS: "model"}
PATIENCE_S, KEPT_S = 30.0, 3600.0  # the replay is faster than its users were: no entry ends by time


def kept(server: TritonServer, profile: str, requests: int) -> tuple[int, int]:
    """(hits, misses) of the cache since the server's start, when all ``requests`` are counted."""
    if profile == STATES:
        with grpcclient.InferenceServerClient(grpc_address(server)) as client:
            return cache_counts(client)
    deadline = time.monotonic() + PATIENCE_S
    while sum((counts := looked_up(server)).values()) < requests:
        if time.monotonic() > deadline:
            raise RuntimeError(f"cache: expected {requests} look-ups, got {counts}")
        with VivaceClient(grpc_address(server)) as client:  # counters come with a later batch of the same worker
            client.recommend()
        time.sleep(0.05)
    return sum(counts.values()) - counts["miss"], counts["miss"]


def main(
    root: Annotated[Path, typer.Argument(help="a compiled run, artifacts/<name>")],
    users: Annotated[int, typer.Option(help="users to sample")] = 2000,
    cache_mb: int = 64,
    profile: Annotated[str, typer.Option(help=f"{STATES}: encoded states; {ANSWERS}: whole answers")] = STATES,
    reloads: Annotated[float, typer.Option(help="share of pages opened a second time")] = 0.0,
    seed: int = 7,
) -> None:
    rng = random.Random(seed)
    store = LmdbStore(Run(root).feature_store, readonly=True)
    chosen = rng.sample(sorted(store.users()), users)
    events: list[Event] = sorted((e for u in chosen for e in store.events(u)), key=lambda e: e.timestamp_ms)
    store.close()
    with tempfile.TemporaryDirectory() as name:
        copy = Run(Path(name) / root.name)  # the same models, an empty store
        shutil.copytree(Run(root).repository, copy.repository)
        LmdbStore(copy.feature_store).close()
        caches: dict[str, dict[str, Any]] = {
            STATES: {"cache_bytes": cache_mb << 20}, ANSWERS: {"answer_cache": CacheSettings(cache_mb << 20, KEPT_S)}
        }  # fmt: skip
        options = on_free_ports(copy.repository, profile, copy.server_log, **caches[profile])
        last: dict[str, int] = {}
        visits = pages = 0
        with TritonServer(options) as server:
            with VivaceClient(grpc_address(server)) as client:
                for e in track(events, "replaying"):
                    if e.user_id in last and e.timestamp_ms - last[e.user_id] > PAUSE_MS:
                        client.recommend(e.user_id)
                        visits += 1
                    client.append(e.user_id, e.item_id, e.event_type, e.timestamp_ms)
                    for _ in range(1 + (rng.random() < reloads)):
                        client.recommend(e.user_id)
                        pages += 1
                    last[e.user_id] = e.timestamp_ms
            hits, misses = kept(server, profile, pages + visits)
    if not hits + misses:
        raise ValueError(f"cache: expected Triton to count its look-ups, got none with the profile {profile!r}")
    rate = hits / (hits + misses)
    print(
        f"{len(events):,} events of {users:,} users: {pages:,} pages of items and {visits:,} returns; {hits:,} of "
        f"{hits + misses:,} requests ({rate:.1%}) paid no {PAID[profile]}, with {cache_mb} MiB of cache"
    )
    print(record_line(
        f"cache, profile {profile}", data=root.name, events=len(events), users=users, returns=visits, pages=pages,
        reloads=reloads, hits=hits, misses=misses, hit_rate=round(rate, 4), cache_mb=cache_mb, seed=seed,
    ))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
