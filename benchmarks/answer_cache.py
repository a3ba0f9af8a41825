"""What the cache of answers costs where nothing repeats, and what it is worth where requests do.

    python -m benchmarks.answer_cache artifacts/shop --turns 7
    python -m benchmarks.answer_cache artifacts/shop --store valkey://127.0.0.1:6379/0

Two servers of the profile ``fused``, one with the cache, are offered the same requests in turns at random arrivals, by
user alone, so that the store gives the history. "once": no request comes twice. "repeats": users by a power law, each
turn from an empty cache, as it asks for another number of items. Figures: p50, and processor time a request of all the
server's processes (of a Valkey not: it serves both); the ratio of the server with the cache to the other, turn by turn.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import re
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.turns import in_turns, spread, with_spread
from loadtest.generate.arrivals import due_times, picks
from loadtest.generate.generator import LoadRun, message, run
from loadtest.generate.local_server import grpc_address, on_free_ports
from loadtest.reports.record import record_line
from serving.launcher import TritonServer
from serving.runtime.cache_settings import CacheSettings
from vivace import contract
from vivace.client_request import request_tensors
from vivace.machine import processor_seconds
from vivace.run import Run
from vivace.store.lmdb_store import LmdbStore

SEED, SLO_MS, FIRST_TOP_K = 7, 1000.0, 10
ONCE, REPEATS = "once", "repeats"
COUNTER = re.compile(r'vivace_answer_cache_total\{[^}]*result="(\w+)"[^}]*\} (\d+)')


def looked_up(server: TritonServer) -> dict[str, int]:
    """Rows by what the cache had for them, since the server's start."""
    with urllib.request.urlopen(f"http://{server.host}:{server.metrics_port}/metrics") as page:
        return {result: int(count) for result, count in COUNTER.findall(page.read().decode())}


def offered(server: TritonServer, sent: list[bytes], due: np.ndarray, seconds: float) -> tuple[LoadRun, float]:
    """The run, and the milliseconds of processor time that a request took."""
    before = processor_seconds(server.pid)
    outcome = run(grpc_address(server), sent, due, seconds, SLO_MS)
    if outcome.answered < outcome.due or outcome.degraded:
        raise RuntimeError(f"{outcome.refused}, {outcome.degraded} degraded: offer less")
    return outcome, (processor_seconds(server.pid) - before) * 1000 / len(due)


def requests(users: list[str], kind: str, turn: int, count: int, room: int, repeat: float) -> list[bytes]:
    """``count`` requests of a turn, of which ``room`` at most are sent; ``repeat``: exponent of the users' power law."""
    if kind == ONCE:
        first = turn * room
        asked = [(users[i % len(users)], FIRST_TOP_K + i // len(users)) for i in range(first, first + count)]
    else:
        asked = [(users[i], contract.MAX_TOP_K // 2 - turn) for i in picks(count, len(users), repeat, SEED + turn)]
    return [message(contract.ENSEMBLE, request_tensors(user, top_k=top_k)) for user, top_k in asked]


def main(
    root: Annotated[Path, typer.Argument(help="a compiled run, such as artifacts/shop")],
    store: Annotated[str, typer.Option(help="a Valkey with the run's store; the run's own if empty")] = "",
    turns: Annotated[int, typer.Option(min=1)] = 7,
    qps: float = 60.0,
    seconds: float = 6.0,
    repeat: Annotated[float, typer.Option(help="exponent of the users' power law")] = 1.0,
    cache_mb: int = 64,
) -> None:
    opened = LmdbStore(Run(root).feature_store, readonly=True)
    users = sorted(opened.users())
    opened.close()
    np.random.default_rng(SEED).shuffle(users)
    repository, cache = Run(root).repository, CacheSettings(cache_mb << 20, 600.0)
    p50, processor = (defaultdict[tuple[str, bool], list[float]](list) for _ in range(2))
    with (
        TritonServer(on_free_ports(repository, "fused", root / "without.log", store=store)) as without,
        TritonServer(on_free_ports(repository, "fused", root / "with.log", store=store, answer_cache=cache)) as with_,
    ):
        servers, results = {False: without, True: with_}, dict[str, dict[str, int]]()
        for kind in (ONCE, REPEATS):
            before = looked_up(with_)
            for turn, cached in in_turns(turns + 1, (False, True)):
                due = due_times("poisson", qps, seconds, SEED + turn)
                sent = requests(users, kind, turn, len(due), int(2 * qps * seconds), repeat)
                outcome, processor_ms = offered(servers[cached], sent, due, seconds)
                if turn:  # the first one warms up
                    p50[kind, cached].append(outcome.p50)
                    processor[kind, cached].append(processor_ms)
                print(f"{kind:8} turn {turn} {'with' if cached else 'without':8} p50 {outcome.p50:.2f} ms, processor "
                      f"{processor_ms:.2f} ms", flush=True)  # fmt: skip
            results[kind] = {result: count - before.get(result, 0) for result, count in looked_up(with_).items()}
    figures: dict[str, Any] = {}
    for kind in (ONCE, REPEATS):
        for what, of in (("p50", p50), ("processor", processor)):
            off, on = of[kind, False], of[kind, True]
            ratio = spread([b / a for a, b in zip(off, on, strict=True)])
            figures[f"{kind}, {what}"] = {"ratio": ratio, "without_ms": spread(off), "with_ms": spread(on)}
            print(f"{kind}, {what}: {with_spread(ratio, 3)} times; {with_spread(spread(on), 2)} ms with, "
                  f"{with_spread(spread(off), 2)} without")  # fmt: skip
        print(f"{kind}: {results[kind]}")
    print(
        record_line(
            "answer cache", data=root.name, store="valkey" if store else "lmdb", users=len(users), qps=qps,
            seconds=seconds, repeat=repeat, cache_mb=cache_mb, looked_up=results, results=figures,
        )
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
