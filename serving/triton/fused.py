"""The whole call as one Python model: what the profile ``fused`` puts in the ensemble's place.

Runs inside Triton's Python stub only (it imports ``triton_python_backend_utils``).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from serving.runtime.overload import Level, Overload
from serving.runtime.pipeline import Pipeline
from serving.runtime.stages import Row, with_reason
from serving.triton import impressions
from serving.triton.graph_model import answer, each_by_itself, failure, hopeless, refusal
from serving.triton.stage import Counts, ParsedRequest, Stage, refused, search_options, strings
from vivace import contract

WAY_BACK_MS = 10  # from the answer to the client where processors are short


class Batch:
    """The requests of one call of ``execute`` that are still to be answered, on their way through the stages.

    ``responses``: of all requests of the call, by place; None where there is none yet.
    """

    def __init__(self, requests: list[ParsedRequest], responses: list[Any], counts: Counts) -> None:
        self.requests, self.responses, self.counts = requests, responses, counts
        self.began_ms = time.time() * 1000

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


class RecommendModel(Stage):
    """The whole call in one process: takes the ensemble's place under the profile ``fused``.

    Before each stage requests whose deadline has passed are answered so and left out. Under load (see ``Overload``)
    stages are skipped, and STATUS says which.
    """

    def setup(self) -> None:
        seen, threads = self.parameters["exclude_seen"] == "true", int(self.parameters["intra_op_thread_count"])
        repository, ranked = self.folder.parent.parent, int(self.parameters["ranked"])
        self.pipeline = Pipeline(
            repository, self.folder.name, self.shapes(), self.store(readonly=True), seen, threads, ranked
        )
        self.overload, self.counts = Overload(int(self.parameters["overload_rows"])), Counts()
        self.impressions = impressions.Impressions(self.folder.name, [contract.SHOWN_TO.name])  # in its own hands
        for level, seconds in self.pipeline.warm(self.largest):
            self.overload.done(level, self.largest, seconds)

    @each_by_itself
    def execute(self, requests: list[Any]) -> list[Any]:
        columns = self.pipeline.transform.moment.columns
        parsed = [ParsedRequest(i, request, columns) for i, request in enumerate(requests)]
        batch = Batch(parsed, [None] * len(requests), self.counts)
        rows, began, batch.began_ms = len(batch.rows), time.monotonic(), time.time() * 1000
        level = self._level(batch, rows)
        self._answer(batch, level)
        answered = sum(len(r.rows) for r in parsed if not batch.responses[r.place].has_error())
        self.overload.done(level, answered, time.monotonic() - began)
        self.counts.hand_over()
        self.impressions.hand_over()
        return batch.responses

    def finalize(self) -> None:
        self.impressions.close()

    def _level(self, batch: Batch, rows: int) -> Level:
        """The level at which these are answered: under load, one at which half of those with a deadline keep it. The
        others, which cannot be answered in time, are refused."""
        level = self.overload(rows, time.monotonic())
        if not self.overload.on or all(r.deadline == math.inf for r in batch.requests):
            return level
        now_ms = time.time() * 1000
        left_ms = [r.deadline - now_ms - WAY_BACK_MS for r in batch.requests]
        level = self.overload.fitting(level, rows, statistics.median(left_ms) / 1000)
        needs_ms = self.overload.at_worst(level, rows) * 1000
        for request, left in zip(batch.requests, left_ms, strict=True):
            if -WAY_BACK_MS <= left < needs_ms:  # what is past has its own words
                batch.answer(request, hopeless(max(left, 0.0), needs_ms))
                self.counts("deadline near", len(request.rows))
        return level

    def _answer(self, batch: Batch, level: Level) -> None:
        whole = list(batch.requests)
        try:
            self._stages(batch, level)
        except Exception as error:
            if len(whole) > 1:  # find the request that is at fault: the others get their answers
                for request in whole:
                    if batch.responses[request.place] is None:
                        self._answer(Batch([request], batch.responses, self.counts), level)
                return
            batch.answer(whole[0], failure(error))

    def _stages(self, batch: Batch, level: Level) -> None:
        for request in batch.requests:
            if batch.responses[request.place] is None and len(request.rows) == 1 and request.errors[0]:
                batch.answer(request, refused(request.errors[0]))
        batch.keep_unanswered()
        batch.refuse_late(contract.FEATURE_TRANSFORM)
        self._read_search_options(batch)
        if not batch.requests:
            return
        inputs, statuses = self.pipeline.transform(batch.rows)
        status_B, arrays = np.array(statuses, object), inputs
        ranked_count = self.pipeline.ranked
        if level == Level.POPULAR:
            history_BT = inputs[0]
            ranked_BN, values_BCN = self.pipeline.popular(inputs)
        else:
            status_B, *arrays = batch.refuse_late(contract.RETRIEVAL, [status_B, *inputs])
            if not batch.requests:
                return
            history_BT, retrieved = arrays[0], self.pipeline.retrieve(arrays)
            if level == Level.RETRIEVED:
                ranked_BN, values_BCN = self.pipeline.retrieved(history_BT, retrieved)
            else:
                status_B, history_BT, *retrieved = batch.refuse_late(
                    contract.RANKING, [status_B, history_BT, *retrieved]
                )
                if not batch.requests:
                    return
                ranked_count = self.pipeline.count_to_rank(max(row.top_k for row in batch.rows), level)
                ranked_BN, values_BCN = self.pipeline.rank(history_BT, retrieved, ranked_count)
        ranked_BN, values_BCN = self._search(batch, history_BT, ranked_BN, values_BCN)
        status_B, ranked_BN, values_BCN = batch.refuse_late(contract.RESPONSE, [status_B, ranked_BN, values_BCN])
        self._respond(batch, ranked_BN, values_BCN, status_B, level.status(ranked_count, self.pipeline.ranked))
        self.counts.answered(status_B, level.name.lower())

    def _read_search_options(self, batch: Batch) -> None:
        """Reads what requests with a query ask of its answer; those that cannot be met get their errors."""
        if self.pipeline.search is None:
            return
        for request in batch.requests:
            try:
                if request.has_query:
                    request.options = search_options(request.request)
                    self.pipeline.search.index.allowed(request.options.filters)
            except ValueError as error:
                batch.answer(request, refused(str(error)))
        batch.keep_unanswered()

    def _search(
        self, batch: Batch, history_BT: np.ndarray, ranked_BN: np.ndarray, values_BCN: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ranked ids and values, those of rows with a query from what the query finds."""
        if self.pipeline.search is None:
            return ranked_BN, values_BCN
        options = [request.options for request in batch.requests for _ in request.rows]
        queries = [row.query for row in batch.rows]
        (ranked_BN, values_BCN), understood = self.pipeline.searched(
            queries, options, history_BT, (ranked_BN, values_BCN)
        )
        texts = iter(understood)
        for request in batch.requests:
            request.understood = [next(texts) for _ in request.rows]
        return ranked_BN, values_BCN

    def _respond(
        self, batch: Batch, ranked_BN: np.ndarray, values_BCN: np.ndarray, status_B: np.ndarray, reason: str
    ) -> None:
        start = 0
        for request in batch.requests:
            stop = start + len(request.rows)
            rows = zip(request.errors, status_B[start:stop], strict=True)
            status = strings(
                [f"{contract.STATUS_ERROR}{error}" if error else with_reason(status, reason) for error, status in rows]
            )
            top_k = np.array([row.top_k for row in request.rows])
            values = self.pipeline.respond(ranked_BN[start:stop], values_BCN[start:stop], top_k, status[:, 0])
            if self.impressions:
                viewers = impressions.viewers(request, batch.began_ms)
                self.impressions.put(request.request, viewers, values[0], values[1], status[:, 0])
            if self.pipeline.search is not None:
                values.append(strings(request.understood))
            batch.answer(request, answer(request.request, self.outputs, [*values, status]))
            start = stop
