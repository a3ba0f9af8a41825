"""Load from a slider: open loop, bounded, and over when its time is up or whoever watches it goes away."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from vivace.client import AsyncVivaceClient, VivaceError
from vivace.contract import UNLOGGED

MOST_A_SECOND, LONGEST_S, MOST_AT_ONCE = 100, 60, 200
EVERY_S = 0.5


class BusyLoadError(ValueError):
    """A load goes on already."""


class Load:
    """At most one at a time. Requests are due at even distances, whatever became of those before them; what is due
    while MOST_AT_ONCE are under way is not sent, and counted. Nobody saw the answers: they are not logged."""

    def __init__(self, protocol: str, access: Mapping[str, Any]) -> None:
        self._protocol, self._access = protocol, access
        self._busy = False
        self._closing: asyncio.Task[None] | None = None  # of the load before; a task that nobody holds may be collected

    async def run(
        self, address: str, users: Sequence[str], rate: float, seconds: float
    ) -> AsyncIterator[dict[str, Any]]:
        """Counts every EVERY_S until the end: ``sent``, ``unsent``, ``answered``, ``degraded``, ``failed``, and of the
        answers since the last counts ``p50`` and ``p95``, milliseconds from the moment due. Raises BusyLoadError."""
        if self._busy:
            raise BusyLoadError("A load goes on already; stop it first.")
        client = AsyncVivaceClient(address, self._protocol, timeout_s=5.0, **self._access)
        self._busy = True
        counts = dict.fromkeys(("sent", "unsent", "answered", "degraded", "failed"), 0)
        latencies: list[float] = []
        under_way: set[asyncio.Task[None]] = set()

        async def call(due: float) -> None:
            try:
                answer = await client.recommend(random.choice(users) if users else "", top_k=10, request_id=UNLOGGED)
            except VivaceError:
                counts["failed"] += 1
                return
            counts["answered"] += 1
            counts["degraded"] += answer.degraded
            latencies.append((time.monotonic() - due) * 1000)

        async def send(began: float) -> None:
            for number in range(int(rate * seconds)):
                due = began + number / rate
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                if len(under_way) >= MOST_AT_ONCE:
                    counts["unsent"] += 1
                    continue
                counts["sent"] += 1
                task = asyncio.create_task(call(due))
                under_way.add(task)
                task.add_done_callback(under_way.discard)

        began = time.monotonic()
        sender = asyncio.create_task(send(began))
        try:
            while not (sender.done() and not under_way):
                await asyncio.sleep(EVERY_S)
                yield {
                    **counts,
                    **_quantiles(latencies),
                    "left": max(0.0, round(began + seconds - time.monotonic(), 1)),
                }
                latencies.clear()
        finally:  # nothing is awaited here: whoever watched may have gone, which cancels each wait anew
            tasks = [sender, *under_way]
            for task in tasks:
                task.cancel()
            self._closing = asyncio.create_task(_close(client, tasks))
            self._busy = False


async def _close(client: AsyncVivaceClient, tasks: Sequence[asyncio.Task[None]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.close()


def _quantiles(latencies: Sequence[float]) -> dict[str, float | None]:
    ordered = sorted(latencies)
    at = {"p50": 0.5, "p95": 0.95}
    return {name: round(ordered[int(q * (len(ordered) - 1))], 1) if ordered else None for name, q in at.items()}
