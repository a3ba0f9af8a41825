"""What callers and senders of events see while something fails: open load over gRPC, events over HTTP."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor

from benchmarks.deaths import CLEAR
from loadtest.generate.generator import DEGRADED, METHOD, CallError, complete, offer
from vivace import contract
from vivace.client import VivaceClient, VivaceError

TIMEOUT_S = 10.0
TRIES = 100  # of a request whose known answer is sought
STORE_AWAY = b"store: "  # in a STATUS
WRONG = "wrong answer"
_SENDERS = itertools.count()
CLEAR_TOO = ("memory is full", "store: no answer", "store: it ", "store: not stored", "not there just now")


def texts_of(answer: bytes, tensor: contract.WireTensor) -> tuple[bytes, ...]:
    """A BYTES output of a serialized ModelInferResponse."""
    response = service_pb2.ModelInferResponse.FromString(answer)
    place = [output.name for output in response.outputs].index(tensor.name)
    return tuple(deserialize_bytes_tensor(response.raw_output_contents[place]))


def items_of(answer: bytes) -> tuple[bytes, ...]:
    """ITEM_ID of the same."""
    return texts_of(answer, contract.ITEM_ID)


def unclear(texts: Counter[str]) -> dict[str, int]:
    """Refusals that do not say that something is away, or full, and may be tried again."""
    return {text: n for text, n in texts.items() if not any(words in text for words in (*CLEAR, *CLEAR_TOO))}


def answers_of(url: str, sent: Sequence[bytes]) -> list[tuple[bytes, ...]]:
    """Items of each request, asked one after the other, and again where a busy machine ranked less. Raises
    RuntimeError for an answer that is not whole."""
    answers = []
    with grpc.insecure_channel(url) as channel:
        method = channel.unary_unary(METHOD)
        for body in sent:
            for _ in range(TRIES):
                answer = method(body, timeout=TIMEOUT_S, wait_for_ready=True)
                if not DEGRADED.search(answer):
                    break
                time.sleep(0.1)
            if (status := texts_of(answer, contract.STATUS)[0]).startswith(b"degraded"):
                raise RuntimeError(f"expected whole answers before any fault, got STATUS {status.decode()!r}")
            answers.append(items_of(answer))
    return answers


class Events:
    """A thread that appends an event twenty times a second; what was acknowledged, and what may be stored.

    ``took``: (moment begun by ``time.monotonic``, seconds it took, why it failed or "") of each."""

    def __init__(self, url: str) -> None:
        self._user = f"fault {next(_SENDERS)}"
        self.acknowledged: dict[str, list[str]] = {self._user: []}
        self.unknown: dict[str, list[str]] = {self._user: []}
        self.took: list[tuple[float, float, str]] = []
        self._url, self._stop = url, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        number = 0
        with VivaceClient(self._url, "http", timeout_s=TIMEOUT_S) as client:
            while not self._stop.wait(0.05):
                number += 1
                began, why, outcome = time.monotonic(), "", self.acknowledged
                try:
                    client.append(self._user, f"item#{number}")
                except VivaceError as error:
                    why, outcome = str(error), self.unknown
                outcome[self._user].append(f"item#{number}")
                self.took.append((began, time.monotonic() - began, why))

    def __enter__(self) -> Events:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def since(self, began: float, fault_at: float) -> dict[str, Any]:
        """Of those begun since then: how many, how many were refused, the longest wait, and how long after the fault
        the last refusal came."""
        rows = [row for row in list(self.took) if row[0] >= began]
        late = [at + took - fault_at for at, took, why in rows if why and at >= fault_at]
        return {
            "sent": len(rows), "refused": sum(1 for *_, why in rows if why),
            "unclear": unclear(Counter(why for *_, why in rows if why)),
            "longest_s": round(max((took for _, took, _ in rows), default=0.0), 2),
            "last_refused_s": round(max(late, default=0.0), 2),
        }  # fmt: skip


@dataclass
class Outcome:
    """What callers saw in one run. ``records``: as ``generator.offer`` gives them, and WRONG for an answer with other
    items than expected whose STATUS names no reason; ``wrong``: those answers and what was expected;
    ``without_store``: how many say that the store is away; ``refusals``: what callers were told."""

    records: list[Any] = field(default_factory=list)
    wrong: list[tuple[bytes, tuple[bytes, ...]]] = field(default_factory=list)
    without_store: int = 0
    refusals: Counter[str] = field(default_factory=Counter)


class Load(Outcome):
    """One run of open load in a thread of its own."""

    def __init__(self, url: str, sent: list[bytes], expected: list[tuple[bytes, ...]], due_s: np.ndarray) -> None:
        super().__init__()
        self.due_s = due_s
        self._right, self._sent = dict(zip(sent, expected, strict=True)), sent
        self._thread = threading.Thread(target=lambda: complete(self._go(url)))

    async def _go(self, url: str) -> None:
        chosen = [self._sent[i % len(self._sent)] for i in range(len(self.due_s))]
        async with grpc.aio.insecure_channel(url) as channel:
            method = channel.unary_unary(METHOD)

            async def call(body: bytes) -> bytes:
                try:
                    answer: bytes = await method(body, timeout=TIMEOUT_S)
                except grpc.aio.AioRpcError as error:
                    self.refusals[f"{error.code().name}: {error.details()}"] += 1
                    raise
                self._judge(answer, self._right[body])
                return answer

            self.records = await offer(call, self.due_s, chosen)

    def _judge(self, answer: bytes, right: tuple[bytes, ...]) -> None:
        away = STORE_AWAY in texts_of(answer, contract.STATUS)[0]
        self.without_store += away
        if items_of(answer) != right and not away and not DEGRADED.search(answer):  # ``offer`` counts those
            self.wrong.append((answer, right))
            raise CallError(WRONG)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()


def figures(load: Outcome, slo_ms: float, at_s: float, window_s: float) -> dict[str, Any]:
    """Of one run with a fault at ``at_s``, whose window is not judged: latencies in ms from the moment due, and how
    long after the fault the last answer that was late, refused or wrong was due."""
    records = load.records
    due, ms = np.array([r[0] for r in records]), np.array([(r[2] - r[0]) * 1000 for r in records])
    good = np.array([r[3] == "" for r in records]) & (ms <= slo_ms)
    outside = (due < at_s) | (due > at_s + window_s)
    bad_after = due[~good & (due >= at_s)]
    errors = Counter(r[3] for r in records if r[3] != "")
    return {
        "requests": len(records), "wrong": errors.pop(WRONG, 0), "refused": dict(errors),
        "unclear": unclear(load.refusals), "without_store": load.without_store,
        "in_time": round(float(good.mean()), 5), "in_time_outside": round(float(good[outside].mean()), 5),
        "p50_ms": round(float(np.percentile(ms, 50)), 1), "p99_ms": round(float(np.percentile(ms[outside], 99)), 1),
        "longest_s": round(float(ms.max()) / 1000, 2),
        "last_bad_s": round(float(bad_after.max() - at_s), 2) if len(bad_after) else 0.0,
    }  # fmt: skip
