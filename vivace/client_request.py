"""What callers give, checked, as the arrays and parameters of a request: a wrong type is named before anything is
sent."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vivace import contract
from vivace.store.interface import Event


def _text(value: str | bytes, name: str) -> bytes:
    """UTF-8 of ``value``; raises ValueError that names it."""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a str, got {type(value).__name__} {value!r:.60}")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected text that UTF-8 can hold, got {value[error.start]!r}") from None


def _whole(value: int, name: str, bits: int) -> int:
    """``value`` if it is a whole number that a signed integer of ``bits`` holds; raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name}: expected an int, got {type(value).__name__} {value!r:.60}")
    if not -(1 << bits - 1) <= value < 1 << bits - 1:
        raise ValueError(f"{name}: expected an int of {bits} bits, got {value}")
    return int(value)


def number(value: float, name: str) -> float:
    """``value`` if it is a finite number; raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a number, got {type(value).__name__} {value!r:.60}")
    return float(value)


PastEvent = str | bytes | tuple[str, str] | tuple[str, str, int]
"""One event of a history: an item id, or (item id, event type) or (item id, event type, Unix time in ms)."""


def _event(event: PastEvent, index: int) -> bytes:
    if not isinstance(event, tuple):
        return _text(event, f"history[{index}]")
    if not 1 <= len(event) <= 3:
        raise ValueError(f"history[{index}]: expected (item id, event type, Unix time in ms), got {event!r:.60}")
    parts = [_text(part, f"history[{index}][{i}]") for i, part in enumerate(event[:2])]
    if len(event) == 3:
        parts.append(str(_whole(event[2], f"history[{index}][2]", 64)).encode())
    return contract.EVENT_PART.encode().join(parts)


def _items(history: Sequence[PastEvent]) -> np.ndarray:
    """HISTORY of one row, object [1, H]; raises ValueError."""
    if isinstance(history, str | bytes):
        raise ValueError(f"history: expected a list of item ids, got {history!r:.60}; write [{history!r:.60}]")
    if isinstance(history, Mapping) or not isinstance(history, Iterable):
        raise ValueError(f"history: expected a list of item ids, got {type(history).__name__} {history!r:.60}")
    return np.array([_event(event, i) for i, event in enumerate(history)], object).reshape(1, -1)


def _context(context: Mapping[str, Any] | None) -> list[tuple[contract.WireTensor, np.ndarray]]:
    """CONTEXT of one row, or nothing; raises ValueError."""
    if context is None:
        return []
    if not isinstance(context, Mapping):
        raise ValueError(f"context: expected a dict, got {type(context).__name__} {context!r:.60}")
    if not context:
        return []
    try:
        sent = json.dumps(dict(context), allow_nan=False, default=plain)
    except (TypeError, ValueError) as error:
        raise ValueError(f"context: expected what JSON can hold, got {context!r:.200}: {error}") from None
    return [(contract.CONTEXT_OF_REQUEST, np.array([[sent.encode()]], object))]


def plain(value: Any) -> Any:
    """A number or an array of NumPy as Python's; raises TypeError for what JSON cannot hold."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r:.60}")


def address(url: str) -> str:
    """``url`` if it is host:port, or a Unix socket on this machine, unix:/its/path; raises ValueError."""
    if isinstance(url, str) and url.startswith("unix:/"):
        return url
    host, _, port = url.rpartition(":") if isinstance(url, str) else ("", "", "")
    if not host or not port.isdecimal() or "/" in url:
        example = url.partition("://")[2].rstrip("/") if isinstance(url, str) and "://" in url else "127.0.0.1:8001"
        raise ValueError(f"url: expected host:port without a scheme or a path, such as {example!r}, got {url!r}")
    return url


def request_tensors(
    user_id: str | bytes = "",
    history: Sequence[PastEvent] = (),
    top_k: int = 10,
    query: str | bytes = "",
    context: Mapping[str, Any] | None = None,
) -> list[tuple[contract.WireTensor, np.ndarray]]:
    """The public call as arrays of one row. Raises ValueError for values of a wrong type."""
    return [
        (contract.USER_ID, np.array([[_text(user_id, "user_id")]], object)),
        (contract.QUERY, np.array([[_text(query, "query")]], object)),
        (contract.HISTORY, _items(history)),
        (contract.TOP_K, np.array([[_whole(top_k, "top_k", 32)]], np.int32)),
        *_context(context),
    ]


def _id(given: str, name: str) -> str:
    """``given``, or a name that nothing else has; raises ValueError for what is no text."""
    _text(given, name)
    return given or uuid.uuid4().hex


def limits(
    within_ms: float = 0.0, filters: Mapping[str, Any] | None = None, diversity: float = 0.0, request_id: str = "",
    session: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Arguments of Triton's client beside the tensors. Of a request that is worth nothing after ``within_ms``: how long
    it may wait in a queue (``timeout``, microseconds) and when it ends (parameter DEADLINE, Unix ms: client and server
    need the same time). Of an answer to a query: FILTERS and DIVERSITY. ``session``: SESSION. ``request_id`` ("": one
    that nothing else has) is Triton's own of a request."""
    parameters: dict[str, Any] = {}
    within_ms, diversity = number(within_ms, "within_ms"), number(diversity, "diversity")
    if within_ms < 0:
        raise ValueError(f"within_ms: expected 0 (no limit) or more, got {within_ms:g}")
    if filters is not None and not isinstance(filters, Mapping):
        raise ValueError(f"filters: expected a dict, got {type(filters).__name__} {filters!r:.60}")
    if within_ms:
        parameters[contract.DEADLINE] = int(time.time() * 1000 + within_ms)
    if filters:
        try:
            parameters[contract.FILTERS] = json.dumps(filters)
        except (TypeError, ValueError) as error:
            raise ValueError(f"filters: expected what JSON can hold, got {filters!r:.200}: {error}") from None
    if diversity:
        parameters[contract.DIVERSITY] = str(diversity)
    if session:
        parameters[contract.SESSION] = _id(session, "session")
    timeout = {"timeout": int(within_ms * 1000)} if within_ms else {}
    most = contract.MAX_PARAMETER_ID_BYTES
    if len(_text(request_id, "request_id")) > most:
        raise ValueError(f"request_id: expected at most {most} bytes, got {request_id!r:.60}")
    return {"request_id": _id(request_id, "request_id")} | timeout | ({"parameters": parameters} if parameters else {})


def event_names(event_id: str, request_id: str = "") -> dict[str, str]:
    """Parameters of an append call whose sender calls the event so ("": a name that nothing else has); ``request_id``:
    that of the answer it is of, or "". Raises ValueError for a value of a wrong type."""
    shown = {contract.REQUEST_ID: _id(request_id, "request_id")} if request_id else {}
    return {contract.EVENT_ID: _id(event_id, "event_id")} | shown


def append_tensors(
    user_id: str, item_id: str, event_type: str, timestamp_ms: int, context: Mapping[str, Any] | None = None
) -> list[tuple[contract.WireTensor, np.ndarray]]:
    """The append call as arrays of one row. Raises ValueError for values of a wrong type."""
    texts = {"user_id": user_id, "item_id": item_id, "event_type": event_type}
    columns = [np.array([[_text(value, name)]], object) for name, value in texts.items()]
    time_ms = np.array([[_whole(timestamp_ms, "timestamp_ms", 64)]], np.int64)
    return [*zip(contract.APPEND, [*columns, time_ms], strict=False), *_context(context)]


def batch_tensors(events: Sequence[Event], first: int = 0) -> list[tuple[contract.WireTensor, np.ndarray]]:
    """The append call of several events, a row each. Raises ValueError for values of a wrong type, with the event's
    place from ``first`` on."""
    columns: list[list[np.ndarray]] = [[] for _ in contract.APPEND]
    for place, event in enumerate(events, first):
        if not isinstance(event, Event):
            raise ValueError(f"events[{place}]: expected an Event, got {type(event).__name__} {event!r:.60}")
        if event.event_id:
            raise ValueError(
                f"events[{place}]: expected no event_id of its own, got {event.event_id!r:.60}; give append_many one "
                "event_id for all, or append events one by one"
            )
        try:
            if event.request_id:
                raise ValueError(
                    f"expected no request_id of its own, got {event.request_id!r:.60}; give append_many one for all"
                )
            context = _text(event.context, "context")
            tensors = append_tensors(event.user_id, event.item_id, event.event_type, event.timestamp_ms)
        except ValueError as error:
            raise ValueError(f"events[{place}]: {error}") from None
        for column, (_, value) in zip(columns, tensors, strict=False):
            column.append(value)
        columns[-1].append(np.array([[context]], object))
    return list(zip(contract.APPEND, map(np.concatenate, columns), strict=True))
