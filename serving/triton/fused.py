"""The whole call as one Python model: what the profile ``fused`` puts in the ensemble's place.

Runs inside Triton's Python stub only (it imports ``triton_python_backend_utils``).
"""

from __future__ import annotations

import json
import math
import statistics
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from serving.runtime.pipeline import Level, Overload, Pipeline, joined
from serving.triton.graph_model import hopeless, refusal
from serving.triton.stage import Ask, Counts, Stage, refused, strings, wish_of
from vivace import contract

WAY_BACK_MS = 10  # from the answer to the client where processors are short


class RecommendModel(Stage):
    """The whole call in one process: takes the ensemble's place under the profile ``fused``.

    Before each stage requests whose deadline has passed are answered so and left out. Under load (see ``Overload``)
    stages are skipped, and STATUS says which.
    """

    def setup(self) -> None:
        shapes = contract.StageTensors(**json.loads(self.parameters["shapes"]))
        seen, threads = self.parameters["exclude_seen"] == "true", int(self.parameters["intra_op_thread_count"])
        repository, ranked = self.folder.parent.parent, int(self.parameters["ranked"])
        self.pipeline = Pipeline(repository, self.folder.name, shapes, self.store(readonly=True), seen, threads, ranked)
        self.overload, self.counts = Overload(int(self.parameters["overload_rows"])), Counts()
        for level, seconds in self.pipeline.warm(self.largest):
            self.overload.done(level, self.largest, seconds)

    def execute(self, requests: list) -> list:
        asks = [Ask(i, request) for i, request in enumerate(requests)]
        self.requests = requests
        self.wishes: dict[int, Any] = {}  # of the requests with a query, by place
        responses: list = [None] * len(requests)
        rows, began = sum(len(a.rows) for a in asks), time.monotonic()
        level = self._level(asks, rows, responses)
        self._answer(requests, asks, level, responses)
        answered = sum(len(a.rows) for a in asks if not responses[a.place].has_error())
        self.overload.done(level, answered, time.monotonic() - began)
        self.counts.hand_over()
        return responses

    def _level(self, asks: list[Ask], rows: int, responses: list) -> Level:
        """The level at which these are answered: under load, one at which half of those with a deadline keep it. The
        others, which cannot be answered in time, are refused."""
        level = self.overload(rows, time.monotonic())
        if not self.overload.on or all(a.deadline == math.inf for a in asks):
            return level
        now_ms = time.time() * 1000
        left_ms = [a.deadline - now_ms - WAY_BACK_MS for a in asks]
        level = self.overload.fitting(level, rows, statistics.median(left_ms) / 1000)
        needs_ms = self.overload.at_worst(level, rows) * 1000
        for ask, left in zip(asks, left_ms, strict=True):
            if -WAY_BACK_MS <= left < needs_ms:  # what is past has its own words
                responses[ask.place] = hopeless(max(left, 0.0), needs_ms)
                self.counts("deadline near", len(ask.rows))
        return level

    def _answer(self, requests: list, asks: list[Ask], level: Level, responses: list) -> None:
        try:
            self._stages(requests, asks, level, responses)
        except Exception as error:
            if len(asks) > 1:  # find the request that is at fault: the others get their answers
                for ask in asks:
                    if responses[ask.place] is None:
                        self._answer(requests, [ask], level, responses)
                return
            responses[asks[0].place] = refused(f"{contract.ENSEMBLE}: {error}")

    def _alive(self, asks: list[Ask], arrays: list[np.ndarray], stage: str, responses: list) -> tuple[list, list]:
        """Those whose deadline has not passed, with their rows of ``arrays``."""
        now_ms = time.time() * 1000
        alive = [a.deadline >= now_ms for a in asks]
        if all(alive):
            return asks, arrays
        for ask in asks:
            if ask.deadline < now_ms:
                responses[ask.place] = refusal(now_ms - ask.deadline, stage)
                self.counts("deadline passed", len(ask.rows))
        rows = np.repeat(alive, [len(a.rows) for a in asks])
        return [a for a, own in zip(asks, alive, strict=True) if own], [v[rows] for v in arrays]

    def _stages(self, requests: list, asks: list[Ask], level: Level, responses: list) -> None:
        pipeline = self.pipeline
        for ask in asks:
            if responses[ask.place] is None and len(ask.rows) == 1 and ask.errors[0]:
                responses[ask.place] = refused(ask.errors[0])
        asks = [a for a in asks if responses[a.place] is None]
        asks, _ = self._alive(asks, [], contract.FEATURE_TRANSFORM, responses)
        if not asks:
            return
        asks = self._wished(asks, responses)
        if not asks:
            return
        inputs, status = pipeline.transform([row for a in asks for row in a.rows])
        said = np.array(status, object)
        few, candidates, history = 0, pipeline.ranked, inputs[0]
        if level == Level.POPULAR:
            ranked, values = pipeline.popular(inputs)
        else:
            asks, (said, *inputs) = self._alive(asks, [said, *inputs], contract.RETRIEVAL, responses)
            if not asks:
                return
            history, found = inputs[0], pipeline.retrieve(inputs)
            if level == Level.RETRIEVED:
                ranked, values = pipeline.unranked(*found[:2])
            else:
                asks, (said, history, *found) = self._alive(asks, [said, history, *found], contract.RANKING, responses)
                if not asks:
                    return
                few = pipeline.few(max(r.top_k for a in asks for r in a.rows), level)
                ranked, values = pipeline.rank(history, found, few)
        if pipeline.search is not None:
            rows = [row for a in asks for row in a.rows]
            wishes = [self.wishes.get(a.place) for a in asks for _ in a.rows]
            queries = [r.query for r in rows]
            (ranked, values), understood = pipeline.searched(queries, wishes, history, (ranked, values))
            for ask in asks:
                ask.understood = [understood.pop(0) for _ in ask.rows]
        asks, (said, ranked, values) = self._alive(asks, [said, ranked, values], contract.RESPONSE, responses)
        self._respond(requests, asks, ranked, values, said, level.status(few, candidates), responses)
        self.counts.answered(said, level.name.lower())

    def _wished(self, asks: list[Ask], responses: list) -> list[Ask]:
        """Those whose filters, if they have a query, can be met; the others get their errors."""
        if self.pipeline.search is None:
            return asks
        alive = []
        for ask in asks:
            try:
                if any(r.query for r in ask.rows):
                    self.wishes[ask.place] = wish_of(self.requests[ask.place])
                    self.pipeline.search.index.allowed(self.wishes[ask.place].filters)
                alive.append(ask)
            except ValueError as error:
                responses[ask.place] = refused(str(error))
        return alive

    def _respond(self, requests, asks, ranked, values, said, reason, responses) -> None:  # noqa: ANN001
        start = 0
        for ask in asks:
            stop = start + len(ask.rows)
            errors = zip(ask.errors, said[start:stop], strict=True)
            status = strings([f"{contract.STATUS_ERROR}{e}" if e else joined(s, reason) for e, s in errors])
            top_k = np.array([r.top_k for r in ask.rows])
            answer = self.pipeline.respond(ranked[start:stop], values[start:stop], top_k, status[:, 0])
            more = [strings(ask.understood)] if self.pipeline.search is not None else []
            wanted = requests[ask.place].requested_output_names()
            tensors = [
                pb_utils.Tensor(name, np.ascontiguousarray(value))
                for name, value in zip(self.outputs, (*answer, *more, status), strict=True)
                if name in wanted
            ]
            responses[ask.place] = pb_utils.InferenceResponse(tensors)
            start = stop
