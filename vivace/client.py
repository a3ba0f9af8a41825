"""The Python client: ``VivaceClient`` (sync) and ``AsyncVivaceClient`` (asyncio), each over gRPC or HTTP.

with VivaceClient("127.0.0.1:8001") as client:
    answer = client.recommend(user_id="user-00042", top_k=10)
    client.append("user-00042", answer.items[0])
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vivace import contract
from vivace.client_errors import Limit, VivaceError, VivaceTimeoutError
from vivace.client_explain import AsyncExplainCalls, ExplainCalls, Explained as Explained
from vivace.client_request import (
    PastEvent,
    address,
    append_tensors,
    batch_tensors,
    event_names,
    limits,
    number,
    request_tensors,
)
from vivace.client_updates import AsyncUpdateCalls, Tensors, UpdateCalls
from vivace.credentials import Credentials
from vivace.http_pool import HttpClient
from vivace.store.interface import Event

__all__ = [
    "Appended", "AsyncVivaceClient", "Event", "Explained", "Recommendation", "VivaceClient", "VivaceError",
    "VivaceTimeoutError",
]  # fmt: skip

PROTOCOLS = ("grpc", "http")
BATCH = 32  # events of one append request


@dataclass(frozen=True)
class Recommendation:
    """One answer, best item first; ``heads`` maps a task head to calibrated probabilities (of an answer to a query: 0
    where the recommender does not know the item). ``understood``: what a query was taken for, its facets, and which
    branches found each item; {} without one. ``request_id``: what an event of this answer is appended with."""

    items: list[str]
    scores: np.ndarray
    heads: dict[str, np.ndarray]
    status: str
    understood: dict[str, Any] = field(default_factory=dict)
    request_id: str = ""

    @property
    def degraded(self) -> bool:
        """Whether it was answered with less; by business rules alone it was not."""
        return self.status != contract.STATUS_OK and not self.status.startswith(f"{contract.STATUS_OK}; ")


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
    response = result.get_response()
    request_id = response.get("id", "") if isinstance(response, dict) else response.id
    heads = {name.lower(): array[0] for name, array in arrays.items()}
    return Recommendation(items, scores, heads, status, understood, request_id)


def read_appended(result: Any) -> list[Appended]:
    """The answer of an ``append_event`` call, one a row."""
    lengths = result.as_numpy(contract.HISTORY_LENGTH.name)[:, 0].tolist()
    there = contract.STATUS.name in outputs_of(result)
    statuses = [s.decode() for s in result.as_numpy(contract.STATUS.name)[:, 0]] if there else [""] * len(lengths)
    return [Appended(length, status) for length, status in zip(lengths, statuses, strict=True)]


def _seconds(timeout_s: float) -> float:
    if number(timeout_s, "timeout_s") <= 0:
        raise ValueError(f"timeout_s: expected more than 0, got {timeout_s:g}")
    return float(timeout_s)


def _read(read: Any, result: Any) -> Any:
    """``read(result)``; raises VivaceError for an answer that is none of ours."""
    try:
        return read(result)
    except Exception as error:
        raise VivaceError(f"the answer is not one of a Vivace server: {type(error).__name__}: {error}") from error


CLOSED = "this client is closed; make another"


class VivaceClient(UpdateCalls, ExplainCalls):
    """Blocking calls, from any number of threads. ``url`` is host:port of the protocol's endpoint (8001 gRPC, 8000 HTTP
    by default). No call takes longer than ``timeout_s``. ``access``: ``key``, ``tls``, ``ca``, ``cert`` and
    ``server_name`` of ``vivace.credentials.Credentials``, for a server that asks for a key or speaks TLS."""

    def __init__(
        self, url: str = "127.0.0.1:8001", protocol: str = "grpc", timeout_s: float = 10.0, **access: Any
    ) -> None:
        self._module = _module(protocol, asynchronous=False)
        self._timeout_s, self._closed = _seconds(timeout_s), False
        address(url)
        credentials = Credentials(**access)
        self._headers = credentials.headers
        http = protocol == "http"
        self._client = HttpClient(url, credentials) if http else credentials.grpc_client(self._module, url)

    def _infer(
        self, model: str, tensors: list[tuple[contract.WireTensor, np.ndarray]], limit: Limit | None = None, **more: Any
    ) -> Any:
        if self._closed:
            raise VivaceError(CLOSED)
        limit = limit or Limit(self._timeout_s)
        try:
            inputs = inputs_of(self._module, tensors)
            return self._client.infer(model, inputs, client_timeout=limit.left(), headers=self._headers, **more)
        except Exception as error:
            raise limit.error(VivaceError(CLOSED) if self._closed else error) from error

    def recommend(
        self,
        user_id: str = "",
        history: Sequence[PastEvent] = (),
        top_k: int = 10,
        query: str = "",
        within_ms: float = 0.0,
        filters: Mapping[str, Any] | None = None,
        diversity: float = 0.0,
        context: Mapping[str, Any] | None = None,
        request_id: str = "",
        session: str = "",
    ) -> Recommendation:
        """Items for a user; an empty ``history`` asks the feature store for the user's own. ``within_ms``: server and
        client give up afterwards (0: after ``timeout_s``). Of a ``query``: ``filters`` {"values": {attribute: [...]},
        "ranges": {number: [low, high]}, "seen": False} and ``diversity`` 0..1 of the answer. ``context``: what is known
        of the moment and the user by the data set's columns, such as {"device": "phone"}; an event of ``history`` may
        be (item id, event type, Unix time in ms). ``request_id``: what the log of impressions calls this request; one
        is made if empty. ``session``: tells someone anonymous from others, in rollouts and experiments. Raises
        VivaceError where the server refuses or fails, VivaceTimeoutError where no answer came in time, and ValueError
        for values of a wrong type."""
        tensors = request_tensors(user_id, history, top_k, query, context)
        more = limits(within_ms, filters, diversity, request_id, session)
        limit = Limit(self._timeout_s, within_ms)
        return _read(read_answer, self._infer(contract.ENSEMBLE, tensors, limit, **more))  # type: ignore[no-any-return]

    def append(
        self, user_id: str, item_id: str, event_type: str = "", timestamp_ms: int = 0, event_id: str = "",
        context: Mapping[str, Any] | None = None, request_id: str = "",
    ) -> Appended:  # fmt: skip
        """Adds an event to the user's stored history (time 0: now); returns its new length, an int whose ``status``
        says whether item and type are known. A server that cannot be reached is asked again, within ``timeout_s``: the
        event is stored once. ``event_id``, the caller's own name of a user's event, extends that to calls that the
        caller repeats. ``context``: what was known of the moment, as for ``recommend``. ``request_id``: that of the
        answer which the item was shown in. Raises VivaceError, and ValueError for values of a wrong type."""
        tensors = append_tensors(user_id, item_id, event_type, timestamp_ms, context)
        appended: Appended = self._append(tensors, event_id, request_id)[0]
        return appended

    def append_many(self, events: Sequence[Event], event_id: str = "", request_id: str = "") -> list[Appended]:
        """The same for many events (``vivace.Event``, whose ``context`` is JSON), BATCH to a request. ``event_id``: of
        all together; each has its place in it; so is ``request_id``. A bad event of a request costs those beside it:
        nothing of that request is stored."""
        events, out = list(events), list[Appended]()
        for start in range(0, len(events), BATCH):
            part = batch_tensors(events[start : start + BATCH], start)
            out += self._append(part, event_id and f"{event_id}/{start}", request_id)
        return out

    def _append(self, tensors: Tensors, event_id: str, request_id: str) -> list[Appended]:
        result = self._again(contract.APPEND_EVENT, tensors, parameters=event_names(event_id, request_id))
        return _read(read_appended, result)  # type: ignore[no-any-return]

    def configuration(self, model: str = contract.ENSEMBLE) -> dict[str, Any]:
        """Triton's configuration of a model: ``input``, ``output``, ``parameters`` and others. Raises VivaceError, also
        where the server has no such model or does not offer it."""
        limit = Limit(self._timeout_s)
        more: dict[str, Any] = {} if isinstance(self._client, HttpClient) else {"as_json": True}
        try:
            config = self._client.get_model_config(model, client_timeout=limit.left(), headers=self._headers, **more)
        except Exception as error:
            raise limit.error(error) from error
        configuration: dict[str, Any] = config.get("config", config)
        return configuration

    def offers(self, model: str) -> bool:
        """Whether the server has ``model`` and it is ready. Raises VivaceError where the server does not answer."""
        limit = Limit(self._timeout_s)
        try:
            return bool(self._client.is_model_ready(model, client_timeout=limit.left(), headers=self._headers))
        except Exception as error:
            failed = limit.error(error)
            if failed.passing:
                raise failed from error
            return False

    def about(self) -> dict[str, str]:
        """What the server says of what it serves: ``data``, the name of the data set, ``precision`` and
        others; a run that was compiled before it could says less. Raises VivaceError."""
        parameters = self.configuration().get("parameters", {})
        return {key: str(value["string_value"]) for key, value in parameters.items()}

    def close(self) -> None:
        self._closed = True
        self._client.close()

    def __enter__(self) -> VivaceClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncVivaceClient(AsyncUpdateCalls, AsyncExplainCalls):
    """The same calls for asyncio. Make it inside the running loop that it is used in."""

    def __init__(
        self, url: str = "127.0.0.1:8001", protocol: str = "grpc", timeout_s: float = 10.0, **access: Any
    ) -> None:
        self._module = _module(protocol, asynchronous=True)
        self._timeout_s, self._closed = _seconds(timeout_s), False
        address(url)
        self._loop = self._running_loop()
        credentials = Credentials(**access)
        self._headers = credentials.headers
        if protocol == "grpc":
            self._client = credentials.grpc_client(self._module, url)
            return
        tls = {"ssl": True, "ssl_context": credentials.ssl_context()} if credentials.tls else {}
        self._client = self._module.InferenceServerClient(url, conn_timeout=timeout_s, conn_limit=512, **tls)

    @staticmethod
    def _running_loop() -> asyncio.AbstractEventLoop:
        try:
            return asyncio.get_running_loop()
        except RuntimeError:
            raise VivaceError("AsyncVivaceClient: make it inside a running event loop") from None

    async def _infer(
        self, model: str, tensors: list[tuple[contract.WireTensor, np.ndarray]], limit: Limit | None = None, **more: Any
    ) -> Any:
        if self._closed:
            raise VivaceError(CLOSED)
        if self._running_loop() is not self._loop:
            raise VivaceError("AsyncVivaceClient: made in another event loop; make one in each")
        limit = limit or Limit(self._timeout_s)
        try:
            async with asyncio.timeout(limit.left()):
                inputs = inputs_of(self._module, tensors)
                return await self._client.infer(model, inputs, headers=self._headers, **more)
        except Exception as error:
            raise limit.error(VivaceError(CLOSED) if self._closed else error) from error

    async def recommend(
        self,
        user_id: str = "",
        history: Sequence[PastEvent] = (),
        top_k: int = 10,
        query: str = "",
        within_ms: float = 0.0,
        filters: Mapping[str, Any] | None = None,
        diversity: float = 0.0,
        context: Mapping[str, Any] | None = None,
        request_id: str = "",
        session: str = "",
    ) -> Recommendation:
        """See ``VivaceClient.recommend``."""
        tensors = request_tensors(user_id, history, top_k, query, context)
        more = limits(within_ms, filters, diversity, request_id, session)
        result = await self._infer(contract.ENSEMBLE, tensors, Limit(self._timeout_s, within_ms), **more)
        return _read(read_answer, result)  # type: ignore[no-any-return]

    async def append(
        self, user_id: str, item_id: str, event_type: str = "", timestamp_ms: int = 0, event_id: str = "",
        context: Mapping[str, Any] | None = None, request_id: str = "",
    ) -> Appended:  # fmt: skip
        """See ``VivaceClient.append``."""
        tensors = append_tensors(user_id, item_id, event_type, timestamp_ms, context)
        appended: Appended = (await self._append(tensors, event_id, request_id))[0]
        return appended

    async def append_many(self, events: Sequence[Event], event_id: str = "", request_id: str = "") -> list[Appended]:
        """See ``VivaceClient.append_many``."""
        events, out = list(events), list[Appended]()
        for start in range(0, len(events), BATCH):
            part = batch_tensors(events[start : start + BATCH], start)
            out += await self._append(part, event_id and f"{event_id}/{start}", request_id)
        return out

    async def _append(self, tensors: Tensors, event_id: str, request_id: str) -> list[Appended]:
        result = await self._again(contract.APPEND_EVENT, tensors, parameters=event_names(event_id, request_id))
        return _read(read_appended, result)  # type: ignore[no-any-return]

    async def close(self) -> None:
        self._closed = True
        await self._client.close()

    async def __aenter__(self) -> AsyncVivaceClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
