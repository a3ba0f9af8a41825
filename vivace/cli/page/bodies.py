"""What a request of the page carries."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request


async def body_of(request: Request) -> dict[str, Any]:
    """The JSON object that was sent. Raises ValueError."""
    try:
        raw = json.loads(await request.body())
    except (ValueError, RecursionError) as error:  # not JSON, or nested too deep
        raise ValueError(f"the request is no JSON object: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"the request is no JSON object: got {type(raw).__name__}")
    return raw
