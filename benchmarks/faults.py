"""What each fault costs callers of several servers behind one door: open load, one fault after the other.

    python -m benchmarks.faults artifacts/shop --replicas 3 --qps 60 --slo 100 --seconds 20
    python -m benchmarks.faults artifacts/shop --replicas 3 --qps 60 --slo 100 --store valkey --machines 3

Recorded requests come at random (Poisson) over gRPC, whatever became of those before; a thread appends events over
HTTP. Four seconds into each run the fault comes: a killed tritonserver, a killed worker, a server that is stopped for
ten seconds, all of them for three, the killed guard. With ``--store lmdb`` another version takes the place of the
served one too, and back. With ``--store valkey`` the servers share a Valkey that writes each event to its disk
(``appendfsync always``), requests name users alone, and the Valkey is started again, killed, stopped for three seconds,
and has no memory left for eight. With ``--machines`` as many servers follow in network namespaces of their own behind a
door over hosts: the network of one is cut for ten seconds, its way to the Valkey too, and one is stopped and started.
Every answer is compared with that at rest; one whose STATUS says that the store is away may be another, and is counted
apart. At the end the store is compared with what was acknowledged.

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
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.deaths import lost_events
from benchmarks.fault_hosts import CUT_S, NETWORK, Machine, machines as started_machines
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
from benchmarks.fault_load import Events, Outcome, answers_of, figures
from benchmarks.knees import seek
from benchmarks.load_process import LoadProcess
from benchmarks.local_valkey import ValkeyServer
from loadtest.generate.arrivals import due_times
from loadtest.generate.generator import messages, run as offered
from loadtest.generate.local_server import grpc_address, on_free_ports
from loadtest.reports.record import record_line
from serving.door.hosts import Upstream, parse_hosts
from serving.fleet import Fleet
from serving.hosts import HostsDoor, HostsDoorOptions
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


def one_fault(fault: Fault, load: AbstractContextManager[Outcome], events: Events, slo_ms: float) -> dict[str, Any]:
    """Figures of a run in which the fault comes after ``AT_S``."""
    began = time.monotonic()
    with load as outcome:
        time.sleep(AT_S + 0.05)
        at = time.monotonic()
        fault.do()
    row = figures(outcome, slo_ms, AT_S, fault.window_s)
    return row | {"events": events.since(began, at), "window_s": fault.window_s}


@dataclass
class Trial:
    """What is offered: bodies ``sent`` at ``rate`` a second. ``only``: beginnings of the names of faults."""

    sent: list[bytes]
    rate: float
    slo_ms: float
    seconds: float
    only: tuple[str, ...]
    seed: int

    def over(
        self, grpc: str, http: str, kinds: dict[str, Fault], well: Callable[[], None], expected: list[tuple[bytes, ...]]
    ) -> tuple[dict[str, dict[str, Any]], Events]:
        """Figures of each fault at a server's addresses, and the events of all. ``well`` waits until all is well."""
        rows = {}
        with LoadProcess(grpc, self.sent, expected) as load, Events(http) as events:
            with load.run(due_times("poisson", self.rate, WARM_S, self.seed + 1)):
                pass
            for name, fault in kinds.items():
                if self.only and not name.startswith(self.only):
                    continue
                due_s = due_times("poisson", self.rate, self.seconds, self.seed)
                rows[name] = one_fault(fault, load.run(due_s), events, self.slo_ms)
                console.print(name, rows[name])
                well()
        return rows, events


def knee_of(grpc: str, pid: int, sent: list[bytes], slo_ms: float) -> float:
    """Requests a second that a server answers in time."""
    send = lambda due, pool: offered(grpc, pool, due, KNEE_S, slo_ms)  # noqa: E731
    return seek(send, pid, sent, KNEE_S, 1).rate


def over_machines(trial: Trial, copy: Run, count: int, valkey: ValkeyServer, profile: str) -> tuple[dict, Events]:
    """The same of servers in namespaces behind a door over hosts."""
    store = f"valkey://{NETWORK}.1:{valkey.port}/0?limit_ms=50"
    rng = random.Random(trial.seed)
    with contextlib.ExitStack() as stack:
        there = stack.enter_context(started_machines(copy.root, count, store, profile))
        hosts = parse_hosts(",".join(m.address for m in there))
        options = HostsDoorOptions(upstream=Upstream(hosts=hosts), http_port=0, grpc_port=0, metrics_port=0)
        door = stack.enter_context(HostsDoor(options, print))

        def well() -> None:
            deadline = time.monotonic() + 60
            while not (all(door.door.well().values()) and all(m.ready() for m in there)):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not well again: {door.door.well()}")
                time.sleep(0.1)

        def one(do: Callable[[Machine], None]) -> Fault:
            return Fault(lambda: do(rng.choice(there)))

        well()
        kinds = {
            "hosts: none": Fault(lambda: None),
            f"hosts: network cut for {CUT_S:.0f} s": one(lambda machine: machine.cut()),
            f"hosts: way to the Valkey cut for {CUT_S:.0f} s": one(lambda machine: machine.cut_off(valkey.port)),
            "hosts: stopped by SIGTERM": one(lambda machine: machine.restart()),
        }
        o = door.options
        grpc = f"{o.host}:{o.grpc_port}"
        return trial.over(grpc, f"{o.host}:{o.http_port}", kinds, well, answers_of(grpc, trial.sent))


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


def lost_of(kept: LmdbStore | ValkeyStore, events: list[Events]) -> list[str]:
    """What was acknowledged and is not in the store once and in order; senders have a user each."""
    with contextlib.closing(kept):
        return [fault for sender in events for fault in lost_events(kept, sender)]


def main(
    root: Annotated[Path, typer.Argument(help="a compiled run, such as artifacts/shop")],
    replicas: Annotated[int, typer.Option(min=1)] = 3,
    machines: Annotated[int, typer.Option(help="servers in network namespaces, with --store valkey", min=0)] = 0,
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
    if machines and store != "valkey":
        raise typer.BadParameter("expected --store valkey with it, which the machines share", param_hint="--machines")
    shared = store == "valkey"
    with contextlib.ExitStack() as stack:
        copy = copy_of(Run(root), Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run")
        sent = list(dict.fromkeys(messages(root, stored=shared)))[:200]
        open_ = ("--bind", "0.0.0.0", "--protected-mode", "no") if machines else ()
        valkey = filled(stack, copy, *open_) if shared else None
        url_of_store = f"{valkey.url}?limit_ms=50" if valkey is not None else ""
        options = on_free_ports(copy.repository, profile, copy.server_log, guard=True, store=url_of_store)
        trial = Trial(sent, qps, slo, seconds, tuple(filter(None, only.split(","))), seed)
        rows, senders, knee = dict[str, dict[str, Any]](), list[Events](), 0.0
        if replicas and not only.startswith("hosts"):
            with Fleet(options, lambda text: print(text, flush=True), replicas) as fleet:
                wait_well(fleet)
                server = fleet.replicas[0].server
                grpc = grpc_address(server)
                expected = answers_of(grpc, sent)
                if not qps:
                    knee = knee_of(grpc, server.pid, sent, slo)
                    trial.rate = load * knee
                console.print(f"{trial.rate:.0f} requests a second" + (f", {load:.0%} of {knee:.0f}" if knee else ""))
                kinds = {NONE: Fault(lambda: None)} | faults_of_servers(fleet, random.Random(seed))
                kinds |= faults_of_store(valkey) if valkey is not None else faults_of_versions(fleet, copy)
                http = f"{server.address}:{server.http_port}"
                rows, events = trial.over(grpc, http, kinds, lambda: wait_well(fleet), expected)
                senders.append(events)
        if valkey is not None and machines:
            more, events = over_machines(trial, copy, machines, valkey, profile)
            rows |= more
            senders.append(events)
        kept = ValkeyStore(Address.parse(valkey.url)) if valkey else LmdbStore(copy.feature_store, readonly=True)
        lost = lost_of(kept, senders)
    console.print(table_of(rows, slo))
    for line in missed(rows):
        console.print(line)
    acknowledged = sum(len(of) for sender in senders for of in sender.acknowledged.values())
    print(
        record_line(
            "faults", data=root.name, store=store, replicas=replicas, machines=machines, profile=profile,
            qps=round(trial.rate, 1), knee=round(knee, 1), slo_ms=slo, seconds=seconds, seed=seed, faults=rows,
            missed=missed(rows), acknowledged=acknowledged, lost=lost, load=[round(n, 1) for n in os.getloadavg()],
        )
    )  # fmt: skip
    if lost or any(r["wrong"] or r["unclear"] or r["events"]["unclear"] for r in rows.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
