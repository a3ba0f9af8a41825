"""Calls of a long run: right ones whose answers are known, cancelled, malformed and appending ones, counted by what
became of them."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

import aiohttp
import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from benchmarks.answers import NO_CLOCK
from vivace.client import AsyncVivaceClient, Recommendation, VivaceError
from vivace.client_request import request_tensors

CANCELLED, MALFORMED, APPENDS = 0.05, 0.02, 0.08
USERS = 8
WAIT_S = 30.0
IN_A_HURRY = "degraded: load"  # STATUS where less was ranked because of the load: counted, and not wrong
INFER = "/v2/models/recommend/infer"
BODIES: tuple[tuple[bytes, dict[str, str]], ...] = (
    (b"", {}),
    (b"{", {}),
    (b"[" * 5000, {}),
    (b'{"inputs":[]}', {}),
    (b'{"inputs":[{"name":"USER_ID","datatype":"BYTES","shape":[1,1],"data":[1]}]}', {}),
    (b'{"inputs":[],"outputs":[{"name":"ITEM_ID","parameters":{"classification":1}}]}', {}),
    (bytes(2000), {"Content-Encoding": "gzip"}),
    (b"\x01" * 100, {"Inference-Header-Content-Length": "50"}),
)


class Calls:
    """Makes one call after the other, whose kind is drawn; what became of them, in all and since the last minute."""

    def __init__(self, grpc_url: str, http_url: str, histories: list[list[str]], seed: int) -> None:
        self.urls = {"grpc": grpc_url, "http": http_url}
        self.histories, self.answers = histories, [[] for _ in histories]  # type: list[list[str]], list[list[str]]
        self.totals: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.acknowledged: dict[str, list[str]] = {f"soak-{n}": [] for n in range(USERS)}
        self.unknown: dict[str, list[str]] = {user: [] for user in self.acknowledged}  # their append failed
        self._rng = random.Random(seed)
        self._seconds: list[float] = []
        self._before: Counter[str] = Counter()
        self._usual_s = 0.005
        self._context: dict[str, None] | None = NO_CLOCK

    async def learn(self) -> None:
        """Opens the connections and keeps the answer of each history."""
        self._clients = {p: AsyncVivaceClient(url, p, timeout_s=WAIT_S) for p, url in self.urls.items()}
        self._session = aiohttp.ClientSession(f"http://{self.urls['http']}")
        self._channel = grpc.aio.insecure_channel(self.urls["grpc"])
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._infer = self._channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        self._turns = {user: asyncio.Lock() for user in self.acknowledged}
        first = await self._ask("grpc", self.histories[0])
        self._context = None if "no column" in first.status else NO_CLOCK  # a run without a clock says so
        for n, history in enumerate(self.histories):
            self.answers[n] = (await self._ask("grpc", history)).items
        self._message = service_pb2.ModelInferRequest(model_name="recommend")
        for tensor, value in request_tensors(history=self.histories[0], top_k=10):
            item = self._message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=list(value.shape))
            whole = value.dtype == np.int32
            (item.contents.int_contents if whole else item.contents.bytes_contents).extend(value.ravel().tolist())

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()
        await self._session.close()
        await self._channel.close()

    async def one(self) -> None:
        kind = self._rng.random()
        if kind < CANCELLED:
            await self._cancel()
        elif kind < CANCELLED + MALFORMED:
            await self._malformed()
        elif kind < CANCELLED + MALFORMED + APPENDS:
            await self._append(self._rng.choice(list(self.acknowledged)))
        else:
            await self._recommend(self._rng.choice(list(self._clients)))

    def _failed(self, what: str, error: object) -> None:
        self.totals[what] += 1
        self.errors[f"{what}: {str(error)[:110]}"] += 1

    async def _ask(self, protocol: str, history: list[str]) -> Recommendation:
        """The same answer at any hour."""
        return await self._clients[protocol].recommend(history=history, top_k=10, context=self._context)

    async def _recommend(self, protocol: str) -> None:
        n, started = self._rng.randrange(len(self.histories)), time.perf_counter()
        try:
            answer = await self._ask(protocol, self.histories[n])
        except (VivaceError, aiohttp.ClientError, TimeoutError) as error:
            return self._failed("refused", error)
        seconds = time.perf_counter() - started
        self._usual_s = 0.9 * self._usual_s + 0.1 * seconds
        self._seconds.append(seconds)
        if answer.status.startswith(IN_A_HURRY):
            return self._failed("degraded", answer.status)
        self.totals["right" if answer.items == self.answers[n] and answer.status == "ok" else "wrong"] += 1
        return None

    async def _cancel(self) -> None:
        """A caller that gives up: by its own timer, or by hanging up."""
        wait_s = self._usual_s * self._rng.uniform(0.05, 1.2)
        by_timer = self._rng.random() < 0.5
        call = self._stub.ModelInfer(self._message, timeout=max(0.001, wait_s) if by_timer else WAIT_S)
        try:
            if by_timer:
                await call
            else:
                await asyncio.sleep(wait_s)
                call.cancel()
                await call
        except asyncio.CancelledError:
            self.totals["cancelled"] += 1
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                self.totals["timed out"] += 1
            else:
                self._failed("refused", error.details())
        else:
            self.totals["answered before it was cancelled"] += 1

    async def _malformed(self) -> None:
        try:
            if self._rng.random() < 0.5:
                await self._infer(self._rng.randbytes(self._rng.choice((1, 7, 60, 4000))), timeout=WAIT_S)
            else:
                body, headers = self._rng.choice(BODIES)
                async with self._session.post(INFER, data=body, headers=headers) as answer:
                    await answer.read()
                    if answer.status != 200:
                        self.totals["malformed refused"] += 1
                        return
        except (grpc.aio.AioRpcError, aiohttp.ClientError):
            self.totals["malformed refused"] += 1
        else:
            self._failed("malformed answered", "")

    async def _append(self, user: str) -> None:
        """One after the other for a user, so that their order is known."""
        async with self._turns[user]:
            event = f"{self._rng.choice(self.histories[0])}#{self.totals['appends']}"
            self.totals["appends"] += 1
            try:
                await self._clients[self._rng.choice(list(self._clients))].append(user, event)
            except (VivaceError, aiohttp.ClientError, TimeoutError) as error:
                self.unknown[user].append(event)
                self._failed("appends refused", error)
            else:
                self.acknowledged[user].append(event)

    def minute(self) -> dict[str, object]:
        """What became of the calls since this was asked last, and how long right answers took."""
        counts, self._before = self.totals - self._before, self.totals.copy()
        took_ms, self._seconds = np.array(self._seconds) * 1000, []
        times = {f"p{q}_ms": round(float(np.percentile(took_ms, q)), 1) for q in (50, 99)} if len(took_ms) else {}
        return {"counts": dict(counts), **times}
