"""What the cache of answers costs where nothing repeats, and what it is worth where requests do.

    python -m benchmarks.answer_cache artifacts/shop --turns 9
    python -m benchmarks.answer_cache artifacts/shop --store valkey://127.0.0.1:6379/0

Two servers of the profile ``fused``, one with the cache, are asked the same in turn, request by request, by user
alone, so that the store gives the history; whatever else the machine does meets both. One request at a time: each is a
batch of its own, for which the cache does the most. "repeats": users by a power law, each turn from an empty cache, as
it asks for another number of items. "once": no request comes twice; the turns before the server has seen that are
apart, as "first". Figures of a turn: p50, and processor time a request of all the server's processes (of a Valkey not:
it serves both); the ratio of the server with the cache to the other, turn by turn. The last line of stdout is one JSON
object.
"""

from __future__ import annotations

import contextlib
import re
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import typer

from benchmarks.turns import spread, with_spread
from loadtest.generate.arrivals import picks
from loadtest.generate.generator import METHOD, message
from loadtest.generate.local_server import grpc_address, on_free_ports
from loadtest.reports.record import record_line
from serving.launcher import TritonServer
from serving.runtime.answer_cache import Repeats
from serving.runtime.cache_settings import CacheSettings
from vivace import contract
from vivace.client_request import request_tensors
from vivace.machine import processor_seconds
from vivace.run import Run
from vivace.store.lmdb_store import LmdbStore

SEED, FIRST_TOP_K = 7, 10
TIMEOUT_S, SETTLE_S = 30.0, 0.3
FIRST, ONCE, REPEATS = "first", "once", "repeats"
COUNTER = re.compile(r'vivace_answer_cache_total\{[^}]*result="(\w+)"[^}]*\} (\d+)')


def looked_up(server: TritonServer) -> dict[str, int]:
    """Rows by what the cache had for them, since the server's start; Triton's page comes a moment after its answers."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return _looked_up(server)
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _looked_up(server: TritonServer) -> dict[str, int]:
    with urllib.request.urlopen(f"http://{server.host}:{server.metrics_port}/metrics") as page:
        return {result: int(count) for result, count in COUNTER.findall(page.read().decode())}


def alternately(servers: Sequence[TritonServer], sent: Sequence[bytes]) -> list[tuple[float, float]]:
    """(p50 in ms, milliseconds of processor time a request) of each server, all asked each request before the next."""
    took: list[list[float]] = [[] for _ in servers]
    before = [processor_seconds(server.pid) for server in servers]
    with contextlib.ExitStack() as channels:
        calls = [
            channels.enter_context(grpc.insecure_channel(grpc_address(server))).unary_unary(METHOD)
            for server in servers
        ]
        for number, request in enumerate(sent):
            for place in (0, 1) if number % 2 else (1, 0):
                began = time.perf_counter()
                calls[place](request, timeout=TIMEOUT_S)
                took[place].append((time.perf_counter() - began) * 1000)
    time.sleep(SETTLE_S)
    used = [processor_seconds(s.pid) - b for s, b in zip(servers, before, strict=True)]
    return [(float(np.median(t)), u * 1000 / len(sent)) for t, u in zip(took, used, strict=True)]


def requests(users: list[str], kind: str, turn: int, count: int, repeat: float) -> list[bytes]:
    """The requests of a turn; ``repeat``: exponent of the users' power law."""
    if kind != REPEATS:
        places = range(turn * count, (turn + 1) * count)
        asked = [(users[i % len(users)], FIRST_TOP_K + i // len(users)) for i in places]
    else:
        asked = [(users[i], contract.MAX_TOP_K // 2 - turn) for i in picks(count, len(users), repeat, SEED + turn)]
    return [message(contract.ENSEMBLE, request_tensors(user, top_k=top_k)) for user, top_k in asked]


def main(
    root: Annotated[Path, typer.Argument(help="a compiled run, such as artifacts/shop")],
    store: Annotated[str, typer.Option(help="a Valkey with the run's store; the run's own if empty")] = "",
    turns: Annotated[int, typer.Option(min=1)] = 9,
    count: Annotated[int, typer.Option(help="requests of a turn", min=1)] = 300,
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
        results = dict[str, dict[str, int]]()
        whole = max(2, Repeats.WINDOW // count)  # turns in which both workers still look up all of their rows
        warm = 1 + -(-2 * Repeats.WINDOW // count)  # and after which neither does
        plan = {REPEATS: (0, 1, turns), FIRST: (0, 1, whole - 1), ONCE: (whole, warm, turns)}
        for kind, (start, unused, used) in plan.items():
            before = looked_up(with_)
            for turn in range(start, start + unused + used):
                figures_of_turn = alternately((without, with_), requests(users, kind, turn, count, repeat))
                (p50_off, cpu_off), (p50_on, cpu_on) = figures_of_turn
                print(f"{kind:8} turn {turn}: p50 {p50_off:.2f} ms without, {p50_on:.2f} with; processor {cpu_off:.2f} "
                      f"ms without, {cpu_on:.2f} with", flush=True)  # fmt: skip
                for cached, (p50_ms, processor_ms) in enumerate(figures_of_turn) if turn >= start + unused else ():
                    p50[kind, bool(cached)].append(p50_ms)
                    processor[kind, bool(cached)].append(processor_ms)
            results[kind] = {result: n - before.get(result, 0) for result, n in looked_up(with_).items()}
    figures: dict[str, Any] = {}
    for kind in (FIRST, ONCE, REPEATS):
        for what, of in (("p50", p50), ("processor", processor)):
            off, on = of[kind, False], of[kind, True]
            ratio = spread([b / a for a, b in zip(off, on, strict=True)])
            figures[f"{kind}, {what}"] = {"ratio": ratio, "without_ms": spread(off), "with_ms": spread(on)}
            print(f"{kind}, {what}: {with_spread(ratio, 3)} times; {with_spread(spread(on), 2)} ms with, "
                  f"{with_spread(spread(off), 2)} without")  # fmt: skip
        print(f"{kind}: {results[kind]}")
    print(
        record_line(
            "answer cache", data=root.name, store="valkey" if store else "lmdb", users=len(users),
            turns=turns, count=count, repeat=repeat, cache_mb=cache_mb, looked_up=results, results=figures,
        )
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
