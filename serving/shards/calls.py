"""Asks all shards at once over HTTP, and does without those that do not answer.

HTTP, as Triton 2.51 ends by gRPC calls that are given up. A shard that has not answered when nearly all others would
have is asked again at its twin, and the first answer counts ("hedged requests": Dean & Barroso, "The Tail at Scale",
2013). A server that failed is not waited for until it has answered a question in the background.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException

import numpy as np

from serving.door.trust import distrust
from serving.runtime.sharded import LEAST_SEEN, Answer
from serving.shard_addresses import WAIT_MS, ShardAddresses
from vivace import contract
from vivace.client_errors import VivaceError
from vivace.credentials import Credentials
from vivace.http_pool import HttpClient
from vivace.shard_contract import shard_inputs, shard_model, shard_outputs

HEDGE_SHARE = 95.0  # percentile of the times of answers after which a twin is asked
FIRST_HEDGE_S, LEAST_HEDGE_S = 0.05, 0.002
MOST_HEDGED, HEDGES_AT_ONCE = (
    0.05,
    4.0,
)  # share of a shard's questions that are asked twice: where all are slow, more of
# them would make all slower; and how many may be in a row
RESCUE_SHARE = 0.5  # of the wait: a shard that has not answered by then is asked at its twin, whatever the bounds say
TIMES, LEARN_EVERY = 512, 32  # times that are remembered, and how often the percentile is taken of them
LATE_IN_A_ROW = 3  # answers that come too late until a server is not waited for
PROBE_S, PROBE_WAIT_S = 0.25, 1.0
LATE, SILENT, OTHER_VERSION = "late", "does not answer", "has another version"
OTHER_SHARD = "is not this shard"
FAILURES = (OSError, HTTPException, VivaceError)  # TimeoutError is one of them


@dataclass
class Endpoint:
    """One server of a shard."""

    shard: int
    address: str
    client: HttpClient
    late: int = 0
    down: str = ""
    """Why it is not asked; "" while it is."""


@dataclass
class _Asking:
    """What is under way for one shard in one call."""

    left: list[Endpoint]
    why: str = SILENT
    pending: set[Future[Answer]] = field(default_factory=set)
    hedged: bool = False


class RemoteShards:
    """``serving.runtime.sharded.Shards`` over servers that have version ``version``. For one thread at a time.

    ``wait_s``: what has not come by then is done without; ``first``: number of the first shard in ``addresses``;
    ``credentials``: of a server that asks behind mutual TLS;
    ``counts`` by (shard, how) is for whoever reports it: "answered", "hedged", "late", "failed", and "without", which
    is a call that was answered without it."""

    def __init__(
        self,
        addresses: ShardAddresses,
        version: str,
        shapes: contract.StageTensors,
        wait_s: float = WAIT_MS / 1000,
        first: int = 0,
        credentials: Credentials | None = None,
    ) -> None:
        self._model = [f"{shard_model(first + i)}/versions/{version}" for i in range(len(addresses.twins))]
        self.endpoints = [
            [Endpoint(shard, address, HttpClient(address, credentials)) for address in twins]
            for shard, twins in enumerate(addresses.twins)
        ]
        self.wait_s, self.hedge_s, self.counts = wait_s, FIRST_HEDGE_S, Counter[tuple[int, str]]()
        self._inputs = shard_inputs(shapes)
        self._outputs = [t.name for t in shard_outputs(shapes, 0)]
        self._times, self._measured, self._turn = deque[float](maxlen=TIMES), 0, 0
        self._hedges = [HEDGES_AT_ONCE] * len(self.endpoints)  # that each shard may be asked now
        everyone = [e for twins in self.endpoints for e in twins]
        self._pool = ThreadPoolExecutor(4 * len(everyone), "shards")  # those that are late keep theirs for a while
        self._closed = threading.Event()
        threading.Thread(target=self._bring_back, args=(everyone,), name="shards: probe", daemon=True).start()

    def __call__(self, state_BD: np.ndarray, seen: Sequence[np.ndarray]) -> tuple[list[Answer | None], str]:
        """See ``Shards``."""
        self._turn += 1
        self._hedges = [min(HEDGES_AT_ONCE, n + MOST_HEDGED) for n in self._hedges]
        began = time.monotonic()
        answers: list[Answer | None] = [None] * len(self.endpoints)
        asking, whose = list[_Asking](), dict[Future[Answer], Endpoint]()
        for shard, twins in enumerate(self.endpoints):
            turned = [*twins[self._turn % len(twins) :], *twins[: self._turn % len(twins)]]
            turned.sort(key=lambda endpoint: endpoint.late > 0)  # whoever still owes an answer comes last
            asking.append(_Asking([e for e in turned if not e.down], next((e.down for e in twins if e.down), SILENT)))
            self._ask(asking[shard], whose, state_BD, seen[shard])
        hedge_at, rescue_at, end = (began + s for s in (self.hedge_s, self.wait_s * RESCUE_SHARE, self.wait_s))
        while open_ := [shard for shard, a in enumerate(asking) if answers[shard] is None and a.pending]:
            now = time.monotonic()
            if now >= end:
                break
            waited = {future for shard in open_ for future in asking[shard].pending}
            next_look = min(moment for moment in (hedge_at, rescue_at, end) if moment > now)
            done, _ = wait(waited, next_look - now, FIRST_COMPLETED)
            for future in done:
                endpoint = whose[future]
                asked = asking[endpoint.shard]
                asked.pending.discard(future)
                if (answer := self._take(future, endpoint, asked, began)) is not None:
                    answers[endpoint.shard] = answer
                elif not asked.pending:
                    self._ask(asked, whose, state_BD, seen[endpoint.shard])
            now = time.monotonic()
            for shard in open_:
                if (
                    answers[shard] is None
                    and now >= hedge_at
                    and self._may_hedge(shard, asking[shard], now >= rescue_at)
                ):
                    self.counts[shard, "hedged"] += 1
                    self._ask(asking[shard], whose, state_BD, seen[shard])
        self._give_up(asking, answers, whose)
        return answers, self._missing(asking, answers)

    def ask_once(self) -> dict[int, str]:
        """The shards that do not answer, and why."""
        rows = [np.zeros((1, LEAST_SEEN), np.int64)] * len(self.endpoints)
        answers, _ = self(np.zeros((1, self._inputs[0].dims[0]), np.float32), rows)
        down = [next((e.down for e in twins if e.down), LATE) for twins in self.endpoints]
        return {shard: down[shard] for shard, answer in enumerate(answers) if answer is None}

    def close(self) -> None:
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for endpoint in (e for twins in self.endpoints for e in twins):
            endpoint.client.close()

    # -- one call ------------------------------------------------------------------------------------
    def _ask(self, asked: _Asking, whose: dict[Future[Answer], Endpoint], state: np.ndarray, rows: np.ndarray) -> None:
        """At the next server that has not been asked, if there is one."""
        if asked.left:
            endpoint = asked.left.pop(0)
            future = self._pool.submit(self._infer, endpoint, state, rows, self.wait_s)
            asked.pending.add(future)
            whose[future] = endpoint

    def _may_hedge(self, shard: int, asked: _Asking, rescue: bool) -> bool:
        """Whether a twin is asked now: once while there are hedges left, and where the call would soon do without."""
        if not asked.left or (asked.hedged and not rescue):
            return False
        asked.hedged = True
        if self._hedges[shard] >= 1:
            self._hedges[shard] -= 1
            return True
        return rescue

    def _infer(self, endpoint: Endpoint, state: np.ndarray, rows: np.ndarray, wait_s: float) -> Answer:
        from tritonclient.http import InferInput, InferRequestedOutput  # what a run without shards does without

        inputs = []
        for tensor, value in zip(self._inputs, (state, rows), strict=True):
            inputs.append(InferInput(tensor.name, list(value.shape), tensor.datatype))
            inputs[-1].set_data_from_numpy(np.ascontiguousarray(value))
        outputs = [InferRequestedOutput(name) for name in self._outputs]
        result = endpoint.client.infer(self._model[endpoint.shard], inputs, wait_s, outputs=outputs)
        ids, scores = (result.as_numpy(name) for name in self._outputs)
        return ids, scores

    def _take(self, future: Future[Answer], endpoint: Endpoint, asked: _Asking, began: float) -> Answer | None:
        try:
            answer = future.result()
        except FAILURES as error:
            asked.why = _why(error)
            if isinstance(error, TimeoutError):
                self._late(endpoint)
                return None
            self.counts[endpoint.shard, "failed"] += 1
            if not (isinstance(error, VivaceError) and error.passing):  # else its queue is full
                endpoint.down = asked.why
            return None
        endpoint.late = 0
        self.counts[endpoint.shard, "answered"] += 1
        self._learn(time.monotonic() - began)
        return answer

    def _give_up(
        self, asking: list[_Asking], answers: list[Answer | None], whose: dict[Future[Answer], Endpoint]
    ) -> None:
        """Notes who is late: also a server whose twin was quicker, where it takes as long as no call may."""
        for future, endpoint in whose.items():
            if future not in asking[endpoint.shard].pending:
                continue
            if answers[endpoint.shard] is None:
                asking[endpoint.shard].why = LATE
                self._late(endpoint)
            else:
                endpoint.late += 1
                future.add_done_callback(partial(self._overtaken, endpoint))

    def _overtaken(self, endpoint: Endpoint, future: Future[Answer]) -> None:
        if future.cancelled():
            return
        if isinstance(future.exception(), TimeoutError):
            self.counts[endpoint.shard, "late"] += 1
            endpoint.down = LATE  # nobody would ask it again, as its twin comes first
        elif future.exception() is None:
            endpoint.late = 0

    def _late(self, endpoint: Endpoint) -> None:
        endpoint.late += 1
        self.counts[endpoint.shard, "late"] += 1
        if endpoint.late >= LATE_IN_A_ROW:
            endpoint.down = LATE

    def _missing(self, asking: list[_Asking], answers: list[Answer | None]) -> str:
        """Reason for STATUS."""
        without = [shard for shard, answer in enumerate(answers) if answer is None]
        for shard in without:
            self.counts[shard, "without"] += 1
        if not without:
            return ""
        named = ", ".join(f"{shard} ({asking[shard].why.partition(': ')[0]})" for shard in without[:8])
        more = ", …" if len(without) > 8 else ""
        what = "popular items, " if len(without) == len(answers) else ""
        return f"shards: {what}without {len(without)} of {len(answers)}: {named}{more}"

    def _learn(self, seconds: float) -> None:
        self._times.append(seconds)
        self._measured += 1
        if self._measured % LEARN_EVERY == 0:
            self.hedge_s = max(LEAST_HEDGE_S, float(np.percentile(self._times, HEDGE_SHARE)))

    # -- in the background ---------------------------------------------------------------------------
    def _bring_back(self, everyone: Sequence[Endpoint]) -> None:
        state = np.zeros((1, self._inputs[0].dims[0]), np.float32)
        rows = np.zeros((1, LEAST_SEEN), np.int64)
        while not self._closed.wait(PROBE_S):
            for endpoint in everyone:
                if endpoint.down:
                    with contextlib.suppress(*FAILURES):
                        self._infer(endpoint, state, rows, PROBE_WAIT_S)
                        endpoint.late, endpoint.down = 0, ""


def _why(error: BaseException) -> str:
    """In a word or two: STATUS is read by callers, who need no paths of sockets."""
    if isinstance(error, TimeoutError):
        return LATE
    if isinstance(error, ssl.SSLError) or (isinstance(error, VivaceError) and "TLS" in str(error)):
        return distrust(error)
    if isinstance(error, VivaceError) and "no such path" in str(error):  # of the guard before another one
        return OTHER_SHARD
    return OTHER_VERSION if "version" in str(error) and isinstance(error, VivaceError) else SILENT
