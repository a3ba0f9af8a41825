"""What was shown, as the models see it: the log of it, off unless the server was told to keep one, and samples of it
while a version is on trial.

Runs inside Triton's Python stub only (it imports ``triton_python_backend_utils``).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from serving.runtime.answer_samples import ENVIRONMENT as ANSWERS, AnswerSamples
from serving.triton.stage import Counts, ParsedRequest, strings
from vivace.contract import MAX_PARAMETER_ID_BYTES, SESSION, SHOWN_TO, UNLOGGED
from vivace.impressions.queue import ENVIRONMENT, Drafts, Viewer, packed_viewer, queue_of_worker


def is_on() -> bool:
    """Whether the server was started with a log."""
    return bool(os.environ.get(ENVIRONMENT))


def id_of(request: Any) -> str:
    """A request's id; "" for none, or one that no event can name."""
    try:
        return str(request.request_id())
    except UnicodeDecodeError:
        return ""


def session_of(request: Any) -> str:
    """The parameter SESSION; "" where it is none, or one too long."""
    parameters = request.parameters()
    given = json.loads(parameters).get(SESSION) if SESSION in parameters else None
    return given if isinstance(given, str) and len(given) <= MAX_PARAMETER_ID_BYTES else ""


def viewers(request: ParsedRequest, began_ms: float) -> list[Viewer | None]:
    """Whom each row of a request is for, which the first stage began with at ``began_ms``, Unix ms; None of one that is
    at fault, which is shown nothing."""
    session = "" if all(row.user_id for row in request.rows) else session_of(request.request)
    return [
        None if error else (row.user_id, row.query, context, began_ms, "" if row.user_id else session)
        for row, error, context in zip(request.rows, request.errors, request.contexts, strict=True)
    ]


def shown_to(request: ParsedRequest, began_ms: float, sampled: bool = False) -> np.ndarray:
    """SHOWN_TO of a request's rows, "" where answers are neither logged nor ``sampled``."""
    if not (is_on() or sampled):
        return strings([""] * len(request.rows))
    packed = [packed_viewer(viewer) if viewer else b"" for viewer in viewers(request, began_ms)]
    return np.array(packed, object)[:, None]


class Impressions:
    """That of the process which makes the answers. Requests that were written and that were dropped are on Triton's
    metrics page, handed on with later requests."""

    def __init__(self, model_version: str, inputs: list[str]) -> None:
        knows = SHOWN_TO.name in inputs
        if is_on() and not knows:
            pb_utils.Logger.log_warn(
                "impressions: not logged, as this version was compiled before there was a log: 'vivace compile'"
            )
        self._samples = AnswerSamples(os.environ.get(ANSWERS, "") if knows else "")
        self._queue = queue_of_worker(os.environ.get(ENVIRONMENT, "") if knows else "", model_version)
        self._next_s = 0.0
        if self._queue is not None:
            self._counts = Counts("vivace_impressions_total", "Requests to log, by what became of them")
            self._counted = (0, 0)

    def __bool__(self) -> bool:
        return self._queue is not None or self._samples.on()

    def put(
        self, request: Any, rows: Sequence[Viewer | bytes | None], items_BK: np.ndarray, scores_BK: np.ndarray,
        status_B: np.ndarray, request_id: str = "", drafts: Drafts | None = None,
        propensities_BK: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """The answer to a request: ``viewers`` or SHOWN_TO, ITEM_ID, SCORE and STATUS of its rows; its id, if it is at
        hand; what was drafted, where two versions were interleaved; the chance of what is shown, where something
        explores."""
        request_id = request_id or id_of(request)
        if request_id == UNLOGGED:
            return
        made_ms = time.time() * 1000
        if self._samples.on():
            self._samples.put(request_id, rows, items_BK, scores_BK, status_B.tolist(), made_ms, drafts)
        if self._queue is None:
            return
        # scores are a view of Triton's memory, which goes with the answer
        self._queue.put(
            (request_id, rows, items_BK, scores_BK.copy(), status_B.tolist(), made_ms, drafts, propensities_BK)
        )

    def hand_over(self) -> None:
        self._samples.hand_over()
        if self._queue is None or time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + Counts.EVERY_S
        now, before = (self._queue.logged, self._queue.dropped), self._counted
        for how, more in zip(("written", "dropped"), np.subtract(now, before).tolist(), strict=True):
            if more:
                self._counts(how, more)
        self._counted = now
        self._counts.hand_over()

    def close(self) -> None:
        if self._queue is not None:
            self._queue.close()
