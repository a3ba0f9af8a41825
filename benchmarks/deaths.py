"""Deaths of the server's processes at random, under load: how long until it answers again, and whether anything
acknowledged was lost or answered wrongly.

    python -m benchmarks.deaths artifacts/shop --deaths 200

Callers ask ``recommend`` over gRPC and HTTP with histories whose answers are known, others append events; meanwhile
tritonserver (by KILL, SEGV or ABRT), Envoy or a worker is killed, and the next one only when the service answers again.
At the end the store is compared with what was acknowledged: every event once, in the order of its caller. It works on a
copy of the run. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from loadtest.generate.local_server import on_free_ports
from loadtest.reports.record import record_line
from preprocessing.requests import recorded
from serving.launcher import TritonServer
from serving.process import living
from serving.service import service
from serving.watchdog import Watchdog
from vivace import contract
from vivace.client import VivaceClient, VivaceError
from vivace.run import Run
from vivace.store.lmdb_store import LmdbStore

WAIT_S = 60.0
SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)


class Callers:
    """Threads that ask and append until they are told to stop; what they saw."""

    def __init__(self, server: TritonServer, histories: list[list[str]]) -> None:
        self.server, self.histories = server, histories
        self.answers: list[list[str]] = []
        self.stop = threading.Event()
        self.good, self.wrong = 0, 0
        self.errors: Counter[str] = Counter()
        self.acknowledged: dict[str, list[str]] = {}
        self.unknown: dict[str, list[str]] = {}  # events whose append failed: stored or not
        self.last_good = time.monotonic()
        self._lock = threading.Lock()

    def client(self, protocol: str) -> VivaceClient:
        port = self.server.grpc_port if protocol == "grpc" else self.server.http_port
        return VivaceClient(f"{self.server.host}:{port}", protocol, timeout_s=WAIT_S)

    def ask(self, seed: int, protocol: str) -> None:
        rng = random.Random(seed)
        with self.client(protocol) as client:
            while not self.stop.is_set():
                n = rng.randrange(len(self.histories))
                try:
                    items = client.recommend(history=self.histories[n], top_k=10).items
                except VivaceError as error:
                    with self._lock:
                        self.errors[str(error)[:120]] += 1
                    time.sleep(0.05)
                    continue
                with self._lock:
                    self.good += items == self.answers[n]
                    self.wrong += items != self.answers[n]
                    self.last_good = time.monotonic()

    def append(self, user: str, protocol: str, items: list[str]) -> None:
        self.acknowledged[user], self.unknown[user] = [], []
        rng, number = random.Random(user), 0
        with self.client(protocol) as client:
            while not self.stop.is_set():
                number += 1
                event = f"{rng.choice(items)}#{number}"
                try:
                    client.append(user, event)
                    self.acknowledged[user].append(event)
                except VivaceError as error:
                    self.unknown[user].append(event)
                    with self._lock:
                        self.errors[str(error)[:120]] += 1
                time.sleep(0.02)


def kill_one(rng: random.Random, server: TritonServer, watchdog: Watchdog) -> tuple[str, int]:
    """Kills a process by chance; which, and its process id."""
    kind = rng.choices(("tritonserver", "envoy", "worker"), (0.6, 0.15, 0.25))[0]
    pid = server.pid
    if kind == "envoy" and server.door is not None:
        pid = server.door.pid
    workers = list(watchdog.workers()) if kind == "worker" else []
    if workers:
        pid = rng.choice(workers)
    elif kind == "worker":
        kind = "tritonserver"
    with contextlib.suppress(ProcessLookupError):  # it was about to end by itself
        os.kill(pid, rng.choice(SIGNALS))
    return kind, pid


def lost_events(store: LmdbStore, callers: Callers) -> list[str]:
    """What was acknowledged and is not there once and in order, or is there and was never sent."""
    faults = []
    for user, events in callers.acknowledged.items():
        stored = [event.item_id for event in store.events(user)]
        kept = [item for item in stored if item in set(events)]
        if kept != events[-len(kept) :] or (len(stored) < 4096 and kept != events):
            faults.append(f"{user}: {len(events)} acknowledged, {len(kept)} of them stored")
        strange = set(stored) - set(events) - set(callers.unknown[user])
        if strange or len(set(stored)) != len(stored):
            faults.append(f"{user}: {len(strange)} events that were never sent, or some twice")
    return faults


def wait_ended(pid: int, until: float) -> None:
    """Until a killed process has ended: one that dies of a signal of its own prints where first."""
    while living(pid) and time.monotonic() < until:
        time.sleep(0.005)


def watch(server: TritonServer, watchdog: Watchdog, callers: Callers, deaths: int, rng: random.Random) -> dict:
    """Kills ``deaths`` processes; seconds until the next right answer, by kind."""
    seconds: dict[str, list[float]] = {}
    for n in range(deaths):
        time.sleep(rng.uniform(0.2, 1.0))
        (kind, pid), killed = kill_one(rng, server, watchdog), time.monotonic()
        wait_ended(pid, killed + WAIT_S)
        ended = time.monotonic()
        while callers.last_good < ended + 0.02 or not server.running() or not server.ready():
            if time.monotonic() > killed + WAIT_S:
                raise TimeoutError(f"death {n + 1} ({kind}): no answer for {WAIT_S:.0f} s\n{server.log_tail()}")
            time.sleep(0.01)
        seconds.setdefault(kind, []).append(time.monotonic() - killed)
        if (n + 1) % 20 == 0:
            print(f"{n + 1} deaths; {callers.good:,} right answers, {callers.wrong} wrong", flush=True)
    return seconds


def main(
    root: Annotated[Path, typer.Argument(help="a compiled run, such as artifacts/shop")],
    deaths: Annotated[int, typer.Option(min=1)] = 200,
    seed: int = 1,
) -> None:
    rng, run = random.Random(seed), Run(root)
    histories = [list(h)[-20:] for h in recorded(root)[contract.ITEM][:40]]
    with tempfile.TemporaryDirectory() as folder:
        copy = Run(Path(folder) / "run")
        shutil.copytree(run.repository, copy.repository)
        shutil.copytree(run.feature_store, copy.feature_store)
        options = on_free_ports(copy.repository, log=copy.server_log, guard=True)
        with service(options, lambda text: print(text, flush=True)) as (server, watchdog):
            callers = Callers(server, histories)
            with callers.client("grpc") as client:
                callers.answers = [client.recommend(history=h, top_k=10).items for h in histories]
            threads = [threading.Thread(target=callers.ask, args=(n, p)) for n, p in enumerate(("grpc", "http"))]
            threads += [
                threading.Thread(target=callers.append, args=(f"death-{p}", p, histories[0])) for p in ("grpc", "http")
            ]
            for thread in threads:
                thread.start()
            try:
                seconds = watch(server, watchdog, callers, deaths, rng)
            finally:
                callers.stop.set()
                for thread in threads:
                    thread.join()
        store = LmdbStore(copy.feature_store, readonly=True)
        faults = lost_events(store, callers)
        store.close()
    for text, count in callers.errors.most_common(8):
        print(f"{count:5}  {text}")
    summary = {
        kind: {"deaths": len(s), "median_s": round(float(np.median(s)), 2), "max_s": round(max(s), 2)}
        for kind, s in sorted(seconds.items())
    }
    appended = sum(len(events) for events in callers.acknowledged.values())
    print(
        record_line(
            "deaths", seed=seed, deaths=summary, right_answers=callers.good, wrong_answers=callers.wrong,
            errors=sum(callers.errors.values()), acknowledged=appended, lost=faults,
        )
    )  # fmt: skip
    if faults or callers.wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
