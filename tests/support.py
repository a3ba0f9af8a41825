"""What several test files need: patience with a busy machine, and a server on free ports."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pyarrow.parquet as pq
import tritonclient.grpc as grpcclient

from preprocessing.features import Features
from serving.server_options import ServerOptions
from vivace.client import AsyncVivaceClient, Recommendation, VivaceClient, VivaceError, inputs_of
from vivace.contract import ENSEMBLE, HISTORY, USER
from vivace.manifest import CHECKOUT

AT_ONCE = 30  # rows of a request
T = TypeVar("T")
NOON = {"hour": "12", "weekday": "2"}  # for answers that are compared: the models read the clock
LOGS: dict[str, Any] = {"impressions": True, "impressions_every_s": 1.0, "variant": "b"}  # options of a server
PATIENCE_S = 180.0  # far beyond what any machine takes: who waits so long has failed
WAITED_TOO_LONG = ("timeout expired", "exceeds maximum queue size")  # Triton's words where a queue refuses
IN_A_HURRY = "load: "  # STATUS where less was ranked because the machine is busy


def quiet(_: str) -> None:
    """For functions that report their progress."""


def vivace(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line, run in the checkout to its end."""
    command = [sys.executable, "-m", "vivace.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT)


def wait_until(condition: Callable[[], T], expected: str, every_s: float = 0.05) -> T:
    """The first value of ``condition`` that is true; AssertionError with the last one after ``PATIENCE_S``."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"expected {expected} within {PATIENCE_S:.0f} s, got {value!r}"
        time.sleep(every_s)
    return value


class Second:
    """A second, or ``length_s``, of a server's own time, from now on: within it all its processes count what was
    appended. Not counted is what they spent ready to run while other jobs had the cores, up to ``PATIENCE_S``."""

    def __init__(self, server: Any, length_s: float = 1.0) -> None:
        self._pid, self._length_s = server.pid, length_s
        self._began, self._waited_ns = time.monotonic(), _waited_ns(server.pid)

    def left_s(self) -> float:
        waited = _waited_ns(self._pid)
        longest_ns = max((ns - self._waited_ns.get(pid, 0) for pid, ns in waited.items()), default=0)
        return self._length_s + min(longest_ns / 1e9, PATIENCE_S) - (time.monotonic() - self._began)

    def pass_by(self) -> None:
        """Returns when it is over."""
        while (left_s := self.left_s()) > 0:
            time.sleep(left_s)

    def shows(self, ask: Callable[[], T], right: Callable[[T], bool], expected: str) -> T:
        """The first answer that is ``right``; AssertionError where one that was asked for when the time was over is
        not."""
        while True:
            left_s = self.left_s()
            if right(answer := ask()):
                return answer
            assert left_s > 0, f"expected {expected} after {self._length_s:g} s, got {answer!r}"


def _waited_ns(pid: int) -> dict[int, int]:
    """How long the threads of a process, and of each below it, were ready and had no core, by its pid."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    waited = dict.fromkeys((process.pid for process in family), 0)
    for member in waited:
        for task in Path(f"/proc/{member}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):  # one that ended
                waited[member] += int(task.read_text().split()[1])
    return waited


def heard(connection: socket.socket, words: bytes) -> bytes:
    """What comes until ``words`` are in it, or to its end: an answer may come in pieces."""
    answer = b""
    while words not in answer and (part := connection.recv(1 << 16)):
        answer += part
    return answer


def on_free_ports(repository: Path, **more: Any) -> ServerOptions:
    """A server of ``repository``; its log lies beside it where ``log`` does not say otherwise."""
    more.setdefault("start_timeout_s", PATIENCE_S)
    more.setdefault("log", repository.parent / f"triton-{more.get('profile') or 'default'}.log")
    return ServerOptions(repository, http_port=0, grpc_port=0, metrics_port=0, **more)


def untouched_store(root: Path) -> Path:
    """The feature store of the small shop as it was prepared, whatever other tests have appended since."""
    return root.parent / "untouched" / "feature_store"


def own_copy(root: Path, folder: Path) -> Path:
    """The small shop in ``folder``, with a store of its own as it was prepared."""
    own = folder / "shop"
    shutil.copytree(root, own, symlinks=True, ignore=shutil.ignore_patterns("feature_store"))
    shutil.copytree(untouched_store(root), own / "feature_store")
    return own


def users_of_data(root: Path) -> set[str]:
    """Users of a run's data set, not those that tests before this one appended events of to its store."""
    files = Features(root / "features").files("train")
    return {user for file in files for user in pq.read_table(file, columns=[USER])[USER].to_pylist()}


def logged(root: Path, request_id: str) -> dict[str, Any]:
    """What the log of impressions says of a request, once it does."""
    from vivace.impressions.files import REQUEST_ID, SCHEMA, parts

    def look() -> list[dict[str, Any]]:
        tables = [pq.read_table(path, schema=SCHEMA) for path in parts(root / "impressions")]
        return [row for table in tables for row in table.to_pylist() if row[REQUEST_ID] == request_id]

    (row,) = wait_until(look, f"request {request_id} in the log of impressions")
    return row


def waited_too_long(error: Exception | str) -> bool:
    return any(sign in str(error).lower() for sign in WAITED_TOO_LONG)


def in_a_hurry(answer: object) -> bool:
    """Whether an answer, or one of a list, was shortened because the machine is busy."""
    if isinstance(answer, list):
        return any(map(in_a_hurry, answer))
    return isinstance(answer, Recommendation) and IN_A_HURRY in answer.status


class PatientClient(VivaceClient):
    """Asks again where a queue refused after its second of waiting, and where less was ranked because of the load: on a
    busy machine neither says anything of the answer. What a queue refused was not executed, so an event is not appended
    twice."""

    def __init__(self, url: str, protocol: str = "grpc") -> None:
        super().__init__(url, protocol, timeout_s=PATIENCE_S)

    def recommend(self, *arguments: Any, **named: Any) -> Recommendation:
        return patient(lambda: super(PatientClient, self).recommend(*arguments, **named))

    def append(self, *arguments: Any, **named: Any) -> int:
        return patient(lambda: super(PatientClient, self).append(*arguments, **named))


def patient(call: Callable[[], T]) -> T:
    """The answer of ``call``, made again while a queue refuses it or load shortens it; any other error is raised."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            if not in_a_hurry(answer := call()) or time.monotonic() > deadline:
                return answer
        except Exception as error:
            if not waited_too_long(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """``patient`` for asyncio."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            if not in_a_hurry(answer := await call()) or time.monotonic() > deadline:
                return answer
        except VivaceError as error:
            if not waited_too_long(error) or time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.05)


def patient_async_client(url: str, protocol: str = "grpc") -> AsyncVivaceClient:
    return AsyncVivaceClient(url, protocol, timeout_s=PATIENCE_S)


def recommend_rows(server: Any, rows: list[list[tuple[Any, np.ndarray]]], request_id: str = "") -> list[Any]:
    """Answers to ``request_tensors`` of each row, as few requests of ``AT_ONCE`` rows; their ids are ``request_id``
    and a number."""
    results = []
    with grpcclient.InferenceServerClient(f"{server.host}:{server.grpc_port}") as raw:
        for start in range(0, len(rows), AT_ONCE):
            columns = list(zip(*rows[start : start + AT_ONCE], strict=True))
            histories = np.full((len(columns[2]), max(v.shape[1] for _, v in columns[2])), b"", object)
            for row, (_, history) in enumerate(columns[2]):
                histories[row, : history.shape[1]] = history
            columns[2] = ((HISTORY, histories),)
            inputs = inputs_of(grpcclient, [(c[0][0], np.concatenate([v for _, v in c])) for c in columns])
            id_ = request_id and f"{request_id}-{start // AT_ONCE}"
            results.append(patient(partial(raw.infer, ENSEMBLE, inputs, request_id=id_)))
    return results
