"""What requests and answers look like now, counted by a worker in the bins of its version's reference.

A request costs one step of a queue; a thread of the worker bins what waits and adds it to a small file that the
supervisor reads. The reference is made by the same functions, so one code says what a feature is.

Axis legend: B rows, T history events, C values of an answered item: its score, then a probability a head.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vivace.context import ContextColumns
from vivace.contract import FIRST_ID, PADDING_ID, STATUS_ERROR, STATUS_RULES, StageTensors, TaskHead
from vivace.drift import CLICKED, EXPECTED, FILE, Reference

log = logging.getLogger(__name__)
ENVIRONMENT = "VIVACE_DRIFT"  # where a server's workers count: a folder
SUFFIX = ".counts"
TURN_S = 1.0  # between two looks at what waits
WAITING = 20_000  # batches that wait at most; what is more is not counted
HISTORY_LENGTH, UNKNOWN_SHARE, NEWEST_TYPE, QUERY = "history length", "unknown share", "newest type", "query"
UNKNOWN_EDGES = (0.0, 0.1, 0.25, 0.5)
SCORE = "score"

Inputs = list[np.ndarray]
"""HISTORY_IDS int64 [B, T], then those of ``StageTensors.moment`` that there are."""


def context_names(columns: ContextColumns, shapes: StageTensors) -> tuple[list[str], list[str]]:
    """Categorical and continuous columns that models read, in the order of the tensors, without the clock's, of which
    an hour's share says nothing, and without crosses, whose parts say it."""
    watched = [columns.categoricals[i] for i in columns.counted] if shapes.context else []
    return watched, list(columns.continuous) if shapes.amounts else []


def of_requests(
    shapes: StageTensors, columns: ContextColumns, inputs: Inputs, queried_B: np.ndarray
) -> dict[str, np.ndarray]:
    """Values [n] of each feature, of the rows with a history: those without are counted as "cold" elsewhere, and no
    held-out request is one. A share is of the events that are read, the newest ``shapes.history``."""
    lengths_B = (inputs[0] != PADDING_ID).sum(1)
    rows = lengths_B > 0
    history_BT, lengths_B = inputs[0][rows], lengths_B[rows]
    known_B = (history_BT >= FIRST_ID).sum(1)
    values = {HISTORY_LENGTH: lengths_B, UNKNOWN_SHARE: 1 - known_B / lengths_B}
    moment = inputs[1:]
    if shapes.types:
        values[NEWEST_TYPE] = moment.pop(0)[rows, -1]
    watched, continuous = context_names(columns, shapes)
    if shapes.context:
        ids_BC = moment.pop(0)[rows]
        values |= {f"context {name}": ids_BC[:, i] for i, name in enumerate(columns.categoricals) if name in watched}
    if shapes.amounts:
        amounts_BF = moment.pop(0)[rows]
        values |= {f"context {name}": amounts_BF[:, i] for i, name in enumerate(continuous)}
    if shapes.search:
        values[QUERY] = np.asarray(queried_B, np.int64)[rows]
    return values


def inputs_of(shapes: StageTensors, inputs: Sequence[np.ndarray]) -> Inputs:
    """Of the feature transform's tensors those that features are of."""
    start = 2 + shapes.timed
    return [inputs[0], *inputs[start : start + len(shapes.moment)]]


def answer_names(heads: Sequence[TaskHead]) -> list[str]:
    """Features of an answer: values of its first item."""
    return [SCORE, *(f"probability {head.name}" for head in heads)]


def is_counted(status: bytes) -> bool:
    """Whether an answer with this STATUS is one of the models, for someone with a history, ranked whole; by business
    rules it is not theirs alone."""
    less = (b"popular items", b"load: ", STATUS_RULES.encode())
    return bool(status) and not status.startswith(STATUS_ERROR.encode()) and not any(word in status for word in less)


class DriftCounts:
    """One worker's. ``requests`` and ``answered`` never wait; ``close`` counts what waits."""

    def __init__(
        self, reference: Reference, folder: Path, shapes: StageTensors | None = None,
        columns: ContextColumns | None = None,
    ) -> None:  # fmt: skip
        self.reference, self._shapes, self._columns = reference, shapes, columns or ContextColumns()
        shorter = shapes is not None and shapes.history != reference.history  # a profile that reads less of it
        self._apart = {HISTORY_LENGTH, UNKNOWN_SHARE} if shorter else set[str]()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = folder / f"{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}"
        self._slots = np.memmap(file, np.float64, "w+", shape=(reference.slots,))
        self._requests: deque[tuple[Inputs, list[bool]]] = deque(maxlen=WAITING)
        self._answers: deque[tuple[list[np.ndarray], Sequence[bytes], Sequence[bool]]] = deque(maxlen=WAITING)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="drift", daemon=True)
        self._thread.start()

    def requests(self, inputs: Sequence[np.ndarray], queried: list[bool]) -> None:
        """Rows as the feature transform gives them; ``queried``: whether each has a query."""
        assert self._shapes is not None
        self._requests.append((inputs_of(self._shapes, inputs), queried))

    def answered(self, shown: Sequence[np.ndarray], statuses: Sequence[bytes], queried: Sequence[bool]) -> None:
        """ITEM_ID, then the values [B, K] that each item is answered with, and STATUS of the rows."""
        values = [v.copy() for v in shown[1 : 1 + len(self.reference.answers)]]  # views of Triton's memory
        self._answers.append((values, statuses, queried))

    def clicked(self, events: int) -> None:
        """So many events that name the request whose answer they are of."""
        self._slots[CLICKED] += events

    def close(self) -> None:
        self._closing.set()
        self._thread.join(TURN_S)
        self._slots.flush()

    def _run(self) -> None:
        while not self._closing.wait(TURN_S):
            self.count()
        self.count()

    def count(self) -> None:
        """Bins what waits."""
        try:
            self._count_requests()
            self._count_answers()
        except Exception as error:  # such as a row of another shape: answers go on
            log.warning("drift: not counted: %s: %s", type(error).__name__, error)

    def _add(self, name: str, slots: np.ndarray) -> None:
        start = self.reference.offsets[name]
        self._slots[start : start + len(slots)] += slots

    def _count_requests(self) -> None:
        taken = [self._requests.popleft() for _ in range(len(self._requests))]
        if not taken or self._shapes is None:
            return
        inputs = [np.concatenate(parts) for parts in zip(*(i for i, _ in taken), strict=True)]
        values = of_requests(self._shapes, self._columns, inputs, np.concatenate([q for _, q in taken]))
        for feature in self.reference.inputs if len(values[HISTORY_LENGTH]) else ():
            if feature.name not in self._apart:
                self._add(feature.name, feature.counted(values[feature.name]))

    def _count_answers(self) -> None:
        first: list[list[float]] = []
        expected = 0.0
        for _ in range(len(self._answers)):
            values, statuses, queried = self._answers.popleft()
            for row in range(len(statuses)) if values[0].shape[1] else ():
                if is_counted(statuses[row]) and not queried[row]:
                    first.append([v[row, 0] for v in values])
                    expected += values[1][row].sum() if len(values) > 1 else 0.0
        for feature, values_n in zip(self.reference.answers, np.array(first).T, strict=True) if first else ():
            self._add(feature.name, feature.counted(values_n))
        self._slots[EXPECTED] += expected


def counts_of_worker(
    ensemble: Path, shapes: StageTensors | None = None, columns: ContextColumns | None = None
) -> DriftCounts | None:
    """That of a worker whose server counts; None where it does not, or the version was made before there was a
    reference. ``ensemble``: folder of the version's model card; ``shapes`` and ``columns``: of a worker that sees
    requests."""
    folder, file = os.environ.get(ENVIRONMENT, ""), ensemble / FILE
    if not folder or not file.exists():
        return None
    return DriftCounts(Reference.load(file), Path(folder), shapes, columns)
