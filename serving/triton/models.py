"""The ensemble's Python models: from Triton's requests to ``serving.runtime.stages`` and back.

Each ``model_repository/<stage>/1/model.py`` is a thin adapter that names one of these classes. Runs inside Triton's
Python stub only (it imports ``triton_python_backend_utils``).
"""

from __future__ import annotations

import json
import math
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from serving.runtime.stages import NO_IDS, FeatureTransform, ResponseStage, parse_row, read_search_for, search_for
from serving.triton.graph_model import refusal
from serving.triton.stage import Ask, Counts, Stage, new_only, refused, strings, tensor_of, wish_of
from vivace import contract
from vivace.store.interface import Event


class FeatureTransformModel(Stage):
    """USER_ID, QUERY, HISTORY, TOP_K to the inputs of ``retrieval`` and STATUS, in one pass over all requests at hand.

    A bad request of one row gets its own error. In a request of several rows a bad row is answered with its error in
    STATUS and no items, so its neighbours are not lost.
    """

    def setup(self) -> None:
        shapes = contract.StageTensors(**json.loads(self.parameters["shapes"]))
        seen = self.parameters["exclude_seen"] == "true"
        self.transform = FeatureTransform(self.folder / "transform.onnx", self.store(readonly=True), shapes, seen)
        self.search, self.counts = bool(shapes.search), Counts()

    def execute(self, requests: list) -> list:
        parsed = [Ask(i, request) for i, request in enumerate(requests)]
        try:
            inputs, status = self.transform([row for ask in parsed for row in ask.rows])
        except Exception as error:
            return [refused(f"{contract.FEATURE_TRANSFORM}: {error}") for _ in requests]
        now_ms, responses, start = time.time() * 1000, [], 0
        for ask in parsed:
            errors = ask.errors
            stop = start + len(errors)
            if ask.deadline < now_ms:
                responses.append(refusal(now_ms - ask.deadline, contract.RETRIEVAL))
                self.counts("deadline passed", len(errors))
            elif len(errors) == 1 and errors[0]:
                responses.append(refused(errors[0]))
            else:
                text = [
                    f"{contract.STATUS_ERROR}{e}" if e else s for e, s in zip(errors, status[start:stop], strict=True)
                ]
                values = [*(v[start:stop] for v in inputs), strings(text)]
                if self.search:
                    until_ms = min(ask.deadline, now_ms + self.waits_ms if self.waits_ms else math.inf)
                    new = any(row.query for row in ask.rows) and new_only(requests[ask.place])
                    unwanted = [own[own >= contract.FIRST_ID] if new else NO_IDS for own in inputs[0][start:stop]]
                    asked = zip(unwanted, ask.rows, strict=True)
                    values.append(strings([search_for(until_ms, ids, row.query) for ids, row in asked]))
                tensors = [pb_utils.Tensor(n, v) for n, v in zip(self.outputs, values, strict=True)]
                responses.append(pb_utils.InferenceResponse(tensors))
                self.counts.answered(status[start:stop], "full")
            start = stop
        self.counts.hand_over()
        return responses


class IndexedRetrievalModel(Stage):
    """The retrieval stage through a FAISS index; takes the place of the exact graph where the run was compiled so."""

    def setup(self) -> None:
        from serving.runtime.item_index import IndexedRetrieval  # FAISS, which the other stages do without

        self.retrieve = IndexedRetrieval(self.folder, contract.StageTensors(**json.loads(self.parameters["shapes"])))

    def execute(self, requests: list) -> list:
        columns = [[tensor_of(r, name) for r in requests] for name in self.inputs]
        try:
            found = self.retrieve([np.concatenate(parts) for parts in columns])
        except Exception as error:
            if len(requests) > 1:  # find the request that is at fault: the others get their answers
                return [self.execute([request])[0] for request in requests]
            return [refused(f"{contract.RETRIEVAL}: {error}")]
        responses, start = [], 0
        for rows in columns[0]:
            stop = start + len(rows)
            own = [np.ascontiguousarray(v[start:stop]) for v in found]
            tensors = [pb_utils.Tensor(n, v) for n, v in zip(self.outputs, own, strict=True)]
            responses.append(pb_utils.InferenceResponse(tensors))
            start = stop
        return responses


ERROR = b'{"error"'  # how a FOUND that is none begins


class QuerySearchModel(Stage):
    """QUERY to FOUND: the items, their features and UNDERSTOOD; beside the stages that read the history.

    It never fails, and its queue never refuses: where two branches of one ensemble request fail, Triton 2.51 may answer
    nothing more. Its error is a FOUND, for ``response`` to refuse; what waited too long is one, without any work.
    """

    def setup(self) -> None:
        from search.online import QuerySearch, pack

        shapes = contract.StageTensors(**json.loads(self.parameters["shapes"]))
        self.search, self.pack = QuerySearch(self.folder, shapes.candidates), pack

    def execute(self, requests: list) -> list:
        queries, wishes, unwanted, now_ms = [], [], [], time.time() * 1000
        failed: list[tuple[int, dict[str, Any]]] = []  # rows of each request, and what is wrong with it
        for request in requests:
            asked = [read_search_for(raw) for raw in tensor_of(request, contract.SEARCH_FOR)[:, 0]]
            own, wish = [query for _, _, query in asked], None
            unwanted += [ids for _, ids, _ in asked]
            try:
                if any(own):
                    late_ms = now_ms - min(until_ms for until_ms, _, _ in asked)
                    if late_ms > 0:
                        raise TimeoutError(
                            f"{contract.QUERY_SEARCH}: its turn came {late_ms:.0f} ms too late; ask fewer at once"
                        )
                    wish = wish_of(request)
                    self.search.index.allowed(wish.filters)
                failed.append((len(own), {}))
            except Exception as error:
                failed.append((len(own), {"error": str(error), "late": isinstance(error, TimeoutError)}))
                own, wish = [""] * len(own), None
            queries += own
            wishes += [wish] * len(own)
        try:
            found = self.search(queries, wishes, unwanted)
        except Exception as error:
            if len(requests) > 1:  # find the request that is at fault: the others get their answers
                return [self.execute([request])[0] for request in requests]
            found = self.search([""] * len(queries), wishes)
            failed = [(len(queries), {"error": f"{contract.QUERY_SEARCH}: {error}"})]
        responses, start = [], 0
        for rows, wrong in failed:
            stop = start + rows
            packed = np.array([b""] * rows, object)
            packed[:] = json.dumps(wrong).encode() if wrong else [self.pack(*row) for row in found[start:stop]]
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor(contract.FOUND.name, packed[:, None])]))
            start = stop
        return responses


class ResponseModel(Stage):
    """Ranked ids, their scores and head probabilities to the public answer; of a run with search, what the query found
    in the order of the search ranker."""

    def setup(self) -> None:
        self.respond = ResponseStage.from_file(self.folder / "items.json")
        self.ids, self.values, *_ = self.inputs  # the contract's order: response_inputs
        self.search_ranking = None
        if contract.FOUND.name in self.inputs:
            from search.online import SearchRanking, unpack

            self.search_ranking, self.unpack = SearchRanking(self.folder), unpack

    def execute(self, requests: list) -> list:
        responses = []
        for request in requests:
            ranked, values = tensor_of(request, self.ids), tensor_of(request, self.values)
            status, top_k = tensor_of(request, contract.STATUS), tensor_of(request, contract.TOP_K)
            more = []
            if self.search_ranking is not None:
                packed = tensor_of(request, contract.FOUND)[:, 0]
                wrong = [p for p in packed if p.startswith(ERROR)]
                if wrong:
                    responses.append(refused(**json.loads(wrong[0])))
                    continue
                more = [packed[:, None]]
                if any(packed):
                    found = [self.unpack(p) for p in packed]
                    ranked, values = self.search_ranking.rows(found, ranked, values, [wish_of(request)] * len(found))
                    more = [strings([said for _, _, said in found])]
            answer = (*self.respond(ranked, values, top_k[:, 0], status[:, 0]), *more)
            tensors = [pb_utils.Tensor(n, np.ascontiguousarray(v)) for n, v in zip(self.outputs, answer, strict=True)]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses


class AppendEventModel(Stage):
    """USER_ID, ITEM_ID, EVENT_TYPE, TIMESTAMP_MS (0: now) into the feature store; answers the history's new length."""

    def setup(self) -> None:
        self.events = self.store(readonly=False)

    def execute(self, requests: list) -> list:
        responses: list = [None] * len(requests)
        accepted: list[tuple[int, list[Event]]] = []
        for i, request in enumerate(requests):
            try:
                accepted.append((i, self._events(request)))
            except ValueError as error:
                responses[i] = refused(str(error))
        lengths = self.events.append(e for _, events in accepted for e in events)
        for i, events in accepted:
            value = np.array([[lengths[e.user_id]] for e in events], np.int32)
            responses[i] = pb_utils.InferenceResponse([pb_utils.Tensor(contract.HISTORY_LENGTH.name, value)])
        return responses

    @staticmethod
    def _events(request) -> list[Event]:  # noqa: ANN001
        columns = [tensor_of(request, t)[:, 0] for t in contract.APPEND]
        now_ms = int(time.time() * 1000)
        events = []
        for user, item, kind, timestamp in zip(*columns, strict=True):
            row = parse_row(user, b"", np.array([item], object), 1)
            if not row.user_id:
                raise ValueError(f"{contract.USER_ID.name}: expected a user id, got an empty string")
            if row.history is None:
                raise ValueError(f"{contract.APPEND_ITEM_ID.name}: expected an item id, got an empty string")
            events.append(Event(row.user_id, row.history[0], kind.decode(errors="replace"), int(timestamp) or now_ms))
        return events
