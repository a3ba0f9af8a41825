"""Requests on their way through the stages of one process.

Runs inside Triton's Python stub only (it imports ``triton_python_backend_utils``).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from serving.runtime.stages import Row
from serving.triton.graph_model import refusal
from serving.triton.stage import Counts, ParsedRequest


class Batch:
    """The requests of one call of ``execute`` that are still to be answered, on their way through the stages.

    ``responses``: of all requests of the call, by place; None where there is none yet.
    """

    def __init__(self, requests: list[ParsedRequest], responses: list[Any], counts: Counts) -> None:
        self.requests, self.responses, self.counts = requests, responses, counts
        self.began_ms = time.time() * 1000
        self.answers: dict[int, list[np.ndarray]] = {}  # to requests of one row, by place

    @property
    def rows(self) -> list[Row]:
        return [row for request in self.requests for row in request.rows]

    def answer(self, request: ParsedRequest, response: Any) -> None:
        self.responses[request.place] = response

    def keep_unanswered(self) -> None:
        self.requests = [r for r in self.requests if self.responses[r.place] is None]

    def refuse_late(self, stage: str, arrays: Sequence[np.ndarray] = ()) -> list[np.ndarray]:
        """Refuses requests whose deadline has passed before ``stage``; the others' rows of ``arrays``."""
        now_ms = time.time() * 1000
        in_time = [r.deadline >= now_ms for r in self.requests]
        if all(in_time):
            return list(arrays)
        for request in self.requests:
            if request.deadline < now_ms:
                self.answer(request, refusal(now_ms - request.deadline, stage))
                self.counts("deadline passed", len(request.rows))
        rows_in_time = np.repeat(in_time, [len(r.rows) for r in self.requests])
        self.keep_unanswered()
        return [array[rows_in_time] for array in arrays]
