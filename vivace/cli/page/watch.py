"""Routes of the operator's view: a stream of what happens each second, load, and changes with the operator's key."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from loadtest.reports.record import finite
from serving.wheel import ServerError
from vivace.cli.page.bodies import body_of
from vivace.cli.page.load import LONGEST_S, MOST_A_SECOND, BusyLoadError, Load
from vivace.cli.page.operations import ForbiddenError, Operations, between
from vivace.cli.page.served import AwayError
from vivace.client import VivaceError

EVERY_S = 1.0
KEY_HEADER = "x-operator-key"


def _message(record: Any) -> str:
    """One message of a stream of server-sent events."""
    return f"data: {json.dumps(finite(record), allow_nan=False)}\n\n"


async def _seconds(operations: Operations) -> AsyncIterator[str]:
    """What happens, each second, until whoever watches goes away; {"error"} while the server does not say."""
    before = None
    while True:
        try:
            now = await run_in_threadpool(operations.sample)
            record: dict[str, Any] = {"health": await run_in_threadpool(operations.health)}
            record |= await run_in_threadpool(operations.versions)
            if before is not None:
                record |= between(before[1], now[1], max(1e-3, now[0] - before[0]))
            before = now
        except (AwayError, ValueError) as error:
            before, record = None, dict(error=str(error))
        yield _message(record)
        await asyncio.sleep(EVERY_S)


def routes(
    operations: Operations, load: Load, address: Callable[[], str], users: Callable[[], Sequence[str]]
) -> tuple[Route, ...]:
    """``address``: host:port of the server's calls; ``users``: whom load asks for."""

    def stream(messages: AsyncIterator[str]) -> StreamingResponse:
        return StreamingResponse(messages, media_type="text/event-stream")

    async def watch(_: Request) -> Response:
        return stream(_seconds(operations))

    async def start(request: Request) -> Response:
        try:
            raw = await body_of(request)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 400)
        rate, seconds = raw.get("rate", 0), raw.get("seconds", LONGEST_S)
        for name, value, most in (("rate", rate, MOST_A_SECOND), ("seconds", seconds, LONGEST_S)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= most:
                return JSONResponse({"error": f"{name}: expected 1..{most}, got {value!r:.60}"}, 400)
        counts = load.run(address(), await run_in_threadpool(users), float(rate), float(seconds))
        try:
            first = await anext(counts)
        except BusyLoadError as error:
            return JSONResponse({"error": str(error)}, 409)
        except (VivaceError, OSError, ValueError) as error:  # such as a certificate that is not there any more
            return JSONResponse({"error": str(error)}, 502)

        async def messages() -> AsyncIterator[str]:
            try:
                yield _message(first)
                async for each in counts:
                    yield _message(each)
            finally:
                await counts.aclose()  # type: ignore[attr-defined]  # it is a generator

        return stream(messages())

    async def change(request: Request) -> Response:
        key = request.headers.get(KEY_HEADER, "")
        try:
            raw = await body_of(request)
            return JSONResponse(await run_in_threadpool(operations.change, raw, key))
        except ForbiddenError as error:
            return JSONResponse({"error": str(error)}, 403)
        except (ServerError, ValueError, FileNotFoundError) as error:
            return JSONResponse({"error": str(error)}, 400)

    return (
        Route("/api/watch", watch),
        Route("/api/load", start, methods=["POST"]),
        Route("/api/rollout", change, methods=["POST"]),
    )
