"""What each fault costs callers of several servers behind one door: open load, one fault after the other.

    python -m benchmarks.faults artifacts/shop --replicas 3 --qps 60 --slo 100 --seconds 20
    python -m benchmarks.faults artifacts/shop --replicas 3 --qps 60 --slo 100 --store valkey

Recorded requests come at random (Poisson) over gRPC, whatever became of those before; a thread appends events over
HTTP. Four seconds into each run the fault comes: a killed tritonserver, a killed worker, a server that is stopped for
ten seconds, all of them for three, the killed guard. With ``--store lmdb`` another version takes the place of the
served one too, and back. With ``--store valkey`` the servers share a Valkey that writes each event to its disk
(``appendfsync always``), requests name users alone, and the Valkey is started again, killed, stopped for three seconds,
and has no memory left for eight. Every answer is compared with that at rest; one whose STATUS says that the store is
away may be another, and is counted apart. At the end the store is compared with what was acknowledged.

A figure a fault: the share of requests answered right within ``--slo`` outside the two seconds after it (five where
nobody is left who could answer), the refused, and when the last bad one was due. Without ``--qps`` the knee is sought
first, and ``--load`` of it is offered. It works on a copy of the run. The last line of stdout is one JSON object; where
an answer was wrong, an acknowledged event is lost or a refusal says nothing, it exits with 1.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.deaths import lost_events
from benchmarks.fault_kinds import (
    STOPPED_S,
    Fault,
    copy_of,
    faults_of_servers,
    faults_of_store,
    faults_of_versions,
    filled,
    wait_well,
)
from benchmarks.fault_load import Events, Load, answers_of, figures
from benchmarks.knees import seek
from loadtest.generate.arrivals import due_times
from loadtest.generate.generator import messages, run as offered
from loadtest.generate.local_server import grpc_address, on_free_ports
from loadtest.reports.record import record_line
from serving.fleet import Fleet
from vivace.run import Run
from vivace.store.lmdb_store import LmdbStore
from vivace.store.remote.address import Address
from vivace.store.remote.store import ValkeyStore

AT_S, NORMAL_S = 4.0, 5.0
WARM_S = 5.0  # of load before the first run
KNEE_S = 6.0  # of each rate that is tried
IN_TIME = 0.999
NONE = "none"
console = Console(width=160)


def one_fault(fault: Fault, load: Load, events: Events, slo_ms: float) -> dict[str, Any]:
    """Figures of a run in which the fault comes after ``AT_S``."""
    began = time.monotonic()
    with load:
        time.sleep(AT_S + 0.05)
        at = time.monotonic()
        fault.do()
    row = figures(load, slo_ms, AT_S, fault.window_s)
    return row | {"events": events.since(began, at), "window_s": fault.window_s}


def knee_of(fleet: Fleet, url: str, sent: list[bytes], slo_ms: float) -> float:
    """Requests a second that the fleet answers in time."""
    pid = fleet.replicas[0].server.pid
    send = lambda due, pool: offered(url, pool, due, KNEE_S, slo_ms)  # noqa: E731
    return seek(send, pid, sent, KNEE_S, 1).rate


def table_of(rows: dict[str, dict[str, Any]], slo_ms: float) -> Table:
    table = Table(
        "fault", "requests", "wrong", "refused", "without store", f"in {slo_ms:g} ms outside", "p50, p99 ms",
        "last bad s", "events", "refused", "last refused s",
    )  # fmt: skip
    for name, r in rows.items():
        events = r["events"]
        table.add_row(
            name, str(r["requests"]), str(r["wrong"]), str(sum(r["refused"].values())), str(r["without_store"]),
            f"{r['in_time_outside']:.2%}", f"{r['p50_ms']:.1f}, {r['p99_ms']:.1f}", f"{r['last_bad_s']:.1f}",
            str(events["sent"]), str(events["refused"]), f"{events['last_refused_s']:.1f}",
        )  # fmt: skip
    return table


def missed(rows: dict[str, dict[str, Any]]) -> list[str]:
    """What is not as it should be, fault by fault: ``IN_TIME``, and back to normal within ``NORMAL_S``."""
    seen = []
    for name, r in rows.items():
        if r["in_time_outside"] < IN_TIME:
            seen.append(f"{name}: {r['in_time_outside']:.2%} in time outside its window")
        if r["last_bad_s"] > NORMAL_S and name != NONE:
            seen.append(f"{name}: a bad answer {r['last_bad_s']:.1f} s after it")
    return seen


def main(
    root: Annotated[Path, typer.Argument(help="a compiled run, such as artifacts/shop")],
    replicas: Annotated[int, typer.Option(min=1)] = 3,
    qps: Annotated[float, typer.Option(help="offered requests a second; 0: --load of the knee")] = 0.0,
    load: Annotated[float, typer.Option(help="share of the knee that is offered", min=0, max=1)] = 0.6,
    slo: Annotated[float, typer.Option(help="ms within which a request must be answered")] = 100.0,
    seconds: Annotated[float, typer.Option(help="of each run", min=AT_S + STOPPED_S + 1)] = 20.0,
    profile: str = "fused",
    only: Annotated[str, typer.Option(help="faults by the beginnings of their names, by commas")] = "",
    store: Annotated[str, typer.Option(help="lmdb or valkey")] = "lmdb",
    seed: int = 7,
) -> None:
    if store not in ("lmdb", "valkey"):
        raise typer.BadParameter(f"expected lmdb or valkey, got {store!r}", param_hint="--store")
    rng, run, shared = random.Random(seed), Run(root), store == "valkey"
    rows: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        copy = copy_of(run, Path(folder) / "run")
        sent = list(dict.fromkeys(messages(root, stored=shared)))[:200]
        valkey = filled(stack, copy) if shared else None
        url_of_store = f"{valkey.url}?limit_ms=50" if valkey is not None else ""
        options = on_free_ports(copy.repository, profile, copy.server_log, guard=True, store=url_of_store)
        with Fleet(options, lambda text: print(text, flush=True), replicas) as fleet:
            wait_well(fleet)
            server = fleet.replicas[0].server
            url = grpc_address(server)
            expected = answers_of(url, sent)
            knee = 0.0 if qps else knee_of(fleet, url, sent, slo)
            rate = qps or load * knee
            console.print(f"{rate:.0f} requests a second" + (f", {load:.0%} of the knee" if knee else ""))
            kinds = {NONE: Fault(lambda: None)} | faults_of_servers(fleet, rng)
            kinds |= faults_of_store(valkey) if valkey is not None else faults_of_versions(fleet, copy)
            with Load(url, sent, expected, due_times("poisson", rate, WARM_S, seed + 1)):
                pass
            with Events(f"{server.address}:{server.http_port}") as events:
                for name, fault in kinds.items():
                    if only and not name.startswith(tuple(only.split(","))):
                        continue
                    offering = Load(url, sent, expected, due_times("poisson", rate, seconds, seed))
                    rows[name] = one_fault(fault, offering, events, slo)
                    console.print(name, rows[name])
                    wait_well(fleet)
        kept = ValkeyStore(Address.parse(valkey.url)) if valkey else LmdbStore(copy.feature_store, readonly=True)
        lost = lost_events(kept, events)
        kept.close()
    console.print(table_of(rows, slo))
    for line in missed(rows):
        console.print(line)
    print(
        record_line(
            "faults", data=root.name, store=store, replicas=replicas, profile=profile, qps=round(rate, 1),
            knee=round(knee, 1), slo_ms=slo, seconds=seconds, seed=seed, faults=rows, missed=missed(rows),
            acknowledged=len(events.acknowledged["fault"]), lost=lost, load=[round(n, 1) for n in os.getloadavg()],
        )
    )  # fmt: skip
    bad = any(r["wrong"] or r["unclear"] or r["events"]["unclear"] for r in rows.values())
    if lost or bad:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
