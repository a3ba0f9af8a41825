"""The client's calls that change what a server knows: items put in and taken out, a user forgotten."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from vivace import contract
from vivace.client_errors import Limit, VivaceError
from vivace.client_request import plain

ROWS = 64  # of one request: what a server takes
Tensors = list[tuple[contract.WireTensor, np.ndarray]]


def _batches(action: str, records: list[bytes]) -> Iterator[Tensors]:
    for start in range(0, len(records), ROWS):
        part = records[start : start + ROWS]
        columns = np.array([action.encode()] * len(part), object), np.array(part, object)
        yield [(tensor, column[:, None]) for tensor, column in zip(contract.UPDATE, columns, strict=True)]


def _row(row: Mapping[str, Any], place: int) -> bytes:
    """Raises ValueError for what is no row, or too large a one."""
    if not isinstance(row, Mapping):
        raise ValueError(f"rows[{place}]: expected a dict of columns, got {type(row).__name__} {row!r:.60}")
    try:
        record = json.dumps(dict(row), ensure_ascii=False, default=plain).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"rows[{place}]: expected what JSON can hold, got {row!r:.200}: {error}") from None
    if len(record) > contract.MAX_ROW_BYTES:
        raise ValueError(
            f"rows[{place}]: expected at most {contract.MAX_ROW_BYTES} bytes as JSON, got {len(record)}; shorten it"
        )
    return record


def _id(value: str, name: str) -> bytes:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name}: expected a text that is not empty, got {type(value).__name__} {value!r:.60}")
    return value.encode()


def _upserts(rows: Iterable[Mapping[str, Any]]) -> list[Tensors]:
    if isinstance(rows, Mapping | str):
        raise ValueError(f"rows: expected a list of rows, got one {type(rows).__name__}; write [row]")
    return list(_batches(contract.UPSERT, [_row(row, place) for place, row in enumerate(rows)]))


def _removals(item_ids: Iterable[str]) -> list[Tensors]:
    if isinstance(item_ids, str):
        raise ValueError(f"item_ids: expected a list of item ids, got {item_ids!r:.60}; write [{item_ids!r:.60}]")
    return list(_batches(contract.REMOVE, [_id(item, f"item_ids[{place}]") for place, item in enumerate(item_ids)]))


def _forgetting(user_id: str) -> list[Tensors]:
    return list(_batches(contract.FORGET, [_id(user_id, "user_id")]))


def _statuses(result: Any) -> list[str]:
    return [status.decode() for status in result.as_numpy(contract.STATUS.name)[:, 0]]


class UpdateCalls:
    """Of ``VivaceClient``. A call that could not be made is made again, within ``timeout_s``: to put in or take out
    twice is to do it once. Rows that were acknowledged are stored, whatever becomes of the rest."""

    _timeout_s: float

    def _infer(self, model: str, tensors: Tensors, limit: Limit | None = None, **more: Any) -> Any:
        raise NotImplementedError

    def _again(self, model: str, tensors: Tensors, **more: Any) -> Any:
        """The result of a call that may be made twice; made again where the server has no time or cannot be reached."""
        limit, tries = Limit(self._timeout_s), 0
        while True:
            try:
                return self._infer(model, tensors, limit, **more)
            except VivaceError as error:
                time.sleep(limit.wait_s(error, tries))
            tries += 1

    def _update(self, batches: list[Tensors]) -> list[str]:
        return [status for tensors in batches for status in _statuses(self._again(contract.UPDATE_STORE, tensors))]

    def upsert_items(self, rows: Iterable[Mapping[str, Any]]) -> list[str]:
        """Puts items into the catalogue, or rows in the place of theirs: dicts by the catalogue's own column names,
        whole rows (what is left out is null). STATUS of each: "ok", "degraded: …" with what of it is not as it should
        be, or "error: …" where the row was refused. Raises VivaceError where the call fails, ValueError for values of a
        wrong type."""
        return self._update(_upserts(rows))

    def remove_items(self, item_ids: Iterable[str]) -> list[str]:
        """Takes items out: they are in no later answer until they are put in again. STATUS and errors as above."""
        return self._update(_removals(item_ids))

    def forget(self, user_id: str) -> str:
        """Takes a user out of the feature store; STATUS says what was known. Errors as above."""
        return self._update(_forgetting(user_id))[0]


class AsyncUpdateCalls:
    """The same calls for asyncio."""

    _timeout_s: float

    async def _infer(self, model: str, tensors: Tensors, limit: Limit | None = None, **more: Any) -> Any:
        raise NotImplementedError

    async def _again(self, model: str, tensors: Tensors, **more: Any) -> Any:
        """See ``UpdateCalls._again``."""
        limit, tries = Limit(self._timeout_s), 0
        while True:
            try:
                return await self._infer(model, tensors, limit, **more)
            except VivaceError as error:
                await asyncio.sleep(limit.wait_s(error, tries))
            tries += 1

    async def _update(self, batches: list[Tensors]) -> list[str]:
        results = [await self._again(contract.UPDATE_STORE, tensors) for tensors in batches]
        return [status for result in results for status in _statuses(result)]

    async def upsert_items(self, rows: Iterable[Mapping[str, Any]]) -> list[str]:
        """See ``UpdateCalls.upsert_items``."""
        return await self._update(_upserts(rows))

    async def remove_items(self, item_ids: Iterable[str]) -> list[str]:
        """See ``UpdateCalls.remove_items``."""
        return await self._update(_removals(item_ids))

    async def forget(self, user_id: str) -> str:
        """See ``UpdateCalls.forget``."""
        return (await self._update(_forgetting(user_id)))[0]
