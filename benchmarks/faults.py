"""What each fault costs callers of several servers behind one door: open load, one fault after the other.

    python -m benchmarks.faults artifacts/shop --replicas 3 --qps 60 --slo 100 --seconds 20
    python -m benchmarks.faults artifacts/shop --replicas 3 --qps 60 --slo 100 --store valkey

Recorded requests come at random (Poisson) over gRPC, whatever became of those before; a thread appends events over
HTTP. Four seconds into each run the fault comes: a killed tritonserver, a killed worker, a server that is stopped for
ten seconds, another version for the served one, and back, the killed guard. Every answer is compared with that of the
version at rest (of either, while versions change); at the end the store is compared with what was acknowledged. A
figure a fault: the share of requests answered right within ``--slo`` outside the two seconds after it, the refused,
and when the last bad one was. With ``--store valkey`` the servers share a Valkey that writes each event to its disk
(``appendfsync always``), requests name users alone, and the faults are the Valkey's: it is started again, killed, has
no memory left for eight seconds. An answer whose STATUS says that the store is away may be another: it is counted
apart. It works on a copy of the run. The last line of stdout is one JSON object.
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
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor

from benchmarks.deaths import lost_events
from benchmarks.local_valkey import ValkeyServer
from loadtest.generate.arrivals import due_times
from loadtest.generate.generator import DEGRADED, METHOD, CallError, complete, messages, offer
from loadtest.generate.local_server import on_free_ports
from loadtest.reports.record import record_line
from serving.acceptance import Acceptance, recorded_calls
from serving.fleet import Fleet
from serving.releases import publishing, releases
from vivace import contract
from vivace.client import VivaceClient, VivaceError
from vivace.run import Run
from vivace.store.lmdb_store import LmdbStore
from vivace.store.remote.address import Address
from vivace.store.remote.copying import copy as copied, end_of
from vivace.store.remote.store import ValkeyStore

AT_S, WINDOW_S, STOPPED_S, FULL_S = 4.0, 2.0, 10.0, 8.0
STORE_AWAY = b"store: "  # in a STATUS
TIMEOUT_S = 10.0
console = Console(width=140)


def texts_of(answer: bytes, tensor: contract.WireTensor) -> tuple[bytes, ...]:
    """A BYTES output of a serialized ModelInferResponse."""
    response = service_pb2.ModelInferResponse.FromString(answer)
    place = [output.name for output in response.outputs].index(tensor.name)
    return tuple(deserialize_bytes_tensor(response.raw_output_contents[place]))


def items_of(answer: bytes) -> tuple[bytes, ...]:
    """ITEM_ID of the same."""
    return texts_of(answer, contract.ITEM_ID)


def copy_of(run: Run, folder: Path) -> Run:
    """The served version of a run with its store, in a folder that is not there yet."""
    copy, release = Run(folder), run.repository.resolve()
    shutil.copytree(release, copy.root / release.name)
    copy.repository.symlink_to(release.name)
    shutil.copytree(run.feature_store, copy.feature_store)
    shutil.copytree(run.compiled, copy.compiled)
    return copy


def published_again(run: Run) -> Path:
    """The served version once more, under the next number."""
    old = run.repository.resolve()
    number = old.name.rpartition(".")[2]
    with publishing(run.repository) as (folder, version):
        shutil.copytree(old, folder, dirs_exist_ok=True)
        for model in folder.iterdir():
            if (model / number).is_dir():
                (model / number).rename(model / str(version))
    return releases(run.repository)[-1]


class Events:
    """A thread that appends an event twenty times a second; what was acknowledged, and what may be stored."""

    def __init__(self, url: str) -> None:
        self.acknowledged: dict[str, list[str]] = {"fault": []}
        self.unknown: dict[str, list[str]] = {"fault": []}
        self._url, self._stop = url, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        number = 0
        with VivaceClient(self._url, "http", timeout_s=TIMEOUT_S) as client:
            while not self._stop.wait(0.05):
                number += 1
                try:
                    client.append("fault", f"item#{number}")
                    self.acknowledged["fault"].append(f"item#{number}")
                except VivaceError:
                    self.unknown["fault"].append(f"item#{number}")

    def __enter__(self) -> Events:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def faults(fleet: Fleet, run: Run, rng: random.Random) -> dict[str, Callable[[], None]]:
    """What is done to the fleet, by name, in the order of the runs."""
    first = run.repository.resolve()
    second = published_again(run)
    accept = Acceptance(recorded_calls(run))

    def stop_one() -> None:
        pid = rng.choice(fleet.replicas).server.pid
        os.kill(pid, signal.SIGSTOP)
        time.sleep(STOPPED_S)
        os.kill(pid, signal.SIGCONT)

    def kill_worker() -> None:
        os.kill(rng.choice(list(rng.choice(fleet.replicas).watchdog.workers())), signal.SIGKILL)

    def kill_guard() -> None:
        assert fleet.door is not None
        os.kill(fleet.door.pid, signal.SIGKILL)

    return {
        "none": lambda: None,
        "tritonserver killed": lambda: os.kill(rng.choice(fleet.replicas).server.pid, signal.SIGKILL),
        "worker killed": kill_worker,
        f"server stopped for {STOPPED_S:.0f} s": stop_one,
        "another version": lambda: fleet.serve(second, accept, print),
        "and back": lambda: fleet.serve(first, accept, print),
        "guard killed": kill_guard,
    }


def faults_of_store(server: ValkeyServer) -> dict[str, Callable[[], None]]:
    """The same of the Valkey that the servers share."""

    def start_again() -> None:
        server.send(signal.SIGTERM)
        assert server.process is not None
        server.process.wait()
        server.start()

    def kill() -> None:
        server.kill()
        server.start()

    def fill_up() -> None:
        with server.client() as client:
            client.config_set("maxmemory", "1mb")  # below what it holds: writes are refused, reads go on
            time.sleep(FULL_S)
            client.config_set("maxmemory", "0")

    return {"none": lambda: None, "Valkey started again": start_again, "Valkey killed": kill, "Valkey full": fill_up}


class Load:
    """One run of open load in a thread of its own. ``records``: as ``generator.offer`` gives them, and WRONG for an
    answer with other items whose STATUS names no reason; ``wrong``: those answers and what was expected;
    ``without_store``: how many say that the store is away."""

    WRONG = "wrong answer"

    def __init__(self, url: str, sent: list[bytes], expected: list[tuple[bytes, ...]], due_s: np.ndarray) -> None:
        self.records: list[Any] = []
        self.wrong: list[tuple[bytes, tuple[bytes, ...]]] = []
        self.without_store = 0
        self.due_s = due_s
        self._thread = threading.Thread(target=lambda: complete(self._go(url, sent, expected)))

    async def _go(self, url: str, sent: list[bytes], expected: list[tuple[bytes, ...]]) -> None:
        right = dict(zip(sent, expected, strict=True))
        chosen = [sent[i % len(sent)] for i in range(len(self.due_s))]
        async with grpc.aio.insecure_channel(url) as channel:
            method = channel.unary_unary(METHOD)

            async def call(body: bytes) -> bytes:
                answer: bytes = await method(body, timeout=TIMEOUT_S)
                if items_of(answer) != right[body] and not DEGRADED.search(answer):  # ``offer`` counts those
                    if STORE_AWAY not in texts_of(answer, contract.STATUS)[0]:
                        self.wrong.append((answer, right[body]))
                        raise CallError(self.WRONG)
                    self.without_store += 1
                return answer

            self.records = await offer(call, self.due_s, chosen)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()


def figures(records: list[Any], slo_ms: float, at_s: float) -> dict[str, Any]:
    """Of one run with a fault at ``at_s``: latencies in ms from the moment due."""
    due, ms = np.array([r[0] for r in records]), np.array([(r[2] - r[0]) * 1000 for r in records])
    good = np.array([r[3] == "" for r in records]) & (ms <= slo_ms)
    outside = (due < at_s) | (due > at_s + WINDOW_S)
    bad_after = due[~good & (due >= at_s)]
    errors = Counter(r[3] for r in records if r[3] not in ("",))
    return {
        "requests": len(records), "wrong": errors.pop(Load.WRONG, 0), "refused": dict(errors),
        "in_time": round(float(good.mean()), 5), "in_time_outside": round(float(good[outside].mean()), 5),
        "p50_ms": round(float(np.percentile(ms, 50)), 1), "p99_ms": round(float(np.percentile(ms[outside], 99)), 1),
        "last_bad_s": round(float(bad_after.max() - at_s), 2) if len(bad_after) else 0.0,
    }  # fmt: skip


def filled(stack: contextlib.ExitStack, run: Run) -> ValkeyServer:
    """A Valkey with the run's store, until the stack ends."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "valkey"
    server = stack.enter_context(ValkeyServer(folder, "--appendonly", "yes", "--appendfsync", "always"))
    with end_of(run.feature_store) as source, end_of(server.url) as target:
        copied(source, target, False, lambda text: None)
    return server


def wait_well(fleet: Fleet) -> None:
    deadline = time.monotonic() + 60
    while not (fleet.ready and all(r.watchdog.health.ready for r in fleet.replicas)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not well again: {fleet.report()}")
        time.sleep(0.1)


def main(
    root: Annotated[Path, typer.Argument(help="a compiled run, such as artifacts/shop")],
    replicas: Annotated[int, typer.Option(min=1)] = 3,
    qps: Annotated[float, typer.Option(help="offered requests a second")] = 60.0,
    slo: Annotated[float, typer.Option(help="ms within which a request must be answered")] = 100.0,
    seconds: Annotated[float, typer.Option(help="of each run", min=AT_S + STOPPED_S + 2)] = 20.0,
    profile: str = "fused",
    only: Annotated[str, typer.Option(help="faults by their names, by commas")] = "",
    store: Annotated[str, typer.Option(help="lmdb or valkey")] = "lmdb",
    seed: int = 7,
) -> None:
    if store not in ("lmdb", "valkey"):
        raise typer.BadParameter(f"expected lmdb or valkey, got {store!r}", param_hint="--store")
    rng, run, shared = random.Random(seed), Run(root), store == "valkey"
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        copy = copy_of(run, Path(folder) / "run")
        sent = list(dict.fromkeys(messages(root, stored=shared)))[:200]
        valkey = filled(stack, copy) if shared else None
        url_of_store = f"{valkey.url}?limit_ms=50" if valkey is not None else ""
        options = on_free_ports(copy.repository, profile, copy.server_log, guard=True, store=url_of_store)
        rows = {}
        with Fleet(options, lambda text: print(text, flush=True), replicas) as fleet:
            wait_well(fleet)
            server = fleet.replicas[0].server
            url = f"{server.address}:{server.grpc_port}"
            with grpc.insecure_channel(url) as channel:
                method = channel.unary_unary(METHOD)
                expected = [items_of(method(body, timeout=TIMEOUT_S)) for body in sent]
            with Events(f"{server.address}:{server.http_port}") as events:
                for name, fault in (faults_of_store(valkey) if valkey else faults(fleet, copy, rng)).items():
                    if only and name not in only.split(","):
                        continue
                    with Load(url, sent, expected, due_times("poisson", qps, seconds, seed)) as load:
                        time.sleep(AT_S + 0.05)
                        fault()
                    rows[name] = figures(load.records, slo, AT_S) | {"without_store": load.without_store}
                    console.print(name, rows[name])
                    wait_well(fleet)
        kept = ValkeyStore(Address.parse(valkey.url)) if valkey else LmdbStore(copy.feature_store, readonly=True)
        lost = lost_events(kept, events)
        kept.close()
    table = Table(
        "fault", "requests", "wrong", "refused", "without store", f"in {slo:g} ms, outside 2 s", "p50 ms", "p99 ms",
        "last bad s",
    )  # fmt: skip
    for name, r in rows.items():
        refused = str(sum(r["refused"].values()))
        table.add_row(
            name, str(r["requests"]), str(r["wrong"]), refused, str(r["without_store"]), f"{r['in_time_outside']:.2%}",
            f"{r['p50_ms']:.1f}", f"{r['p99_ms']:.1f}", f"{r['last_bad_s']:.1f}",
        )  # fmt: skip
    console.print(table)
    print(
        record_line(
            "faults", data=root.name, store=store, replicas=replicas, profile=profile, qps=qps, slo_ms=slo,
            seconds=seconds, seed=seed, faults=rows, acknowledged=len(events.acknowledged["fault"]), lost=lost,
            load=[round(n, 1) for n in os.getloadavg()],
        )
    )  # fmt: skip
    if lost or any(r["wrong"] for r in rows.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
