"""Open-loop load: requests are sent when they are due, whatever became of those before them.

    python -m loadtest.generate.open_loop artifacts/ml-1m --slo 20 --url 127.0.0.1:8001      # find the knee
    python -m loadtest.generate.open_loop artifacts/ml-1m --slo 20 --qps 300 --arrivals burst  # one run

Latency counts from the moment a request was due, so a server that pauses shows the pause in the tail of everyone who
would have waited (no coordinated omission; G. Tene, "How NOT to Measure Latency"). Requests are those that the run
recorded; users return as ``--repeat`` says. The SLO is met by a request that is answered in time; attainment is the
share of all requests due that met it, goodput those a second, the knee the largest offered rate at which 99 % are
answered in time and at full quality (not degraded for load). The last line of stdout is one JSON object; ``--report``
writes an HTML page.
"""

from __future__ import annotations

import asyncio
import json
import re
import selectors
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import grpc
import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from tritonclient.grpc import service_pb2
from tritonclient.utils import serialize_byte_tensor

from loadtest.reports.html import drawn, image, page, table
from preprocessing.requests import recorded
from vivace import contract
from vivace.client import request_tensors
from vivace.machine import cpu
from vivace.manifest import commit

T = TypeVar("T")
METHOD = "/inference.GRPCInferenceService/ModelInfer"
ARRIVALS = ("poisson", "constant", "burst", "diurnal")
WANTED = 0.99  # attainment at the knee
BURST, PERIOD_S = 4.0, 5.0  # a fifth of each period comes at four times the rate of the rest

# what STATUS says of an answer that a loaded server made cheaper
DEGRADED = re.compile(rb"load: (?:\d+ of \d+ candidates|retrieval order|popular items)")
CODE_DEGRADED = "degraded"

console = Console(width=120)


def due_times(kind: str, qps: float, seconds: float, seed: int, recorded_ms: Sequence[int] = ()) -> np.ndarray:
    """Seconds from the start at which requests are due, float64, rising. "diurnal": recorded times, squeezed into
    ``seconds`` and thinned or repeated to ``qps``. Raises ValueError for another kind."""
    rng, count = np.random.default_rng(seed), max(1, round(qps * seconds))
    if kind == "constant":
        return np.arange(count) / qps
    if kind == "poisson":
        return np.sort(rng.uniform(0, seconds, rng.poisson(qps * seconds) or 1))
    if kind == "burst":
        inside = rng.random(count) < BURST / (BURST + 4)
        offset = np.where(inside, rng.uniform(0, 0.2, count), rng.uniform(0.2, 1, count)) * PERIOD_S
        return np.sort((rng.integers(0, max(1, round(seconds / PERIOD_S)), count) * PERIOD_S + offset) % seconds)
    if kind == "diurnal":
        if len(recorded_ms) < 2:
            raise ValueError("--arrivals diurnal: expected recorded times of at least two events, got fewer")
        times = rng.choice(np.asarray(recorded_ms, float), count)
        low, high = times.min(), max(times.max(), times.min() + 1)
        return np.sort((times - low) / (high - low) * seconds)
    raise ValueError(f"--arrivals: expected one of {ARRIVALS}, got {kind!r}")


def message(model: str, tensors: Sequence[tuple[contract.WireTensor, np.ndarray]]) -> bytes:
    """A serialized ModelInferRequest: made once, sent as it is."""
    request = service_pb2.ModelInferRequest(model_name=model)
    for tensor, value in tensors:
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=value.shape)
        raw = serialize_byte_tensor(value).item() if tensor.datatype == "BYTES" and value.size else value.tobytes()
        request.raw_input_contents.append(raw if value.size else b"")
    return bytes(request.SerializeToString())


def messages(root: Path, top_k: int = 10, stored: bool = False) -> list[bytes]:
    """The recorded requests of a run; ``stored``: by user alone, so that the feature store gives the history."""
    frame = recorded(root)
    rows = zip(frame[contract.USER].tolist(), frame[contract.ITEM].tolist(), strict=True)
    return [message(contract.ENSEMBLE, request_tensors(u, [] if stored else list(h), top_k)) for u, h in rows]


def picks(count: int, users: int, repeat: float, seed: int) -> np.ndarray:
    """Which recorded request each due one is, int64 [count]: by a power law of exponent ``repeat`` over the users (0:
    all alike), as a few users make most of the traffic."""
    weights = np.arange(1, users + 1, dtype=float) ** -repeat
    return np.random.default_rng(seed).choice(users, count, p=weights / weights.sum())


@dataclass(frozen=True)
class Run:
    """One run. Latencies in ms from the moment due; ``service`` from the moment sent; ``late``: how far the generator
    itself was behind at p99; ``degraded``: answers that STATUS calls cheaper because of load; ``full``: the share of
    all due that came in time and was none of those."""

    qps: float
    seconds: float
    due: int
    answered: int
    refused: dict[str, int]
    p50: float
    p95: float
    p99: float
    service_p99: float
    late: float
    slo: float
    attainment: float
    goodput: float
    degraded: int
    full: float


def complete(work: Coroutine[Any, Any, T]) -> T:
    """Runs ``work`` in a loop that wakes up when it should: epoll, asyncio's own choice, counts in milliseconds and
    made requests up to two of them late; select counts in microseconds (and takes fewer than 1,024 connections)."""
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        return runner.run(work)


def with_deadline(sent: bytes, left_ms: float) -> bytes:
    """A serialized request that is worth nothing after ``left_ms``. Protobuf messages add up: nothing is parsed."""
    more = service_pb2.ModelInferRequest()
    more.parameters[contract.DEADLINE].int64_param = int(time.time() * 1000 + left_ms)
    more.parameters["timeout"].int64_param = max(1, int(left_ms * 1000))
    return sent + bytes(more.SerializeToString())


class CallError(Exception):
    """A call by another protocol than gRPC that failed; ``code`` names how."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


async def offer(
    call: Callable[[bytes], Awaitable[Any]], due_s: np.ndarray, sent: Sequence[bytes], within_ms: float = 0.0
) -> list[Any]:
    """Sends ``sent[i]`` at ``due_s[i]``; (due, sent, done in seconds from the start, error code, CODE_DEGRADED or
    "") of each. ``within_ms``: each carries a deadline, counted from the moment it was due (0: none does)."""
    start = time.perf_counter() + 0.05
    out: list[Any] = [None] * len(due_s)
    waiting: set[asyncio.Task[None]] = set()

    async def one(i: int) -> None:
        began, code = time.perf_counter() - start, ""
        try:
            what = with_deadline(sent[i], (due_s[i] - began) * 1000 + within_ms) if within_ms else sent[i]
            answer = await call(what)
            if isinstance(answer, bytes) and DEGRADED.search(answer):
                code = CODE_DEGRADED
        except grpc.aio.AioRpcError as error:
            code = error.code().name
        except CallError as error:
            code = error.code
        out[i] = (due_s[i], began, time.perf_counter() - start, code)

    for i, at in enumerate(due_s.tolist()):
        left = start + at - time.perf_counter()
        if left > 0:
            await asyncio.sleep(left)
        elif i % 64 == 0:
            await asyncio.sleep(0)  # behind: answers must be read all the same
        task = asyncio.create_task(one(i))
        waiting.add(task)
        task.add_done_callback(waiting.discard)
    if waiting:
        await asyncio.wait(waiting)
    return out


def summarize(records: Sequence[Any], qps: float, seconds: float, slo_ms: float) -> Run:
    """What a run of ``offer`` was."""
    due, began, done = (np.array([r[k] for r in records]) * 1000 for k in range(3))
    cheaper = np.array([r[3] == CODE_DEGRADED for r in records])
    ok = cheaper | np.array([r[3] == "" for r in records])
    latency = (done - due)[ok] if ok.any() else np.array([np.inf])
    met = ok & (done - due <= slo_ms)
    in_time = int(met.sum())
    p50, p95, p99 = (float(np.percentile(latency, q)) for q in (50, 95, 99))
    refused = Counter(r[3] for r in records if r[3] not in ("", CODE_DEGRADED))
    return Run(
        round(qps, 2), seconds, len(records), int(ok.sum()), dict(refused), p50, p95, p99,
        float(np.percentile((done - began)[ok], 99)) if ok.any() else float("inf"),
        float(np.percentile(began - due, 99)), slo_ms, in_time / len(records), in_time / seconds,
        int(cheaper.sum()), float((met & ~cheaper).mean()),
    )  # fmt: skip


def run(
    url: str, sent: Sequence[bytes], due_s: np.ndarray, seconds: float, slo_ms: float, timeout_s: float = 10.0
) -> Run:
    """Offers ``sent`` at ``due_s`` to the server at ``url``; refusals and timeouts are counted, never raised."""

    async def go() -> list[Any]:
        options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        async with grpc.aio.insecure_channel(url, options) as channel:
            method = channel.unary_unary(METHOD)  # bytes in, bytes out: nothing is parsed
            await method(sent[0], timeout=timeout_s, wait_for_ready=True)
            return await offer(lambda m: method(m, timeout=timeout_s), due_s, sent)

    return summarize(complete(go()), len(due_s) / seconds, seconds, slo_ms)


def knee(measure: Callable[[float], Run], first: float, steps: int = 5, most: float = 100_000.0) -> list[Run]:
    """Runs at doubling rates until ``full`` falls below WANTED, then by halves between; all runs, by rate."""
    found, low, high = [], 0.0, first
    while high <= most:
        found.append(measure(high))
        if found[-1].full < WANTED:
            break
        low, high = high, 2 * high
    for _ in range(steps):
        middle = (low + high) / 2
        found.append(measure(middle))
        low, high = (middle, high) if found[-1].full >= WANTED else (low, middle)
    return sorted(found, key=lambda r: r.qps)


def best(runs: Sequence[Run]) -> Run | None:
    """The largest offered rate that met the SLO before the first that did not."""
    met = None
    for r in sorted(runs, key=lambda r: r.qps):
        if r.full < WANTED:
            break
        met = r
    return met


def picture(runs: Sequence[Run], slo_ms: float) -> bytes:
    def draw(plt: Any) -> Any:
        rates = [r.qps for r in runs]
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
        left.plot(rates, [r.attainment for r in runs], "o-", label="all answers")
        left.plot(rates, [r.full for r in runs], "o-", label="at full quality")
        left.legend()
        left.axhline(WANTED, color="grey", linestyle="--")
        left.set_ylabel(f"share answered within {slo_ms:g} ms")
        for name in ("p50", "p95", "p99"):
            right.plot(rates, [getattr(r, name) for r in runs], "o-", label=name)
        right.axhline(slo_ms, color="grey", linestyle="--")
        right.set_yscale("log")
        right.set_ylabel("ms from the moment due")
        right.legend()
        for axis in (left, right):
            axis.set_xlabel("offered requests a second")
            axis.grid(True, which="both", alpha=0.3)
        return figure

    return drawn(draw)


HEADER = (
    "offered", "answered", "refused", "p50 ms", "p95 ms", "p99 ms", "attainment", "goodput", "degraded",
    "generator late ms",
)  # fmt: skip


def row(r: Run) -> list[str]:
    return [
        f"{r.qps:.0f}", str(r.answered), str(sum(r.refused.values())), f"{r.p50:.1f}", f"{r.p95:.1f}", f"{r.p99:.1f}",
        f"{r.attainment:.2%}", f"{r.goodput:.0f}", str(r.degraded), f"{r.late:.2f}",
    ]  # fmt: skip


def report_page(runs: Sequence[Run], slo_ms: float, title: str) -> str:
    """A self-contained HTML report."""
    met = best(runs)
    said = f"{met.qps:.0f} requests a second" if met else "no rate that was tried"
    return page(title, [
        f"<p>{WANTED:.0%} answered within {slo_ms:g} ms: up to {said}. Latency counts from the moment due.</p>",
        image(picture(runs, slo_ms), "attainment and latency over offered load"),
        table(HEADER, [row(r) for r in runs]),
    ])  # fmt: skip


def main(
    root: Annotated[Path, typer.Argument(help="the served run, artifacts/<name>: where the recorded requests are")],
    url: Annotated[str, typer.Option(help="gRPC address of the server")] = "127.0.0.1:8001",
    slo: Annotated[float, typer.Option(help="ms within which a request must be answered")] = 20.0,
    qps: Annotated[float, typer.Option(help="offered rate (0: find the knee)")] = 0.0,
    arrivals: Annotated[str, typer.Option(help="poisson, constant, burst or diurnal")] = "poisson",
    seconds: Annotated[float, typer.Option(help="of one run")] = 10.0,
    first: Annotated[float, typer.Option(help="rate at which the search begins")] = 50.0,
    repeat: Annotated[float, typer.Option(help="exponent of the users' power law (0: all alike)")] = 0.7,
    stored: Annotated[bool, typer.Option(help="send users alone: histories come from the feature store")] = False,
    report: Annotated[Path | None, typer.Option(help="HTML page to write")] = None,
    seed: int = 7,
) -> None:
    pool = messages(root, stored=stored)
    times: list[int] = []
    if arrivals == "diurnal":
        from vivace.store.lmdb_store import LmdbStore

        store = LmdbStore(root / "feature_store", readonly=True)
        times = [e.timestamp_ms for u, _ in zip(store.users(), range(2000), strict=False) for e in store.events(u)]
        store.close()

    def measure(rate: float) -> Run:
        due = due_times(arrivals, rate, seconds, seed, times)
        chosen = picks(len(due), len(pool), repeat, seed)
        found = run(url, [pool[i] for i in chosen], due, seconds, slo)
        console.print("  ".join(f"{h} {v}" for h, v in zip(HEADER, row(found), strict=True)))
        return found

    runs = [measure(qps)] if qps else knee(measure, first)
    met = best(runs)
    table = Table(*HEADER)
    for r in runs:
        table.add_row(*row(r))
    console.print(table)
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(report_page(runs, slo, f"{root.name}: open-loop load, {arrivals}"), encoding="utf-8")
    print(json.dumps({
        "benchmark": "open loop", "data": root.name, "arrivals": arrivals, "slo_ms": slo, "seed": seed,
        "repeat": repeat, "knee_qps": met.qps if met else None, "runs": [asdict(r) for r in runs],
        "cpu": cpu()[0], "commit": commit(),
    }))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
