"""What assignment, the log of impressions, metrics and copies cost those who are served, in turns on one machine.

    python -m benchmarks.rollout_cost artifacts/shop --turns 20

Three guarded fleets of the same version stand beside each other and take the same requests at the same rate, one after
the other, each turn beginning with another: ``plain``; ``control``, which is the same; ``kept``, which logs
impressions, deals its users by a hash (a version is on trial for so few that it gets nobody), samples answers and
compares, judges each second and has its pages of metrics read each second. In a second part ``kept`` alone takes parts
without copies, with a copy of ``--copies`` of its calls for the version on trial, which has a lower priority, and
without once more as the control. p50 of the callers, and processor time a request of all processes that serve them,
without the one on trial; figures are ratios within a turn. It works on copies of the run. The last line of stdout is
one JSON object.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
import urllib.request
import uuid
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from prometheus_client import generate_latest
from rich.console import Console
from tritonclient.grpc import service_pb2

from benchmarks.fault_kinds import copy_of, published_again, wait_well
from benchmarks.fault_load import Load, answers_of
from benchmarks.tables import record_line
from benchmarks.turns import in_turns, spread, with_spread
from loadtest.generate.arrivals import due_times
from loadtest.generate.generator import messages
from loadtest.generate.local_server import on_free_ports
from serving.acceptance import Acceptance
from serving.door.rollout import Split
from serving.fleet import Fleet
from serving.judgement import Plan
from serving.rollout import Rollout
from vivace.machine import processor_seconds
from vivace.run import Run

PLAIN, CONTROL, KEPT = "plain", "control", "kept"
WITHOUT, COPIES, AGAIN = "no copies", "copies", "no copies again"
FEW = 1e-6  # share of the users on trial: their hashes are looked at, and nobody is of them
EVERY_S = 15.0  # between two files of impressions, four times as often as a server's: a part has its share of them
LOOK_S, WARM_S = 1.0, 2.0
console = Console(width=120)


def _comparison_s() -> float:
    """Processor seconds of the threads here that compare answers; what offers the load is in this process too."""
    ids = {thread.native_id for thread in threading.enumerate() if thread.name == "comparison"}
    return sum(t.user_time + t.system_time for t in psutil.Process().threads() if t.id in ids)


@dataclass
class Served:
    """A fleet under measurement; ``rollout`` of the one that keeps records."""

    fleet: Fleet
    sent: list[bytes]
    expected: list[tuple[bytes, ...]]
    rollout: Rollout | None = None

    @property
    def url(self) -> str:
        server = self.fleet.replicas[0].server
        return f"{server.address}:{server.grpc_port}"

    def spent_s(self) -> dict[str, float]:
        """Processor seconds until now of those that answer callers: the guard, the servers, and of this process what a
        trial takes."""
        trial = set() if self.fleet.trial is None else self.fleet.trial.server.processes()
        door = set() if self.fleet.door is None else {self.fleet.door.pid}
        return {
            "guard": processor_seconds(door), "servers": processor_seconds(self.fleet.processes() - trial - door),
            "supervisor": time.thread_time() + _comparison_s(),
        }  # fmt: skip

    def look(self) -> None:
        """What a fleet with a trial does each second."""
        if self.rollout is None:
            return
        self.rollout.look()
        if self.rollout.result:
            raise RuntimeError(f"the trial ended: {self.rollout.result}")
        generate_latest(self.fleet.registry)
        server = self.fleet.replicas[0].server
        with urllib.request.urlopen(f"http://{server.address}:{server.metrics_port}/metrics", timeout=10) as page:
            page.read()

    def part(self, qps: float, seconds: float, seed: int) -> dict[str, float]:
        """p50 in ms, and processor time a request in ms, together and of each kind of process."""
        due = due_times("poisson", qps, seconds, seed)
        before = self.spent_s()
        with Load(self.url, self.sent, self.expected, due) as load:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                time.sleep(min(LOOK_S, max(until - time.monotonic(), 0)))
                self.look()
        spent = {f"{who}_ms": 1000 * (now - before[who]) / len(due) for who, now in self.spent_s().items()}
        if load.wrong or load.refusals:
            raise RuntimeError(f"{len(load.wrong)} wrong answers; refused: {dict(load.refusals)}")
        waits = [1000 * (record[2] - record[0]) for record in load.records]
        return {"p50_ms": float(np.median(waits)), "processor_ms": sum(spent.values()), **spent}


def _begin(stack: contextlib.ExitStack, run: Run, profile: str, kept: bool, shadow: float) -> Served:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    copy, bodies = copy_of(run, folder / "run"), list(dict.fromkeys(messages(run.root)))[:200]
    ids = (service_pb2.ModelInferRequest(id=uuid.uuid4().hex).SerializeToString() for _ in bodies)
    sent = [body + named for body, named in zip(bodies, ids, strict=True)]  # copies are compared by the call's id
    release = copy.repository.resolve()
    options = on_free_ports(release, profile, copy.server_log, guard=True, impressions=kept,
                            impressions_every_s=EVERY_S)  # fmt: skip
    fleet = stack.enter_context(Fleet(options, lambda text: None))
    wait_well(fleet)
    served = Served(fleet, sent, [])
    served.expected = answers_of(served.url, sent)
    if kept:
        plan = Plan(version=1 + int(release.name.rpartition(".")[2]), salt="cost", shares=(0.0, FEW), shadow=shadow,
                    wait_s=1e6, drift=0)  # fmt: skip
        served.rollout = Rollout(fleet, plan, lambda text: None)
        served.rollout.start(published_again(copy), Acceptance([]), lambda text: None)
        stack.callback(served.rollout.stop, "measured")
    return served


def _copies(served: Served, share: float) -> None:
    """From now on that share of the calls is copied."""
    assert served.fleet.door is not None and served.rollout is not None
    served.fleet.door.split(Split("cost", FEW, FEW), share)


def _ratios(figures: dict[str, list[dict[str, float]]], to: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for what in ("guard_ms", "servers_ms", "supervisor_ms"):
        result[what] = {name: spread([figure[what] for figure in turns]) for name, turns in figures.items()}
        console.print(what, {name: with_spread(figure, 3) for name, figure in result[what].items()})
    for what in ("p50_ms", "processor_ms"):
        base = [figure[what] for figure in figures[to]]
        result[what] = {
            name: spread([figure[what] for figure in turns]) | {
                "ratio": spread([figure[what] / one for figure, one in zip(turns, base, strict=True)])
            }
            for name, turns in figures.items()
        }  # fmt: skip
        for name in figures:
            console.print(f"{what} {name}: {with_spread(result[what][name], 3)}, times {to}: "
                          f"{with_spread(result[what][name]['ratio'], 3)}")  # fmt: skip
    return result


def main(
    root: Annotated[Path, typer.Argument(help="a compiled run, such as artifacts/shop")],
    turns: int = 20,
    qps: Annotated[float, typer.Option(help="offered requests a second")] = 100.0,
    seconds: Annotated[float, typer.Option(help="of one part")] = 4.0,
    copies: Annotated[float, typer.Option(help="share of the calls of which the version on trial gets a copy")] = 0.1,
    profile: str = "fused",
) -> None:
    run = Run(root)
    with contextlib.ExitStack() as stack:
        fleets = {name: _begin(stack, run, profile, name == KEPT, copies) for name in (PLAIN, CONTROL, KEPT)}
        _copies(fleets[KEPT], 0.0)
        for served in fleets.values():
            served.part(qps, WARM_S, 0)
        figures = defaultdict[str, list[dict[str, float]]](list)
        for turn, name in in_turns(turns, tuple(fleets)):
            figures[name].append(fleets[name].part(qps, seconds, turn + 1))
        kept = _ratios(figures, PLAIN)
        figures.clear()
        for turn, name in in_turns(turns, (WITHOUT, COPIES, AGAIN)):
            _copies(fleets[KEPT], copies * (name == COPIES))
            figures[name].append(fleets[KEPT].part(qps, seconds, turn + 1))
        copied = _ratios(figures, WITHOUT)
        rollout = fleets[KEPT].rollout
        compared = rollout.state()["compared"]["copies"]["compared"] if rollout is not None else 0
    console.print(f"{compared} copies were compared")
    print(record_line("cost of a rollout", data=root.name, profile=profile, turns=turns, qps=qps, seconds=seconds,
                      share_of_copies=copies, copies_compared=compared, kept=kept, copies=copied))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
