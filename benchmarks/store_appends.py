"""What it costs to append events, without and with a replica that must have them, and to read them in a group.

    python -m benchmarks.store_appends --turns 20

LMDB, a Valkey, and the same Valkey with ``replicas=1`` take turns; Valkey and replica are on loopback and write by
``--appendfsync``. Of each turn: the mean time of an append of one event, and of 32. Then every event of the log is read
by one reader, 500 at a time, each batch acknowledged. Ratios are by turn. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.local_valkey import ValkeyServer
from benchmarks.turns import in_turns, quartiles, spread
from loadtest.reports.record import record_line
from vivace.store.event_groups import follow
from vivace.store.interface import Event, ServingStore
from vivace.store.lmdb_store import LmdbStore
from vivace.store.remote.store import ValkeyStore

BATCHES = (1, 32)
PATIENT = "?limit_ms=2000&write_ms=20000"


def append_ms(store: ServingStore, batch: int, times: int, mark: str) -> float:
    began = time.perf_counter()
    for n in range(times):
        store.append(
            [Event(f"u{(n * batch + i) % 997}", f"i{i}", "view", n + 1, f"{mark} {n} {i}") for i in range(batch)]
        )
    return (time.perf_counter() - began) / times * 1000


def main(
    turns: Annotated[int, typer.Option(min=3)] = 20,
    times: Annotated[int, typer.Option(min=1, help="appends of one turn")] = 50,
    appendfsync: Annotated[str, typer.Option(help="of Valkey and replica: everysec or always")] = "everysec",
) -> None:
    figures: dict[tuple[str, int], list[float]] = {}
    reading: dict[str, float] = {}
    kept = ("--appendonly", "yes", "--appendfsync", appendfsync)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vivace-appends-")))
        primary = stack.enter_context(ValkeyServer(folder / "primary", *kept, "--repl-diskless-sync-delay", "0"))
        replica = ValkeyServer(folder / "replica", *kept, "--replicaof", "127.0.0.1", str(primary.port))
        client = stack.enter_context(stack.enter_context(replica).client())
        while client.info("replication")["master_link_status"] != "up":
            time.sleep(0.1)
        stores: dict[str, ServingStore] = {
            "lmdb": LmdbStore(folder / "lmdb"), "valkey": ValkeyStore(primary.url + PATIENT),
            "replicas=1": ValkeyStore(primary.url + PATIENT + "&replicas=1"),
        }  # fmt: skip
        for turn, name in in_turns(turns + 1, list(stores)):
            for batch in BATCHES:
                took = append_ms(stores[name], batch, times, f"{name} {batch} {turn}")
                if turn:  # the first one warms up
                    figures.setdefault((name, batch), []).append(took)
        for name in ("lmdb", "valkey"):
            began = time.perf_counter()
            read = sum(len(events) for events in follow(stores[name], "reader", after=0, once=True))
            reading[name] = read / (time.perf_counter() - began)
        for store in stores.values():
            store.close()
    rows = []
    for (name, batch), each in figures.items():
        ratio = [a / b for a, b in zip(each, figures["valkey", batch], strict=True)]
        rows.append({"store": name, "events": batch, "ms": spread(each), "to_valkey": spread(ratio)})
        print(f"{name}, {batch} at once: {quartiles(each)} ms, {quartiles(ratio)} times valkey (quartiles)")
    print(", ".join(f"{name}: {rate:,.0f} events a second read" for name, rate in reading.items()))
    print(record_line("store-appends", turns=turns, times=times, appendfsync=appendfsync, rows=rows, reading=reading))


if __name__ == "__main__":
    typer.run(main)
