"""The Python client: ``VivaceClient`` (sync) and ``AsyncVivaceClient`` (asyncio), each over gRPC or HTTP.

with VivaceClient("127.0.0.1:8001") as client:
    answer = client.recommend(user_id="user-00042", top_k=10)
    client.append("user-00042", answer.items[0])
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vivace import contract

PROTOCOLS = ("grpc", "http")


class VivaceError(RuntimeError):
    """The server refused or failed; the message is the server's own."""


@dataclass(frozen=True)
class Recommendation:
    """One answer, best item first; ``heads`` maps a task head to calibrated probabilities (of an answer to a query: 0
    where the recommender does not know the item). ``understood``: what a query was taken for, its facets, and which
    branches found each item; {} without one."""

    items: list[str]
    scores: np.ndarray
    heads: dict[str, np.ndarray]
    status: str
    understood: dict[str, Any] = field(default_factory=dict)

    @property
    def degraded(self) -> bool:
        return self.status != contract.STATUS_OK


class Appended(int):
    """The length of a user's history after an event was added. ``status``: "ok", or what of the event the served run
    does not know; it is stored all the same. "" where the server does not say: a run compiled before it could."""

    status: str

    def __new__(cls, length: int, status: str = "") -> Appended:
        appended = super().__new__(cls, length)
        appended.status = status
        return appended


def _module(protocol: str, asynchronous: bool) -> Any:
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {PROTOCOLS}, got {protocol!r}")
    if protocol == "grpc":
        import tritonclient.grpc as grpc
        import tritonclient.grpc.aio as grpc_aio

        return grpc_aio if asynchronous else grpc
    import tritonclient.http as http
    import tritonclient.http.aio as http_aio

    return http_aio if asynchronous else http


def inputs_of(module: Any, tensors: Sequence[tuple[contract.WireTensor, np.ndarray]]) -> list[Any]:
    inputs = []
    for tensor, value in tensors:
        item = module.InferInput(tensor.name, list(value.shape), tensor.datatype)
        item.set_data_from_numpy(value)
        inputs.append(item)
    return inputs


# -- what callers give, checked: a wrong type is named before anything is sent --------------------------
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


def _number(value: float, name: str) -> float:
    """``value`` if it is a finite number; raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a number, got {type(value).__name__} {value!r:.60}")
    return float(value)


def _items(history: Sequence[str | bytes]) -> np.ndarray:
    """HISTORY of one row, object [1, H]; raises ValueError."""
    if isinstance(history, str | bytes):
        raise ValueError(f"history: expected a list of item ids, got {history!r:.60}; write [{history!r:.60}]")
    if isinstance(history, Mapping) or not isinstance(history, Iterable):
        raise ValueError(f"history: expected a list of item ids, got {type(history).__name__} {history!r:.60}")
    return np.array([_text(item, f"history[{i}]") for i, item in enumerate(history)], object).reshape(1, -1)


def _address(url: str) -> str:
    """``url`` if it is host:port; raises ValueError."""
    host, _, port = url.rpartition(":") if isinstance(url, str) else ("", "", "")
    if not host or not port.isdecimal() or "/" in url:
        example = url.partition("://")[2].rstrip("/") if isinstance(url, str) and "://" in url else "127.0.0.1:8001"
        raise ValueError(f"url: expected host:port without a scheme or a path, such as {example!r}, got {url!r}")
    return url


def request_tensors(
    user_id: str | bytes = "", history: Sequence[str | bytes] = (), top_k: int = 10, query: str | bytes = ""
) -> list[tuple[contract.WireTensor, np.ndarray]]:
    """The public call as arrays of one row. Raises ValueError for values of a wrong type."""
    return [
        (contract.USER_ID, np.array([[_text(user_id, "user_id")]], object)),
        (contract.QUERY, np.array([[_text(query, "query")]], object)),
        (contract.HISTORY, _items(history)),
        (contract.TOP_K, np.array([[_whole(top_k, "top_k", 32)]], np.int32)),
    ]


def limits(within_ms: float = 0.0, filters: Mapping[str, Any] | None = None, diversity: float = 0.0) -> dict[str, Any]:
    """Arguments of Triton's client beside the tensors. Of a request that is worth nothing after ``within_ms``: how long
    it may wait in a queue (``timeout``, microseconds) and when it ends (parameter DEADLINE, Unix ms: client and server
    need the same time). Of an answer to a query: FILTERS and DIVERSITY."""
    parameters: dict[str, Any] = {}
    within_ms, diversity = _number(within_ms, "within_ms"), _number(diversity, "diversity")
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
    timeout = {"timeout": int(within_ms * 1000)} if within_ms else {}
    return timeout | ({"parameters": parameters} if parameters else {})


def append_tensors(
    user_id: str, item_id: str, event_type: str, timestamp_ms: int
) -> list[tuple[contract.WireTensor, np.ndarray]]:
    """The append call as arrays of one row. Raises ValueError for values of a wrong type."""
    texts = {"user_id": user_id, "item_id": item_id, "event_type": event_type}
    columns = [np.array([[_text(value, name)]], object) for name, value in texts.items()]
    time_ms = np.array([[_whole(timestamp_ms, "timestamp_ms", 64)]], np.int64)
    return list(zip(contract.APPEND, [*columns, time_ms], strict=True))


def outputs_of(result: Any) -> list[str]:
    """Names of the outputs that came, over either protocol."""
    response = result.get_response()
    return (
        [o["name"] for o in response["outputs"]] if isinstance(response, dict) else [o.name for o in response.outputs]
    )


def read_answer(result: Any) -> Recommendation:
    """One row's answer of a ``recommend`` call."""
    arrays = {name: result.as_numpy(name) for name in outputs_of(result)}
    items = [i.decode() for i in arrays.pop(contract.ITEM_ID.name)[0]]
    scores = arrays.pop(contract.SCORE.name)[0]
    status = arrays.pop(contract.STATUS.name)[0, 0].decode()
    record = arrays.pop(contract.UNDERSTOOD.name)[0, 0] if contract.UNDERSTOOD.name in arrays else b""
    understood = json.loads(record) if record else {}
    return Recommendation(items, scores, {n.lower(): a[0] for n, a in arrays.items()}, status, understood)


def read_appended(result: Any) -> Appended:
    """One row's answer of an ``append_event`` call."""
    statuses = result.as_numpy(contract.STATUS.name) if contract.STATUS.name in outputs_of(result) else None
    status = "" if statuses is None else statuses[0, 0].decode()
    return Appended(int(result.as_numpy(contract.HISTORY_LENGTH.name)[0, 0]), status)


def _failed(error: Exception) -> VivaceError:
    text = error.message() if hasattr(error, "message") and callable(error.message) else str(error)
    return VivaceError(str(text))


class VivaceClient:
    """Blocking calls. ``url`` is host:port of the protocol's endpoint (8001 gRPC, 8000 HTTP by default)."""

    def __init__(self, url: str = "127.0.0.1:8001", protocol: str = "grpc", timeout_s: float = 10.0) -> None:
        self._module = _module(protocol, asynchronous=False)
        http = {"connection_timeout": timeout_s, "network_timeout": timeout_s} if protocol == "http" else {}
        self._client = self._module.InferenceServerClient(_address(url), **http)
        self._options = {"client_timeout": timeout_s} if protocol == "grpc" else {}

    def _infer(self, model: str, tensors: list[tuple[contract.WireTensor, np.ndarray]], **limits: Any) -> Any:
        try:
            return self._client.infer(model, inputs_of(self._module, tensors), **self._options, **limits)
        except Exception as error:
            raise _failed(error) from error

    def recommend(
        self,
        user_id: str = "",
        history: Sequence[str | bytes] = (),
        top_k: int = 10,
        query: str = "",
        within_ms: float = 0.0,
        filters: Mapping[str, Any] | None = None,
        diversity: float = 0.0,
    ) -> Recommendation:
        """Items for a user; an empty ``history`` asks the feature store for the user's own. ``within_ms``: the server
        may give up afterwards (0: never). Of a ``query``: ``filters`` {"values": {attribute: [...]}, "ranges": {number:
        [low, high]}, "seen": False} and ``diversity`` 0..1 of the answer. Raises VivaceError where the server refuses
        or fails, and ValueError for values of a wrong type."""
        tensors = request_tensors(user_id, history, top_k, query)
        return read_answer(self._infer(contract.ENSEMBLE, tensors, **limits(within_ms, filters, diversity)))

    def append(self, user_id: str, item_id: str, event_type: str = "", timestamp_ms: int = 0) -> Appended:
        """Adds an event to the user's stored history (time 0: now); returns its new length, an int whose ``status``
        says whether item and type are known. Raises VivaceError, and ValueError for values of a wrong type."""
        result = self._infer(contract.APPEND_EVENT, append_tensors(user_id, item_id, event_type, timestamp_ms))
        return read_appended(result)

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> VivaceClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncVivaceClient:
    """The same calls for asyncio. Make it inside a running loop."""

    def __init__(self, url: str = "127.0.0.1:8001", protocol: str = "grpc", timeout_s: float = 10.0) -> None:
        self._module = _module(protocol, asynchronous=True)
        http = {"conn_timeout": timeout_s, "conn_limit": 512} if protocol == "http" else {}
        self._client = self._module.InferenceServerClient(_address(url), **http)
        self._options = {"client_timeout": timeout_s} if protocol == "grpc" else {}

    async def _infer(self, model: str, tensors: list[tuple[contract.WireTensor, np.ndarray]], **limits: Any) -> Any:
        try:
            return await self._client.infer(model, inputs_of(self._module, tensors), **self._options, **limits)
        except Exception as error:
            raise _failed(error) from error

    async def recommend(
        self,
        user_id: str = "",
        history: Sequence[str | bytes] = (),
        top_k: int = 10,
        query: str = "",
        within_ms: float = 0.0,
        filters: Mapping[str, Any] | None = None,
        diversity: float = 0.0,
    ) -> Recommendation:
        """See ``VivaceClient.recommend``."""
        tensors = request_tensors(user_id, history, top_k, query)
        return read_answer(await self._infer(contract.ENSEMBLE, tensors, **limits(within_ms, filters, diversity)))

    async def append(self, user_id: str, item_id: str, event_type: str = "", timestamp_ms: int = 0) -> Appended:
        """See ``VivaceClient.append``."""
        result = await self._infer(contract.APPEND_EVENT, append_tensors(user_id, item_id, event_type, timestamp_ms))
        return read_appended(result)

    async def close(self) -> None:
        await self._client.close()

    async def __aenter__(self) -> AsyncVivaceClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
