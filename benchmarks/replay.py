"""Replays recorded events through the live ensemble and measures what the cache of encoded user states answers.

    python -m benchmarks.replay artifacts/globo --users 2000 --cache-mb 64

The events of the sampled users are replayed in the order of time into an empty feature store. A user who comes back
after half an hour first opens a page (a request); each event is stored and followed by a request, as the page of that
item shows recommendations too. ``--reloads`` opens some of these pages again. So a request can be answered from the
cache only where nothing happened since that user's last one. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import tritonclient.grpc as grpcclient
import typer
from rich.progress import track

from loadtest.generate.local_server import grpc_address, on_free_ports
from loadtest.generate.statistics import cache_counts
from loadtest.reports.record import record_line
from serving.launcher import TritonServer
from vivace.client import VivaceClient
from vivace.run import Run
from vivace.store.interface import Event
from vivace.store.lmdb_store import LmdbStore

PAUSE_MS = 30 * 60 * 1000
PROFILE = "cached"  # that has a cache of encoded user states


def main(
    root: Annotated[Path, typer.Argument(help="a compiled run, artifacts/<name>")],
    users: Annotated[int, typer.Option(help="users to sample")] = 2000,
    cache_mb: int = 64,
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
        options = on_free_ports(copy.repository, PROFILE, copy.server_log, cache_bytes=cache_mb << 20)
        last: dict[str, int] = {}
        visits = pages = 0
        with TritonServer(options) as server:
            address = grpc_address(server)
            with VivaceClient(address) as client, grpcclient.InferenceServerClient(address) as inner:
                for e in track(events, "replaying"):
                    if e.user_id in last and e.timestamp_ms - last[e.user_id] > PAUSE_MS:
                        client.recommend(e.user_id)
                        visits += 1
                    client.append(e.user_id, e.item_id, e.event_type, e.timestamp_ms)
                    for _ in range(1 + (rng.random() < reloads)):
                        client.recommend(e.user_id)
                        pages += 1
                    last[e.user_id] = e.timestamp_ms
                hits, misses = cache_counts(inner)
    if not hits + misses:
        raise ValueError(f"cache: expected Triton to count its look-ups, got none with the profile {PROFILE!r}")
    rate = hits / (hits + misses)
    print(
        f"{len(events):,} events of {users:,} users: {pages:,} pages of items and {visits:,} returns; {hits:,} of "
        f"{hits + misses:,} requests ({rate:.1%}) paid no encoder, with {cache_mb} MiB of cache"
    )
    print(record_line(
        "state cache", data=root.name, events=len(events), users=users, returns=visits, pages=pages, reloads=reloads,
        hits=hits, misses=misses, hit_rate=round(rate, 4), cache_mb=cache_mb, seed=seed,
    ))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
