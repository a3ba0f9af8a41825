"""What the Python stages of the repository share: from Triton's requests to ``serving.stages`` and back.

Each ``model_repository/<stage>/1/model.py`` is a thin adapter that names one of these classes. Runs inside Triton's
Python stub only (it imports ``triton_python_backend_utils``).
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from preprocessing import contract as c
from serving.feature_store import Event, LmdbStore
from serving.graph_model import deadline, give_way, hopeless, refusal
from serving.pipeline import Level, Overload, Pipeline, joined
from serving.stages import FeatureTransform, ResponseStage, Row, parse_row

_LENGTH, _PACK = struct.Struct("<I").unpack_from, struct.Struct("<I").pack


def read_strings(encoded: np.ndarray | bytes) -> np.ndarray:
    """Elements of a serialized BYTES tensor, object [n]; cheaper than Triton's own for long histories."""
    buffer = bytes(encoded)
    values, offset, end = [], 0, len(buffer)
    while offset < end:
        start = offset + 4
        offset = start + _LENGTH(buffer, offset)[0]
        values.append(buffer[start:offset])
    out = np.empty(len(values), object)
    out[:] = values
    return out


def write_strings(array: np.ndarray) -> bytes | tuple[()]:
    """The reverse for an object array of bytes; () for an empty one, as Triton's own gives."""
    return b"".join([part for value in array.ravel().tolist() for part in (_PACK(len(value)), value)]) or ()


# the stub looks them up at each call
pb_utils.deserialize_bytes_tensor, pb_utils.serialize_byte_tensor = read_strings, write_strings


def _input(request, tensor: c.WireTensor | str) -> np.ndarray:  # noqa: ANN001
    return pb_utils.get_input_tensor_by_name(request, getattr(tensor, "name", tensor)).as_numpy()


def _error(error: str, late: bool = False):  # noqa: ANN202
    code = pb_utils.TritonError.UNAVAILABLE if late else pb_utils.TritonError.INVALID_ARG
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(error, code))


def _strings(values: list[str]) -> np.ndarray:
    return np.array([v.encode() for v in values], object).reshape(-1, 1)


class _Stage:
    """Reads its own config: parameters and the shapes the repository was compiled for."""

    def initialize(self, args: dict) -> None:
        give_way()
        config = json.loads(args["model_config"])
        self.parameters = {k: v["string_value"] for k, v in config.get("parameters", {}).items()}
        self.folder = Path(args["model_repository"]) / args["model_version"]
        self.largest = int(config["max_batch_size"])
        policy = config.get("dynamic_batching", {}).get("default_queue_policy", {})
        self.waits_ms = int(policy.get("default_timeout_microseconds", 0)) / 1000
        self.inputs = [t["name"] for t in config["input"]]
        self.outputs = [t["name"] for t in config["output"]]
        self.setup()
        gc.collect()
        gc.freeze()  # what is loaded stays: later collections need not walk it

    def setup(self) -> None: ...

    def store(self, readonly: bool) -> LmdbStore:
        path = Path(self.parameters["feature_store"])
        return LmdbStore(path if path.is_absolute() else self.folder.parent.parent / path, readonly=readonly)


WAY_BACK_MS = 10  # from the answer to the client where processors are short
COLD = f"{c.STATUS_DEGRADED}popular items"


class _Counts:
    """Rows answered, by how, for Triton's metrics page; handed on a few times a second, as each hand-over is a call to
    another process."""

    EVERY_S = 0.25

    def __init__(self) -> None:
        self._family = pb_utils.MetricFamily(
            name="vivace_answers_total", description="Rows answered, by how", kind=pb_utils.MetricFamily.COUNTER
        )
        self._metrics: dict[str, Any] = {}
        self._waiting: dict[str, int] = {}
        self._last = 0.0

    def __call__(self, how: str, rows: int = 1) -> None:
        self._waiting[how] = self._waiting.get(how, 0) + rows

    def answered(self, statuses: Iterable[str], how: str) -> None:
        """Rows by the status that the feature transform gave them: ``how`` they were answered, "cold" where there was
        no history to go by."""
        for status in statuses:
            self("cold" if status.startswith(COLD) else how)

    def hand_over(self) -> None:
        now = time.monotonic()
        if now - self._last < self.EVERY_S:
            return
        for how, rows in self._waiting.items():
            if how not in self._metrics:
                self._metrics[how] = self._family.Metric(labels={"how": how})
            self._metrics[how].increment(rows)
        self._waiting, self._last = {}, now


class _Ask:
    """One request as it goes through the stages: its ``place`` among those at hand, its rows, what is wrong with each
    ("" if nothing), its deadline."""

    def __init__(self, place: int, request) -> None:  # noqa: ANN001
        self.place, self.deadline = place, deadline(request)
        self.rows, self.errors = _parse(request)
        self.understood = [""] * len(self.rows)


def _parse(request) -> tuple[list[Row], list[str]]:  # noqa: ANN001
    columns = (_input(request, t) for t in (c.USER_ID, c.QUERY, c.HISTORY, c.TOP_K))
    rows, errors = [], []
    for user, query, history, top_k in zip(*columns, strict=True):
        try:
            rows.append(parse_row(user[0], query[0], history, int(top_k[0])))
            errors.append("")
        except ValueError as error:
            rows.append(Row("", None, 1))
            errors.append(str(error))
    return rows, errors


class FeatureTransformModel(_Stage):
    """USER_ID, QUERY, HISTORY, TOP_K to the inputs of ``retrieval`` and STATUS, in one pass over all requests at hand.

    A bad request of one row gets its own error. In a request of several rows a bad row is answered with its error in
    STATUS and no items, so its neighbours are not lost.
    """

    def setup(self) -> None:
        shapes = c.StageTensors(**json.loads(self.parameters["shapes"]))
        seen = self.parameters["exclude_seen"] == "true"
        self.transform = FeatureTransform(self.folder / "transform.onnx", self.store(readonly=True), shapes, seen)
        self.search, self.counts = bool(shapes.search), _Counts()

    def execute(self, requests: list) -> list:
        parsed = [_Ask(i, request) for i, request in enumerate(requests)]
        try:
            inputs, status = self.transform([row for ask in parsed for row in ask.rows])
        except Exception as error:
            return [_error(f"{c.FEATURE_TRANSFORM}: {error}") for _ in requests]
        now_ms, responses, start = time.time() * 1000, [], 0
        for ask in parsed:
            errors = ask.errors
            stop = start + len(errors)
            if ask.deadline < now_ms:
                responses.append(refusal(now_ms - ask.deadline, c.RETRIEVAL))
                self.counts("deadline passed", len(errors))
            elif len(errors) == 1 and errors[0]:
                responses.append(_error(errors[0]))
            else:
                text = [f"{c.STATUS_ERROR}{e}" if e else s for e, s in zip(errors, status[start:stop], strict=True)]
                values = [*(v[start:stop] for v in inputs), _strings(text)]
                if self.search:
                    until_ms = min(ask.deadline, now_ms + self.waits_ms if self.waits_ms else math.inf)
                    values.append(_strings([row.query and f"{until_ms:.0f} {row.query}" for row in ask.rows]))
                tensors = [pb_utils.Tensor(n, v) for n, v in zip(self.outputs, values, strict=True)]
                responses.append(pb_utils.InferenceResponse(tensors))
                self.counts.answered(status[start:stop], "full")
            start = stop
        self.counts.hand_over()
        return responses


class IndexedRetrievalModel(_Stage):
    """The retrieval stage through a FAISS index; takes the place of the exact graph where the run was compiled so."""

    def setup(self) -> None:
        from serving.item_index import IndexedRetrieval  # FAISS, which the other stages do without

        self.retrieve = IndexedRetrieval(self.folder, c.StageTensors(**json.loads(self.parameters["shapes"])))

    def execute(self, requests: list) -> list:
        columns = [[_input(r, name) for r in requests] for name in self.inputs]
        try:
            found = self.retrieve([np.concatenate(parts) for parts in columns])
        except Exception as error:
            if len(requests) > 1:  # find the request that is at fault: the others get their answers
                return [self.execute([request])[0] for request in requests]
            return [_error(f"{c.RETRIEVAL}: {error}")]
        responses, start = [], 0
        for rows in columns[0]:
            stop = start + len(rows)
            own = [np.ascontiguousarray(v[start:stop]) for v in found]
            tensors = [pb_utils.Tensor(n, v) for n, v in zip(self.outputs, own, strict=True)]
            responses.append(pb_utils.InferenceResponse(tensors))
            start = stop
        return responses


def _wish(request):  # noqa: ANN001, ANN202
    """What the request's parameters ask of an answer to a query. Raises ValueError."""
    from search.online import Wish

    return Wish.parse(json.loads(request.parameters() or "{}"))


ERROR = b'{"error"'  # how a FOUND that is none begins


class QuerySearchModel(_Stage):
    """QUERY to FOUND: the items, their features and UNDERSTOOD; beside the stages that read the history.

    It never fails, and its queue never refuses: where two branches of one ensemble request fail, Triton 2.51 may answer
    nothing more. Its error is a FOUND, for ``response`` to refuse; what waited too long is one, without any work.
    """

    def setup(self) -> None:
        from search.online import QuerySearch, pack

        shapes = c.StageTensors(**json.loads(self.parameters["shapes"]))
        self.search, self.pack = QuerySearch(self.folder, shapes.candidates), pack

    def execute(self, requests: list) -> list:
        queries, wishes, now_ms = [], [], time.time() * 1000
        failed: list[tuple[int, dict[str, Any]]] = []  # rows of each request, and what is wrong with it
        for request in requests:
            asked = [q.decode().partition(" ") for q in _input(request, c.SEARCH_FOR)[:, 0]]
            own, wish = [text for _, _, text in asked], None
            try:
                if any(own):
                    late_ms = now_ms - min(float(until_ms) for until_ms, _, _ in asked if until_ms)
                    if late_ms > 0:
                        raise TimeoutError(
                            f"{c.QUERY_SEARCH}: its turn came {late_ms:.0f} ms too late; ask fewer at once"
                        )
                    wish = _wish(request)
                    self.search.index.allowed(wish.filters)
                failed.append((len(own), {}))
            except Exception as error:
                failed.append((len(own), {"error": str(error), "late": isinstance(error, TimeoutError)}))
                own, wish = [""] * len(own), None
            queries += own
            wishes += [wish] * len(own)
        try:
            found = self.search(queries, wishes)
        except Exception as error:
            if len(requests) > 1:  # find the request that is at fault: the others get their answers
                return [self.execute([request])[0] for request in requests]
            found = self.search([""] * len(queries), wishes)
            failed = [(len(queries), {"error": f"{c.QUERY_SEARCH}: {error}"})]
        responses, start = [], 0
        for rows, wrong in failed:
            stop = start + rows
            packed = np.array([b""] * rows, object)
            packed[:] = json.dumps(wrong).encode() if wrong else [self.pack(*row) for row in found[start:stop]]
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor(c.FOUND.name, packed[:, None])]))
            start = stop
        return responses


class ResponseModel(_Stage):
    """Ranked ids, their scores and head probabilities to the public answer; of a run with search, what the query found
    in the order of the search ranker."""

    def setup(self) -> None:
        self.respond = ResponseStage.from_file(self.folder / "items.json")
        self.ids, self.values, *_ = self.inputs  # the contract's order: response_inputs
        self.search_ranking = None
        if c.FOUND.name in self.inputs:
            from search.online import SearchRanking, unpack

            self.search_ranking, self.unpack = SearchRanking(self.folder), unpack

    def execute(self, requests: list) -> list:
        responses = []
        for request in requests:
            ranked, values = _input(request, self.ids), _input(request, self.values)
            status, top_k = _input(request, c.STATUS), _input(request, c.TOP_K)
            more = []
            if self.search_ranking is not None:
                packed = _input(request, c.FOUND)[:, 0]
                wrong = [p for p in packed if p.startswith(ERROR)]
                if wrong:
                    responses.append(_error(**json.loads(wrong[0])))
                    continue
                more = [packed[:, None]]
                if any(packed):
                    found = [self.unpack(p) for p in packed]
                    ranked, values = self.search_ranking.rows(found, ranked, values, [_wish(request)] * len(found))
                    more = [_strings([said for _, _, said in found])]
            answer = (*self.respond(ranked, values, top_k[:, 0], status[:, 0]), *more)
            tensors = [pb_utils.Tensor(n, np.ascontiguousarray(v)) for n, v in zip(self.outputs, answer, strict=True)]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses


class RecommendModel(_Stage):
    """The whole call in one process: takes the ensemble's place under the profile ``fused``.

    Before each stage requests whose deadline has passed are answered so and left out. Under load (see ``Overload``)
    stages are skipped, and STATUS says which.
    """

    def setup(self) -> None:
        shapes = c.StageTensors(**json.loads(self.parameters["shapes"]))
        seen, threads = self.parameters["exclude_seen"] == "true", int(self.parameters["intra_op_thread_count"])
        repository, ranked = self.folder.parent.parent, int(self.parameters["ranked"])
        self.pipeline = Pipeline(repository, self.folder.name, shapes, self.store(readonly=True), seen, threads, ranked)
        self.overload, self.counts = Overload(int(self.parameters["overload_rows"])), _Counts()
        for level, seconds in self.pipeline.warm(self.largest):
            self.overload.done(level, self.largest, seconds)

    def execute(self, requests: list) -> list:
        asks = [_Ask(i, request) for i, request in enumerate(requests)]
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

    def _level(self, asks: list[_Ask], rows: int, responses: list) -> Level:
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

    def _answer(self, requests: list, asks: list[_Ask], level: Level, responses: list) -> None:
        try:
            self._stages(requests, asks, level, responses)
        except Exception as error:
            if len(asks) > 1:  # find the request that is at fault: the others get their answers
                for ask in asks:
                    if responses[ask.place] is None:
                        self._answer(requests, [ask], level, responses)
                return
            responses[asks[0].place] = _error(f"{c.ENSEMBLE}: {error}")

    def _alive(self, asks: list[_Ask], arrays: list[np.ndarray], stage: str, responses: list) -> tuple[list, list]:
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

    def _stages(self, requests: list, asks: list[_Ask], level: Level, responses: list) -> None:
        pipeline = self.pipeline
        for ask in asks:
            if responses[ask.place] is None and len(ask.rows) == 1 and ask.errors[0]:
                responses[ask.place] = _error(ask.errors[0])
        asks = [a for a in asks if responses[a.place] is None]
        asks, _ = self._alive(asks, [], c.FEATURE_TRANSFORM, responses)
        if not asks:
            return
        asks = self._wished(asks, responses)
        if not asks:
            return
        inputs, status = pipeline.transform([row for a in asks for row in a.rows])
        said = np.array(status, object)
        few, candidates = 0, pipeline.ranked
        if level == Level.POPULAR:
            ranked, values = pipeline.popular(inputs)
        else:
            asks, (said, *inputs) = self._alive(asks, [said, *inputs], c.RETRIEVAL, responses)
            if not asks:
                return
            found = pipeline.retrieve(inputs)
            if level == Level.RETRIEVED:
                ranked, values = pipeline.unranked(*found[:2])
            else:
                asks, (said, history, *found) = self._alive(asks, [said, inputs[0], *found], c.RANKING, responses)
                if not asks:
                    return
                few = pipeline.few(max(r.top_k for a in asks for r in a.rows), level)
                ranked, values = pipeline.rank(history, found, few)
        if pipeline.search is not None:
            rows = [row for a in asks for row in a.rows]
            wishes = [self.wishes.get(a.place) for a in asks for _ in a.rows]
            (ranked, values), understood = pipeline.searched([r.query for r in rows], wishes, (ranked, values))
            for ask in asks:
                ask.understood = [understood.pop(0) for _ in ask.rows]
        asks, (said, ranked, values) = self._alive(asks, [said, ranked, values], c.RESPONSE, responses)
        self._respond(requests, asks, ranked, values, said, level.status(few, candidates), responses)
        self.counts.answered(said, level.name.lower())

    def _wished(self, asks: list[_Ask], responses: list) -> list[_Ask]:
        """Those whose filters, if they have a query, can be met; the others get their errors."""
        if self.pipeline.search is None:
            return asks
        alive = []
        for ask in asks:
            try:
                if any(r.query for r in ask.rows):
                    self.wishes[ask.place] = _wish(self.requests[ask.place])
                    self.pipeline.search.index.allowed(self.wishes[ask.place].filters)
                alive.append(ask)
            except ValueError as error:
                responses[ask.place] = _error(str(error))
        return alive

    def _respond(self, requests, asks, ranked, values, said, reason, responses) -> None:  # noqa: ANN001
        start = 0
        for ask in asks:
            stop = start + len(ask.rows)
            errors = zip(ask.errors, said[start:stop], strict=True)
            status = _strings([f"{c.STATUS_ERROR}{e}" if e else joined(s, reason) for e, s in errors])
            top_k = np.array([r.top_k for r in ask.rows])
            answer = self.pipeline.respond(ranked[start:stop], values[start:stop], top_k, status[:, 0])
            more = [_strings(ask.understood)] if self.pipeline.search is not None else []
            wanted = requests[ask.place].requested_output_names()
            tensors = [
                pb_utils.Tensor(name, np.ascontiguousarray(value))
                for name, value in zip(self.outputs, (*answer, *more, status), strict=True)
                if name in wanted
            ]
            responses[ask.place] = pb_utils.InferenceResponse(tensors)
            start = stop


class AppendEventModel(_Stage):
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
                responses[i] = _error(str(error))
        lengths = self.events.append(e for _, events in accepted for e in events)
        for i, events in accepted:
            value = np.array([[lengths[e.user_id]] for e in events], np.int32)
            responses[i] = pb_utils.InferenceResponse([pb_utils.Tensor(c.HISTORY_LENGTH.name, value)])
        return responses

    @staticmethod
    def _events(request) -> list[Event]:  # noqa: ANN001
        columns = [_input(request, t)[:, 0] for t in c.APPEND]
        now_ms = int(time.time() * 1000)
        events = []
        for user, item, kind, timestamp in zip(*columns, strict=True):
            row = parse_row(user, b"", np.array([item], object), 1)
            if not row.user_id:
                raise ValueError(f"{c.USER_ID.name}: expected a user id, got an empty string")
            if row.history is None:
                raise ValueError(f"{c.APPEND_ITEM_ID.name}: expected an item id, got an empty string")
            events.append(Event(row.user_id, row.history[0], kind.decode(errors="replace"), int(timestamp) or now_ms))
        return events
