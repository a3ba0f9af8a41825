"""Open load from a process of its own, where the measuring process starts servers: the fork that does it stops all
threads of a large process for some ten milliseconds, which its callers would count as theirs."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

import numpy as np

from benchmarks.fault_load import Load, Outcome

CHILD_S = 120.0  # that it may take to import what it needs, on a busy machine


def _child(url: str, sent: list[bytes], expected: list[tuple[bytes, ...]], pipe: Connection) -> None:
    pipe.send(None)
    while (due_s := pipe.recv()) is not None:
        load = Load(url, sent, expected, due_s)
        pipe.send(None)
        with load:
            pass
        pipe.send((load.records, load.wrong, load.without_store, load.refusals))


class LoadProcess:
    """A context manager; within it ``run`` is one ``Load`` after the other."""

    def __init__(self, url: str, sent: Sequence[bytes], expected: Sequence[tuple[bytes, ...]]) -> None:
        spawned = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawned.Pipe()
        self._process = spawned.Process(target=_child, args=(url, list(sent), list(expected), theirs), daemon=True)

    def __enter__(self) -> LoadProcess:
        self._process.start()
        if not self._pipe.poll(CHILD_S):
            raise RuntimeError(f"load: expected its process within {CHILD_S:.0f} s, and it has not begun")
        self._pipe.recv()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(CHILD_S)

    @contextlib.contextmanager
    def run(self, due_s: np.ndarray) -> Iterator[Outcome]:
        """Requests at ``due_s``, seconds from the block's beginning; it ends when all were answered."""
        self._pipe.send(due_s)
        self._pipe.recv()
        outcome = Outcome()
        yield outcome
        outcome.records, outcome.wrong, outcome.without_store, outcome.refusals = self._pipe.recv()
