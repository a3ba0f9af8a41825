"""What the log of impressions costs a request: one run served with it and without it, in turns, at one rate.

    python -m benchmarks.impressions_cost artifacts/shop --turns 7

Files are written every ``--every`` seconds, far more often than a server does, so that their cost is within the run.
Figures: p50 and the processor time a request of all the server's processes, and the ratio with to without, turn by
turn; as a control, that of a second server without to the first: what the machine itself cannot tell. Beside them the
log's own work in this process: processor time of the queue and of the file, a request of ``--top-k`` items.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.tables import record_line
from benchmarks.turns import in_turns, spread, with_spread
from loadtest.generate.generator import LoadRun, at_rate, messages, run
from loadtest.generate.local_server import grpc_address, on_free_ports
from serving.compared import Compared
from serving.door.rollout import Split
from serving.launcher import TritonServer
from serving.runtime.answer_samples import MOST, AnswerSamples, Listener
from vivace.impressions.files import Part, parts
from vivace.impressions.queue import CHUNK, Shown, folder_of, packed_viewer, table_of
from vivace.run import Run
from vivace.sequential import Plan

SEED, SLO_MS, WARM_S = 7, 1000.0, 1.0
OWN_REQUESTS = 20_000
WITHOUT, WITH, CONTROL = "without", "with", "control"


def _offered(address: str, seconds: float, due: np.ndarray, sent: list[bytes]) -> LoadRun:
    return run(address, sent, due, seconds, SLO_MS)


def measured(
    root: Path, profile: str, logged: bool, top_k: int, qps: float, seconds: float, every: float
) -> tuple[float, float]:
    """(p50 in ms, processor time of a request in ms) of one server under load."""
    pool, repository = messages(root, top_k), Run(root).repository
    options = on_free_ports(repository, profile, impressions=logged, impressions_every_s=every)
    with TritonServer(options) as server:
        for length in (WARM_S, seconds):
            offered = partial(_offered, grpc_address(server), length)
            outcome, processor_ms = at_rate(offered, server.pid, pool, qps, length, SEED)
    if not outcome.answered:
        raise RuntimeError(f"{root.name} {profile or 'default'}: {outcome.refused}")
    if logged and not parts(folder_of(Run(root).feature_store)):
        raise RuntimeError(f"{root.name} {profile or 'default'}: nothing was logged")
    return outcome.p50, processor_ms


def own_work_us(top_k: int) -> dict[str, float]:
    """Microseconds of processor time a request: of what its answer waits for, and of the thread behind it."""
    rng = np.random.default_rng(SEED)
    items = [
        np.array([[f"item-{i:07}".encode() for i in rng.integers(0, 1_000_000, top_k)]], object) for _ in range(99)
    ]
    scores, began = rng.normal(size=(1, top_k)).astype(np.float32), time.process_time()
    shown: list[Shown] = []
    for number in range(OWN_REQUESTS):
        row = packed_viewer((f"user-{number}", "", b'{"device":"phone"}', 1e12, ""))
        shown.append(
            (f"{number:032x}", [row], items[number % len(items)], scores.copy(), [b"ok"], 1e12 + 3, None, None)
        )
    waited = time.process_time() - began
    with tempfile.TemporaryDirectory() as folder:
        import pyarrow as pa

        began = time.process_time()
        tables = [table_of(shown[start : start + CHUNK], "a", "1") for start in range(0, len(shown), CHUNK)]
        Part(Path(folder)).write(pa.concat_tables(tables).combine_chunks())
        behind = time.process_time() - began
    return {"waited_us": 1e6 * waited / OWN_REQUESTS, "thread_us": 1e6 * behind / OWN_REQUESTS} | _sampled_us(shown)


def _sampled_us(shown: list[Shown]) -> dict[str, float]:
    """The same while a version is on trial: of the worker that samples its answers, and of who compares them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answers"
        sampler = AnswerSamples(Listener(str(path), False).to_json())
        listens = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        listens.bind(str(path))
        handed = list[bytes]()
        began = time.process_time()
        for number, answer in enumerate(shown):
            sampler.put(*answer[:7])
            if number % (MOST - 1) == MOST - 2:  # as many as it hands over while all are chosen
                sampler.hand_over(at_once=True)
                handed.append(listens.recv(1 << 20))
        sampled = time.process_time() - began
        listens.close()
        compared = Compared(path, Split("s", 0.1), 2, lambda: None, Plan())  # type: ignore[arg-type,return-value]
        began = time.process_time()
        for raw in handed:
            compared.take(raw)
        behind = time.process_time() - began
    return {"sampled_us": 1e6 * sampled / OWN_REQUESTS, "compared_us": 1e6 * behind / OWN_REQUESTS}


def main(
    root: Annotated[Path, typer.Argument(help="run to serve; its log of impressions is removed")],
    profile: Annotated[list[str], typer.Option(help="may be given again")] = ["", "fused"],  # noqa: B006
    turns: int = 7,
    qps: float = 100.0,
    seconds: float = 8.0,
    top_k: int = 10,
    every: Annotated[float, typer.Option(help="seconds between two files")] = 2.0,
) -> None:
    own = own_work_us(top_k)
    print(", ".join(f"{name} {value:.1f}" for name, value in own.items()), flush=True)
    systems = [(p, how) for p in profile for how in (WITHOUT, WITH, CONTROL)]
    p50, processor = defaultdict[tuple[str, str], list[float]](list), defaultdict[tuple[str, str], list[float]](list)
    for turn, (p, how) in in_turns(turns, systems):
        figures = measured(root, p, how == WITH, top_k, qps, seconds, every)
        p50[p, how].append(figures[0])
        processor[p, how].append(figures[1])
        print(f"turn {turn + 1} {p or 'default':8} {how:8} p50 {figures[0]:.2f} ms, processor {figures[1]:.3f} ms",
              flush=True)  # fmt: skip
    result = {}
    for p in profile:
        for what, of in (("p50", p50), ("processor time", processor)):
            figure: dict[str, Any] = {f"{how}_ms": spread(of[p, how]) for how in (WITHOUT, WITH, CONTROL)}
            for how in (WITH, CONTROL):
                ratios = [b / a for a, b in zip(of[p, WITHOUT], of[p, how], strict=True)]
                figure[f"ratio of {how}"] = spread(ratios)
                print(f"{p or 'default'}, {what}, {how}: {with_spread(spread(ratios), 3)} times")
            result[f"{p or 'default'}, {what}"] = figure
    shutil.rmtree(folder_of(Run(root).feature_store), ignore_errors=True)
    print(record_line("cost of the log of impressions", turns=turns, qps=qps, every_s=every, own=own, results=result))


if __name__ == "__main__":
    typer.run(main)
