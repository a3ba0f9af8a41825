"""Load over one gRPC channel for benchmarks whose systems take turns: so many calls under way, or at random."""

from __future__ import annotations

import asyncio
import time

import grpc

from benchmarks.fault_load import TIMEOUT_S
from loadtest.generate.arrivals import due_times
from loadtest.generate.generator import CODE_DEGRADED, METHOD, complete, offer


def answered_ms(address: str, sent: list[bytes], streams: int, qps: float, seconds: float, seed: int) -> list[float]:
    """Milliseconds of each answer to ``sent`` in turn within ``seconds``: of ``streams`` calls at once from when each
    was sent, or, with ``qps`` over 0, of calls at random from when each was due."""
    return complete(_at_rate(address, sent, qps, seconds, seed) if qps else _at_once(address, sent, streams, seconds))


async def _at_once(address: str, sent: list[bytes], streams: int, seconds: float) -> list[float]:
    took_ms, end = list[float](), time.monotonic() + seconds
    async with grpc.aio.insecure_channel(address) as channel:
        method = channel.unary_unary(METHOD)

        async def one(number: int) -> None:
            while time.monotonic() < end:
                began = time.perf_counter()
                await method(sent[number % len(sent)], timeout=TIMEOUT_S)
                took_ms.append((time.perf_counter() - began) * 1000)
                number += streams

        await asyncio.gather(*(one(first) for first in range(streams)))
    return took_ms


async def _at_rate(address: str, sent: list[bytes], qps: float, seconds: float, seed: int) -> list[float]:
    due_s = due_times("poisson", qps, seconds, seed)
    async with grpc.aio.insecure_channel(address) as channel:
        method = channel.unary_unary(METHOD)
        chosen = [sent[i % len(sent)] for i in range(len(due_s))]
        records = await offer(lambda body: method(body, timeout=TIMEOUT_S), due_s, chosen)
    return [(done - due) * 1000 for due, _, done, code in records if code in ("", CODE_DEGRADED)]
