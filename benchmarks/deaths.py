"""Deaths of the server's processes at random, under load: how long until it answers again, and whether anything
acknowledged was lost or answered wrongly.

    python -m benchmarks.deaths artifacts/shop --deaths 200

Callers ask ``recommend`` over gRPC and HTTP with histories whose answers are known, others append events; meanwhile
tritonserver is ended by KILL, SEGV or ABRT or by one of the requests that Triton 2.51 dies of (sent to its own sockets,
as the guard lets none of them through), or Envoy, a worker or all workers at once are killed. The next one comes only
when both ``recommend`` and ``append_event`` answer again. At the end the store is compared with what was acknowledged:
every event once, in the order of its caller. A call that fails must say that the server is away or that it may be sent
again. It works on a copy of the run. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
import tritonclient.grpc as grpcclient
import typer
from tritonclient.utils import InferenceServerException

from loadtest.generate.local_server import on_free_ports
from loadtest.reports.record import record_line
from preprocessing.requests import recorded
from serving.launcher import TritonServer
from serving.process import living
from serving.service import service
from serving.watchdog import Watchdog
from vivace import contract
from vivace.client import VivaceClient, VivaceError, inputs_of
from vivace.client_request import request_tensors
from vivace.run import Run
from vivace.store.lmdb_store import LmdbStore
from vivace.store.remote.store import ValkeyStore

WAIT_S = 60.0
LONG_S = 3.0
CANCELLING_S = 10.0
CLEAR = ("try again", "not healthy", "not ready", "no available version", "timeout expired", "failed to connect",
         "refused", "connection", "Connection", "Stub process", "Socket closed", "is stopping")  # fmt: skip
SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)


class Appending(Protocol):
    """Callers that append; each user's events that were acknowledged, and those that were not."""

    acknowledged: dict[str, list[str]]
    unknown: dict[str, list[str]]


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
        self.last_good = self.last_appended = time.monotonic()
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
                    self.last_appended = time.monotonic()
                except VivaceError as error:
                    self.unknown[user].append(event)
                    with self._lock:
                        self.errors[str(error)[:120]] += 1
                time.sleep(0.02)


def send_raw(server: TritonServer, *pieces: bytes) -> None:
    """Bytes to Triton's own HTTP socket, until it or the other side ends."""
    assert server.sockets is not None
    with socket.socket(socket.AF_UNIX) as s, contextlib.suppress(OSError):
        s.settimeout(WAIT_S)
        s.connect(str(server.sockets.http))
        for piece in pieces:
            s.sendall(piece)
        s.recv(1000)


def class_count(server: TritonServer) -> None:
    """SIGFPE."""
    outputs = [grpcclient.InferRequestedOutput(contract.ITEM_ID.name, class_count=1)]
    with server.control_client() as client, contextlib.suppress(InferenceServerException):
        inputs = inputs_of(grpcclient, request_tensors(history=["-"]))
        client.infer(contract.ENSEMBLE, inputs, outputs=outputs, client_timeout=WAIT_S)


HEAD = b"POST /v2/models/recommend/infer HTTP/1.1\r\nHost: x\r\n"


def nested_json(server: TritonServer) -> None:
    """The stack of the thread that reads it overflows: SIGSEGV."""
    send_raw(server, HEAD + b"Content-Length: 300000\r\n\r\n" + b"[" * 300_000)


def small_chunks(server: TritonServer) -> None:
    """The same."""
    send_raw(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[b"2\r\nAA\r\n" * 10_000] * 60, b"0\r\n\r\n")


def cancelled_calls(server: TritonServer) -> None:
    """gRPC calls given up about when their answer comes, until the server dies of one, or for ``CANCELLING_S``."""
    inputs, pid, rng = inputs_of(grpcclient, request_tensors(history=["-"])), server.pid, random.Random(time.time())
    stop, usual_s = time.monotonic() + CANCELLING_S, 0.005
    with server.control_client() as client:
        while living(pid) and time.monotonic() < stop:
            running = [
                client.async_infer(contract.ENSEMBLE, inputs, lambda result, error: None, client_timeout=WAIT_S)
                for _ in range(8)
            ]
            time.sleep(usual_s * rng.uniform(0.3, 2))
            for call in running:
                call.cancel()


REQUESTS: dict[str, Callable[[TritonServer], None]] = {
    "class_count": class_count,
    "nested JSON": nested_json,
    "small chunks": small_chunks,
    "cancelled gRPC calls": cancelled_calls,
}
SIGNALS_OF = {"class_count": "SIGFPE", "nested JSON": "SIGSEGV", "small chunks": "SIGSEGV"}  # those that always end it
KINDS = {"signal": 5, **dict.fromkeys(REQUESTS, 2), "Envoy": 2, "a worker": 3, "all workers": 2}


def kill_one(rng: random.Random, server: TritonServer, watchdog: Watchdog) -> tuple[str, list[int]]:
    """Ends a process by chance; how, and the process ids that end."""
    (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
    pids = [server.pid]
    if kind in REQUESTS:
        threading.Thread(target=REQUESTS[kind], args=(server,), daemon=True).start()
        return kind, pids
    if kind == "Envoy" and server.door is not None:
        pids = [server.door.pid]
    workers = list(watchdog.workers()) if "worker" in kind else []
    if workers:
        pids = workers if kind == "all workers" else [rng.choice(workers)]
    elif "worker" in kind:
        kind = "signal"
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it was about to end by itself
            os.kill(pid, rng.choice(SIGNALS))
    return kind, pids


def lost_events(store: LmdbStore | ValkeyStore, callers: Appending) -> list[str]:
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


def wait_ended(pids: list[int], seconds: float) -> bool:
    """Until killed processes have ended: one that dies of a signal of its own prints where first. False if not."""
    stop = time.monotonic() + seconds
    while any(living(pid) for pid in pids):
        if time.monotonic() > stop:
            return False
        time.sleep(0.005)
    return True


def watch(server: TritonServer, watchdog: Watchdog, callers: Callers, deaths: int, rng: random.Random) -> dict:
    """Kills ``deaths`` times; seconds until the next right answer and the next event stored, by kind."""
    seconds: dict[str, list[float]] = {}
    done = 0
    while done < deaths:
        time.sleep(rng.uniform(0.2, 1.0))
        kind, pids = kill_one(rng, server, watchdog)
        if not wait_ended(pids, CANCELLING_S + 2 if kind in REQUESTS else WAIT_S):
            print(f"{kind}: survived", flush=True)
            continue
        ended, done = time.monotonic(), done + 1
        while min(callers.last_good, callers.last_appended) < ended + 0.02 or not server.running():
            if time.monotonic() > ended + WAIT_S:
                raise TimeoutError(f"death {done} ({kind}): no answer for {WAIT_S:.0f} s\n{server.log_tail()}")
            time.sleep(0.01)
        seconds.setdefault(kind, []).append(time.monotonic() - ended)
        if seconds[kind][-1] > LONG_S:
            print(f"{kind}: {seconds[kind][-1]:.2f} s", flush=True)
        if done % 20 == 0:
            print(f"{done} deaths; {callers.good:,} right answers, {callers.wrong} wrong", flush=True)
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
    for text, count in callers.errors.most_common(20):
        print(f"{count:5}  {text}")
    unclear = {text: count for text, count in callers.errors.items() if not any(words in text for words in CLEAR)}
    seconds["all"] = [x for s in seconds.values() for x in s]
    summary = {
        kind: {"deaths": len(s), "median_s": round(float(np.median(s)), 2), "max_s": round(max(s), 2),
               "over_3_s": sum(x > LONG_S for x in s)}
        for kind, s in sorted(seconds.items())
    }  # fmt: skip
    appended = sum(len(events) for events in callers.acknowledged.values())
    print(
        record_line(
            "deaths", seed=seed, deaths=summary, right_answers=callers.good, wrong_answers=callers.wrong,
            errors=sum(callers.errors.values()), unclear_errors=unclear,
            load=[round(n, 1) for n in os.getloadavg()], acknowledged=appended, lost=faults,
        )
    )  # fmt: skip
    if faults or callers.wrong or unclear:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
