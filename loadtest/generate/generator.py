"""The open-loop generator: sends requests when they are due, whatever became of those before them, and counts.

Latency counts from the moment a request was due, so a server that pauses shows the pause in the tail of everyone who
would have waited (no coordinated omission; G. Tene, "How NOT to Measure Latency"). The SLO is met by a request that is
answered in time; attainment is the share of all requests due that met it, goodput those a second, the knee the largest
offered rate at which 99 % are answered in time and at full quality (not degraded for load).
"""

from __future__ import annotations

import asyncio
import re
import selectors
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
from tritonclient.grpc import service_pb2
from tritonclient.utils import serialize_byte_tensor

from loadtest.generate.arrivals import REPEAT, due_times, picks
from preprocessing.requests import recorded, requests_of
from vivace import contract
from vivace.client_request import request_tensors
from vivace.credentials import Credentials
from vivace.machine import processor_seconds

T = TypeVar("T")
METHOD = "/inference.GRPCInferenceService/ModelInfer"
ATTAINED = 0.99  # least share of whole answers in time at the knee

# what STATUS says of an answer that a loaded server made cheaper
DEGRADED = re.compile(rb"load: (?:\d+ of \d+ candidates|retrieval order|popular items)")
CODE_DEGRADED = "degraded"


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
    return [
        message(contract.ENSEMBLE, request_tensors(r.user, [] if stored else r.history, top_k, context=r.context))
        for r in requests_of(recorded(root))
    ]


@dataclass(frozen=True)
class LoadRun:
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
            body = with_deadline(sent[i], (due_s[i] - began) * 1000 + within_ms) if within_ms else sent[i]
            answer = await call(body)
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


def summarize(records: Sequence[Any], qps: float, seconds: float, slo_ms: float) -> LoadRun:
    """What a run of ``offer`` was."""
    due, began, done = (np.array([r[k] for r in records]) * 1000 for k in range(3))
    cheaper = np.array([r[3] == CODE_DEGRADED for r in records])
    ok = cheaper | np.array([r[3] == "" for r in records])
    latency = (done - due)[ok] if ok.any() else np.array([np.inf])
    met = ok & (done - due <= slo_ms)
    in_time = int(met.sum())
    p50, p95, p99 = (float(np.percentile(latency, q)) for q in (50, 95, 99))
    refused = Counter(r[3] for r in records if r[3] not in ("", CODE_DEGRADED))
    return LoadRun(
        round(qps, 2), seconds, len(records), int(ok.sum()), dict(refused), p50, p95, p99,
        float(np.percentile((done - began)[ok], 99)) if ok.any() else float("inf"),
        float(np.percentile(began - due, 99)), slo_ms, in_time / len(records), in_time / seconds,
        int(cheaper.sum()), float((met & ~cheaper).mean()),
    )  # fmt: skip


def run(
    url: str, sent: Sequence[bytes], due_s: np.ndarray, seconds: float, slo_ms: float, timeout_s: float = 10.0
) -> LoadRun:
    """Offers ``sent`` at ``due_s`` to the server at ``url``; refusals and timeouts are counted, never raised. A key and
    TLS come from the environment (``vivace.credentials``)."""

    async def go() -> list[Any]:
        access = Credentials()
        key = tuple((access.headers or {}).items())
        async with access.channel(grpc.aio, url) as channel:
            method = channel.unary_unary(METHOD)  # bytes in, bytes out: nothing is parsed
            await method(sent[0], timeout=timeout_s, metadata=key, wait_for_ready=True)
            return await offer(lambda m: method(m, timeout=timeout_s, metadata=key), due_s, sent)

    return summarize(complete(go()), len(due_s) / seconds, seconds, slo_ms)


def at_rate(
    send: Callable[[np.ndarray, list[bytes]], LoadRun], pid: int, pool: Sequence[bytes], qps: float, seconds: float,
    seed: int,
) -> tuple[LoadRun, float]:  # fmt: skip
    """One run at random arrivals of ``qps``: ``send(due times, requests)`` offers it to a system whose process is
    ``pid``. Beside the run the milliseconds of processor time that the system's processes spent on a request."""
    due = due_times("poisson", qps, seconds, seed)
    chosen = picks(len(due), len(pool), REPEAT, seed)
    before = processor_seconds(pid)
    outcome = send(due, [pool[i] for i in chosen])
    return outcome, (processor_seconds(pid) - before) * 1000 / len(due)


def knee(
    measure: Callable[[float], LoadRun], first: float, steps: int = 5, most: float = 100_000.0,
    attained: float = ATTAINED,
) -> list[LoadRun]:  # fmt: skip
    """Runs at doubling rates until ``full`` falls below ``attained``, then by halves between; all runs, by rate."""
    runs, low, high = [], 0.0, first
    while high <= most:
        runs.append(measure(high))
        if runs[-1].full < attained:
            break
        low, high = high, 2 * high
    for _ in range(steps):
        middle = (low + high) / 2
        runs.append(measure(middle))
        low, high = (middle, high) if runs[-1].full >= attained else (low, middle)
    return sorted(runs, key=lambda r: r.qps)


def best(runs: Sequence[LoadRun], attained: float = ATTAINED) -> LoadRun | None:
    """The largest offered rate that met the SLO before the first that did not."""
    met = None
    for r in sorted(runs, key=lambda r: r.qps):
        if r.full < attained:
            break
        met = r
    return met
