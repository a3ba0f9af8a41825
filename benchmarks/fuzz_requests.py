"""Malformed and hostile requests over HTTP and gRPC through the guard, beside neighbours whose answers are known.

    python -m benchmarks.fuzz_requests --name shop --minutes 10 --seed 1

Strangers send what ``benchmarks.hostile`` makes by chance: bodies, lengths, encodings, headers, paths, HTTP/2 frames
and gRPC messages that are malformed, calls that are given up. Neighbours ask ``recommend`` over both protocols,
compare ids and scores with what they were answered before, and append events. What counts as a fault: a neighbour that
fails or is answered otherwise; an answer that shows a traceback or a path of the server; a whole request without any
answer; a process that ends; memory (proportional set size, all processes) that is more than 10 % above that after the
warm-up, the first third; an event that is lost; a segment left in /dev/shm. It works on a copy of the run. A fault is
printed with its key: ``--replay KEY`` sends that request alone. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import re
import shutil
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import grpc
import numpy as np
import psutil
import typer

from benchmarks.answers import NO_CLOCK
from benchmarks.deaths import lost_events
from benchmarks.hostile import over_grpc, over_http, over_http2
from loadtest.generate.local_server import on_free_ports
from loadtest.reports.record import record_line
from preprocessing.requests import recorded
from serving.fleet import warm_up
from serving.launcher import TritonServer
from serving.segments import SHM
from serving.service import service
from serving.start_checks import raise_descriptor_limit
from vivace import contract
from vivace.client import Recommendation, VivaceClient, VivaceError
from vivace.machine import memory_by_process, process_tree
from vivace.run import Run
from vivace.store.lmdb_store import LmdbStore

ANSWER_S = 30.0  # longer than the guard waits for a slow caller
REFUSED_S = 5.0  # for frames that need no answer
REST_S = 3.0  # without strangers, before memory and descriptors are read
GROWTH = 1.10
UNCLEAR = ("500", "502", "INTERNAL", "UNKNOWN")
LEAK = re.compile(r"Traceback|site-packages|/tmp/|/dev/shm|/proc/|\.py\W+(line|[0-9])|\.lua")
KINDS: dict[str, Callable[[random.Random], over_http.Wire | over_grpc.Call]] = {
    **over_http.KINDS,
    **over_http2.KINDS,
    **over_grpc.KINDS,
}


class Neighbours:
    """Threads that ask and append what is right; what went wrong for them."""

    def __init__(self, server: TritonServer, histories: list[list[str]]) -> None:
        self.server, self.histories = server, histories
        self.stop, self.lock = threading.Event(), threading.Lock()
        self.right, self.faults = 0, Counter[str]()
        self.took_ms: list[float] = []
        self.acknowledged: dict[str, list[str]] = {}
        self.unknown: dict[str, list[str]] = {}
        with self.client("grpc") as client:
            self.expected = [client.recommend(history=h, top_k=10, context=NO_CLOCK) for h in histories]

    def client(self, protocol: str) -> VivaceClient:
        port = self.server.grpc_port if protocol == "grpc" else self.server.http_port
        return VivaceClient(f"{self.server.host}:{port}", protocol, timeout_s=60.0)

    def fault(self, text: str) -> None:
        with self.lock:
            self.faults[text[:200]] += 1

    def ask(self, protocol: str) -> None:
        rng = random.Random(protocol)
        with self.client(protocol) as client:
            while not self.stop.wait(0.02):
                n = rng.randrange(len(self.histories))
                started = time.perf_counter()
                try:
                    answer = client.recommend(history=self.histories[n], top_k=10, context=NO_CLOCK)
                except VivaceError as error:
                    self.fault(f"{protocol}: {error}")
                    continue
                if not same(answer, self.expected[n]):
                    self.fault(f"{protocol}: answered otherwise: {answer}, not {self.expected[n]}")
                with self.lock:
                    self.right += 1
                    self.took_ms.append((time.perf_counter() - started) * 1000)

    def append(self, protocol: str) -> None:
        user, number = f"neighbour-{protocol}", 0
        self.acknowledged[user], self.unknown[user] = [], []
        with self.client(protocol) as client:
            while not self.stop.wait(0.2):
                number += 1
                try:
                    client.append(user, f"event-{number}")
                    self.acknowledged[user].append(f"event-{number}")
                except VivaceError as error:
                    self.unknown[user].append(f"event-{number}")
                    self.fault(f"append over {protocol}: {error}")

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        threads = [threading.Thread(target=t, args=(p,)) for t in (self.ask, self.append) for p in ("grpc", "http")]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop.set()
            for thread in threads:
                thread.join()


def same(answer: Recommendation, expected: Recommendation) -> bool:
    return answer.items == expected.items and np.allclose(answer.scores, expected.scores, rtol=1e-4, atol=1e-5)


class Strangers:
    """Threads that send requests of ``kinds`` by chance; how each kind was answered, and what must not be."""

    def __init__(self, server: TritonServer, seed: int, kinds: list[str]) -> None:
        self.server, self.seed, self.kinds = server, seed, kinds
        self.go, self.stop, self.lock = threading.Event(), threading.Event(), threading.Lock()
        self.outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
        self.faults: list[str] = []
        self.unclear = Counter[str]()  # words of answers that blame the server

    def run(self, number: int) -> None:
        """First each kind some times, then by chance."""
        chance = random.Random(f"{self.seed}/{number}")
        turns = [kind for kind in self.kinds for _ in range(3)]
        chance.shuffle(turns)
        sent = 0
        while not self.stop.is_set():
            if not self.go.wait(0.1):
                continue
            kind = turns.pop() if turns else chance.choice(self.kinds)
            self.send(f"{self.seed}/{number}/{sent}/{kind}")
            sent += 1
            time.sleep(0.005)

    def send(self, key: str) -> str:
        """The request of a key; its outcome."""
        kind = key.split("/", 3)[3]
        request = KINDS[kind](random.Random(key))
        try:
            if isinstance(request, over_grpc.Call):
                outcome, text = self._call(request)
            else:
                outcome, text = self._wire(request, kind in over_http2.KINDS)
        except OSError as error:
            outcome, text = f"connection: {type(error).__name__}", ""
        with self.lock:
            self.outcomes[kind][outcome] += 1
            if outcome in UNCLEAR:
                self.unclear[f"{kind}: {outcome} {text[:120]}"] += 1
            leak = LEAK.search(text)
            if leak or outcome == "no answer":
                self.faults.append(f"{key}: {outcome}: {text[max(0, (leak.start() if leak else 0) - 80) :][:300]}")
        return f"{outcome} {text[:500]}"

    def _wire(self, wire: over_http.Wire, http2: bool) -> tuple[str, str]:
        ports = (self.server.grpc_port, self.server.http_port)
        port = ports[0] if http2 and len(wire.pieces[-1]) % 4 else ports[1]
        with socket.create_connection((self.server.host, port), timeout=ANSWER_S) as s:
            with contextlib.suppress(OSError):  # refused before all was sent
                for piece in wire.pieces:
                    s.sendall(piece)
                    time.sleep(wire.pause_s)
                if wire.ending == "half":
                    s.shutdown(socket.SHUT_WR)
            if wire.ending == "gone":
                return "hung up", ""
            if http2:
                return _frames(s)
            with contextlib.suppress(TimeoutError):
                answer = http.client.HTTPResponse(s)
                try:
                    answer.begin()
                    return str(answer.status), answer.read(1 << 16).decode(errors="replace")
                except (http.client.HTTPException, ConnectionError):
                    return "closed", ""
            return ("no answer" if wire.ending == "read" else "none to half a request"), ""

    def _call(self, call: over_grpc.Call) -> tuple[str, str]:
        address = f"{self.server.host}:{self.server.grpc_port}"
        with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            method = channel.unary_unary(call.path, request_serializer=bytes, response_deserializer=bytes)
            more = {"metadata": call.metadata, "compression": call.compression}
            try:
                running = method.future(call.message, timeout=60 if call.cancel else call.after_s, **more)
                if call.cancel:
                    time.sleep(call.after_s)
                    running.cancel()
                running.result()
                return "OK", ""
            except grpc.FutureCancelledError:
                return "given up", ""
            except grpc.RpcError as error:
                status = error.code()
                late = status == grpc.StatusCode.DEADLINE_EXCEEDED
                if late:
                    return ("given up" if call.after_s < 1 else "no answer"), ""
                return status.name, error.details() or ""
            except ValueError:  # metadata that the client itself refuses
                return "not sent", ""


def _frames(s: socket.socket) -> tuple[str, str]:
    """What comes back over HTTP/2 until the other side closes, or nothing more comes."""
    s.settimeout(0.5)
    received, stop = b"", time.monotonic() + REFUSED_S
    try:
        while time.monotonic() < stop and len(received) < 1 << 20 and (part := s.recv(1 << 16)):
            received += part
        outcome = "closed"
    except TimeoutError:
        outcome = "answered" if received else "nothing"
    except ConnectionError:
        outcome = "reset"
    return outcome, received.decode("latin1")


class Watch:
    """Reads memory (MiB of all processes) and descriptors, and whether any process was replaced."""

    def __init__(self, server: TritonServer) -> None:
        self.server = server
        self.first = self.pids()

    def roots(self) -> list[int]:
        return [self.server.pid, *([self.server.door.pid] if self.server.door is not None else [])]

    def pids(self) -> set[int]:
        return {p.pid for p in process_tree(self.roots())}

    def read(self) -> dict[str, float]:
        tree, memory = process_tree(self.roots()), memory_by_process(self.roots())
        descriptors = 0
        for process in tree:
            with contextlib.suppress(psutil.Error):
                descriptors += process.num_fds()
        largest = {f"{p.name()}-{p.pid}": memory.get(p.pid, 0.0) for p in tree}
        print({name: round(mib) for name, mib in largest.items()}, flush=True)
        return {"mib": round(sum(memory.values()), 1), "descriptors": descriptors}


def fuzz(server: TritonServer, neighbours: Neighbours, strangers: Strangers, callers: int, seconds: float) -> dict:
    """Strangers and neighbours for so long; memory and descriptors after a third of it and at the end."""
    watch, readings = Watch(server), []
    threads = [threading.Thread(target=strangers.run, args=(n,)) for n in range(callers)]
    for thread in threads:
        thread.start()
    try:
        with neighbours.at_work():
            for share in (1 / 3, 1 / 3, 1 / 3):
                strangers.go.set()
                time.sleep(seconds * share)
                strangers.go.clear()
                time.sleep(REST_S)
                readings.append(watch.read())
                count = sum(sum(c.values()) for c in strangers.outcomes.values())
                print(
                    f"{count:,} hostile, {neighbours.right:,} right answers, faults {len(strangers.faults)} and "
                    f"{sum(neighbours.faults.values())}, {readings[-1]}",
                    flush=True,
                )
    finally:
        strangers.stop.set()
        for thread in threads:
            thread.join()
    return {
        "readings": readings,
        "memory_ratio": round(readings[-1]["mib"] / readings[0]["mib"], 3),
        "processes_replaced": len(watch.first - watch.pids()),
    }


def main(
    name: str = "shop",
    artifacts: Path = Path("artifacts"),
    minutes: float = 10.0,
    seed: int = 1,
    callers: Annotated[int, typer.Option(help="strangers at once")] = 4,
    kinds: Annotated[str, typer.Option(help="by commas; all by default")] = "",
    profile: str = "",
    replay: Annotated[str, typer.Option(help="the key of one request, which is sent alone")] = "",
) -> None:
    raise_descriptor_limit()
    run, chosen = Run(artifacts / name), kinds.split(",") if kinds else list(KINDS)
    histories = [list(h)[-20:] for h in recorded(artifacts / name)[contract.ITEM][:40]]
    with tempfile.TemporaryDirectory() as folder:
        copy = Run(Path(folder) / "run")
        shutil.copytree(run.repository, copy.repository)
        shutil.copytree(run.feature_store, copy.feature_store)
        log = run.root / "fuzz.log"
        with service(on_free_ports(copy.repository, profile, log, guard=True), print) as (server, _):
            if replay:
                print(Strangers(server, 0, list(KINDS)).send(replay))
                return
            warm_up(server)
            neighbours, strangers = Neighbours(server, histories), Strangers(server, seed, chosen)
            seen = fuzz(server, neighbours, strangers, callers, minutes * 60)
            prefix = server.segments.prefix
        left = [path.name for path in SHM.glob(f"{prefix}*")]
        store = LmdbStore(copy.feature_store, readonly=True)
        lost = lost_events(store, neighbours)
        store.close()
    for kind, outcomes in strangers.outcomes.items():
        print(f"{kind}: {dict(outcomes.most_common())}")
    print(*(f"{n:5}  {text}" for text, n in strangers.unclear.most_common(40)), sep="\n")
    faults = [*strangers.faults, *(f"{n} times {text}" for text, n in neighbours.faults.items()), *lost, *left]
    growth = seen["memory_ratio"] > GROWTH or seen["processes_replaced"]
    print(*faults[:40], sep="\n")
    print(record_line(
        "fuzz of requests", data=name, profile=profile, minutes=minutes, seed=seed, callers=callers, **seen,
        hostile=sum(sum(c.values()) for c in strangers.outcomes.values()),
        outcomes={kind: dict(c.most_common()) for kind, c in strangers.outcomes.items()},
        right_answers=neighbours.right, neighbours_p50_ms=round(float(np.median(neighbours.took_ms)), 1),
        appended=sum(map(len, neighbours.acknowledged.values())), faults=faults,
    ))  # fmt: skip
    if faults or growth:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
