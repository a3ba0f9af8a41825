"""The ensemble's Python models: from Triton's requests to ``serving.runtime.stages`` and back.

Each ``model_repository/<stage>/1/model.py`` is a thin adapter that names one of these classes. Runs inside Triton's
Python stub only (it imports ``triton_python_backend_utils``).
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from serving.runtime.answer_samples import ENVIRONMENT as ANSWERS, AnswerSamples
from serving.runtime.drift import counts_of_worker
from serving.runtime.events import REFUSE, SUSPECTS, SuspectEvents, event_status, parse_event, parse_id
from serving.runtime.explore import Explorer, explored
from serving.runtime.response import ResponseStage
from serving.runtime.ruled import Rules
from serving.runtime.sampling import sampling_of_worker
from serving.runtime.sharded import ShardedRetrieval
from serving.runtime.stages import (
    FeatureTransform,
    ItemVocabulary,
    read_search_for,
    search_for,
    with_reason,
)
from serving.shard_addresses import SHARDS_ENV, WAIT_ENV, WAIT_MS, ShardAddresses, credentials_from
from serving.triton import impressions
from serving.triton.drift import count_answer, count_requests, sample
from serving.triton.graph_model import answer, each_by_itself, failure, overdue, refusal
from serving.triton.stage import (
    Counts,
    ParsedRequest,
    ShardCounts,
    Stage,
    asks_itself,
    contexts_of,
    new_only,
    refused,
    search_options,
    strings,
    tensor_of,
)
from vivace import contract
from vivace.context import CONTEXT_FILE, ContextColumns, parse_context, unknown_names
from vivace.impressions.samples import writer_of_worker
from vivace.store.interface import Event, StoreUnreachableError


class FeatureTransformModel(Stage):
    """USER_ID, QUERY, HISTORY, TOP_K to the inputs of ``retrieval`` and STATUS, in one pass over all requests at hand.

    A bad request of one row gets its own error. In a request of several rows a bad row is answered with its error in
    STATUS and no items, so its neighbours are not lost.
    """

    def setup(self) -> None:
        shapes = self.shapes()
        seen = self.parameters["exclude_seen"] == "true"
        store = self.store(readonly=True)
        self.transform = FeatureTransform(
            self.folder / "transform.onnx", store, shapes, seen, catalogue=self.catalogue(store)
        )
        self.search, self.counts = bool(shapes.search), Counts()
        self.samples, self.sampled = AnswerSamples(os.environ.get(ANSWERS, "")), False  # of the last stage
        self.shown_to = contract.SHOWN_TO.name in self.outputs  # a repository of before it does without
        self.drift = counts_of_worker(self.beside(contract.ENSEMBLE), shapes, self.transform.moment.columns)
        self.sampling = sampling_of_worker(writer_of_worker(), shapes, self.folder.name)

    @each_by_itself
    def execute(self, requests: list[Any]) -> list[Any]:
        began_ms, self.sampled = time.time() * 1000, self.samples.on()
        parsed = [ParsedRequest(i, request, self.transform.moment.columns) for i, request in enumerate(requests)]
        rows = [row for request in parsed for row in request.rows]
        known = self.transform.known(rows)
        inputs, status = self.transform(rows, known)
        sample(self.sampling, parsed, known, inputs)
        count_requests(self.drift, parsed, inputs)
        now_ms, responses, start = time.time() * 1000, [], 0
        for request in parsed:
            stop = start + len(request.rows)
            of_request = [v[start:stop] for v in inputs]
            if self.search and request.has_query and new_only(request.request):
                request.unwanted = self.transform.seen(request.rows, known.of(range(start, stop)))
            responses.append(self._answer(request, of_request, status[start:stop], began_ms, now_ms))
            start = stop
        self.counts.hand_over()
        return responses

    def finalize(self) -> None:
        for each in (self.drift, self.sampling):
            if each is not None:
                each.close()

    def _answer(
        self, request: ParsedRequest, inputs: list[np.ndarray], status: list[str], began_ms: float, now_ms: float
    ) -> Any:
        errors = request.errors
        if request.deadline < now_ms:
            self.counts("deadline passed", len(errors))
            return refusal(now_ms - request.deadline, contract.RETRIEVAL)
        if len(errors) == 1 and errors[0]:
            return refused(errors[0])
        texts = [f"{contract.STATUS_ERROR}{e}" if e else s for e, s in zip(errors, status, strict=True)]
        values = [*inputs, strings(texts)]
        if self.search:
            values.append(
                strings([search_for(ids, row.query) for ids, row in zip(request.unwanted, request.rows, strict=True)])
            )
        if self.shown_to:
            values.append(impressions.shown_to(request, began_ms, self.sampled))
        if not request.itself:
            self.counts.answered(status, "full")
        return answer(request.request, self.outputs, values)


class IndexedRetrievalModel(Stage):
    """The retrieval stage through a FAISS index; takes the place of the exact graph where the run was compiled so."""

    def setup(self) -> None:
        from serving.runtime.item_index import IndexedRetrieval  # FAISS, which the other stages do without

        self.retrieve = IndexedRetrieval(self.folder, self.shapes())

    @each_by_itself
    def execute(self, requests: list[Any]) -> list[Any]:
        columns = [[tensor_of(r, name) for r in requests] for name in self.inputs]
        retrieved = self.retrieve([np.concatenate(parts) for parts in columns])
        responses, start = [], 0
        for request, rows in zip(requests, columns[0], strict=True):
            stop = start + len(rows)
            responses.append(answer(request, self.outputs, [v[start:stop] for v in retrieved]))
            start = stop
        return responses


class ShardedRetrievalModel(Stage):
    """The retrieval stage over shards: STATUS says which did not answer."""

    def setup(self) -> None:
        from serving.shards.calls import RemoteShards  # its libraries, which the other stages do without

        shapes = self.shapes()
        if not (told := os.environ.get(SHARDS_ENV, "")):
            raise ValueError(
                f"{SHARDS_ENV}: expected host:port of {shapes.shards} shards, by commas, got nothing; 'vivace serve' "
                "starts them and says where"
            )
        addresses = ShardAddresses.parse(told, shapes.shards)
        wait_s = int(os.environ.get(WAIT_ENV, WAIT_MS)) / 1000
        credentials = credentials_from(os.environ)
        self.asked = RemoteShards(addresses, self.folder.name, shapes, wait_s, credentials=credentials)
        self.counts = ShardCounts()
        self.retrieve = ShardedRetrieval(self.folder, shapes, self.asked)

    @each_by_itself
    def execute(self, requests: list[Any]) -> list[Any]:
        columns = [[tensor_of(r, name) for r in requests] for name in self.inputs]
        *given, status_B1 = [np.concatenate(parts) for parts in columns]
        retrieved, reasons = self.retrieve(given)
        if any(reasons):
            statuses = zip(status_B1[:, 0], reasons, strict=True)
            status_B1 = strings([with_reason(status.decode(), reason) for status, reason in statuses])
        responses, start = [], 0
        for request, rows in zip(requests, columns[0], strict=True):
            stop = start + len(rows)
            values = [v[start:stop] for v in (*retrieved, status_B1)]
            responses.append(answer(request, self.outputs, values))
            start = stop
        self.counts.hand_over(self.asked.counts)
        return responses

    def finalize(self) -> None:
        self.asked.close()


class QuerySearchModel(Stage):
    """SEARCH_FOR to FOUND: the items, their features and UNDERSTOOD."""

    def setup(self) -> None:
        from search.online import QuerySearch, pack

        self.search, self.pack = QuerySearch(self.folder, self.shapes().candidates, self.catalogue()), pack

    @each_by_itself
    def execute(self, requests: list[Any]) -> list[Any]:
        responses: list[Any] = [None] * len(requests)
        queries: list[str] = []
        options, excluded = [], []
        rows_of: dict[int, int] = {}  # of the requests that are searched, by their place
        for i, request in enumerate(requests):
            if late_ms := overdue(request):
                responses[i] = refusal(late_ms, contract.QUERY_SEARCH)
                continue
            try:
                rows = [read_search_for(raw) for raw in tensor_of(request, contract.SEARCH_FOR)[:, 0]]
                options += [self._options(request, rows)] * len(rows)
            except ValueError as error:
                responses[i] = refused(str(error))
                continue
            excluded += [ids for ids, _ in rows]
            queries += [query for _, query in rows]
            rows_of[i] = len(rows)
        found = iter(self.search(queries, options, excluded))
        for i, count in rows_of.items():
            packed = np.array([b""] * count, object)
            packed[:] = [self.pack(*row) for row in itertools.islice(found, count)]
            responses[i] = answer(requests[i], [contract.FOUND.name], [packed[:, None]])
        return responses

    def _options(self, request: Any, rows: list[tuple[np.ndarray, str]]) -> Any:
        """What the request asks of its answer; None without a query. Raises ValueError for what the catalogue does not
        have."""
        if not any(query for _, query in rows):
            return None
        options = search_options(request)
        self.search.index.allowed(options.filters)
        return options


class ResponseModel(Stage):
    """Ranked ids, their scores and head probabilities to the public answer; of a run with search, what the query found
    in the order of the search ranker."""

    def setup(self) -> None:
        self.respond = ResponseStage.from_file(self.folder / "items.json", self.catalogue())
        self.ids, self.values, self.status, *_ = self.inputs  # the contract's order: response_inputs
        self.impressions = impressions.Impressions(self.folder.name, self.inputs)
        self.drift = counts_of_worker(self.beside(contract.ENSEMBLE))
        self.explorer = Explorer.of_worker(self.folder)
        self.business = Rules(self.rules_file, self.folder, self.respond)
        self.search_ranking = None
        if contract.FOUND.name in self.inputs:
            from search.online import SearchRanking, unpack

            self.search_ranking, self.unpack = SearchRanking(self.folder), unpack

    @each_by_itself
    def execute(self, requests: list[Any]) -> list[Any]:
        responses = [self._answer(request) for request in requests]
        self.impressions.hand_over()
        return responses

    def finalize(self) -> None:
        self.impressions.close()
        if self.drift is not None:
            self.drift.close()

    def _answer(self, request: Any) -> Any:
        ranked, values = tensor_of(request, self.ids), tensor_of(request, self.values)
        status, top_k = tensor_of(request, self.status), tensor_of(request, contract.TOP_K)
        understood, queried = [], [False] * len(ranked)
        if self.search_ranking is not None:
            packed = tensor_of(request, contract.FOUND)[:, 0]
            understood = [packed[:, None]]
            if any(queried := [bool(p) for p in packed]):
                results = [self.unpack(p) for p in packed]
                options = [search_options(request)] * len(results)
                ranked, values = self.search_ranking.rows(results, ranked, values, options)
                understood = [strings([text for _, _, text in results])]
        propensities, itself = None, asks_itself(request)
        ranked, values, status_B = self.business(ranked, values, top_k[:, 0], queried, status[:, 0])
        if self.explorer is not None and not self.business.exact:
            ranked, values, propensities = explored(
                self.explorer, self.respond, itself, ranked, values, top_k[:, 0], status[:, 0], queried,
                self.business.buries,
            )  # fmt: skip
        shown = self.respond(ranked, values, top_k[:, 0], status[:, 0])
        count_answer(self.drift, itself, shown, status_B, queried)
        if self.impressions:
            rows = tensor_of(request, contract.SHOWN_TO)[:, 0].tolist()
            self.impressions.put(request, rows, shown[0], shown[1], status_B, propensities_BK=propensities)
        told = [*shown, *understood, status_B[:, None]]  # a repository of before it has no STATUS here
        return answer(request, self.outputs, told[: len(self.outputs)])


SWEEP_S, SWEEP_PAUSE_S = 3600.0, 0.05


class AppendEventModel(Stage):
    """USER_ID, ITEM_ID, EVENT_TYPE, TIMESTAMP_MS (0: now) into the feature store; answers the history's new length, and
    whether what was stored is known: an item to the models, an event type to the data set. Sweeps the store of what has
    aged out, at its start and every SWEEP_S."""

    def setup(self) -> None:
        self.events = self.store(readonly=False)
        threading.Thread(target=self._sweep, name="sweep of the store", daemon=True).start()
        transform = self.beside(contract.FEATURE_TRANSFORM)
        self.item_ids = ItemVocabulary(transform / "transform.onnx")
        context = transform / CONTEXT_FILE
        self.columns = ContextColumns.load(context) if context.exists() else ContextColumns()
        self.live = self.catalogue(self.events)
        self.drift = counts_of_worker(self.beside(contract.ENSEMBLE))
        refuse = os.environ.get(SUSPECTS) == REFUSE
        self.suspects = SuspectEvents(int(self.parameters.get("minute_events", 0)), refuse)
        self.suspect = Counts("vivace_suspect_events_total", "Events that no person sends, by what became of them")
        for how in ("kept", "refused"):
            self.suspect(how, 0)

    @each_by_itself
    def execute(self, requests: list[Any]) -> list[Any]:
        responses: list[Any] = [None] * len(requests)
        accepted: list[tuple[int, list[Event]]] = []
        reasons = list[str]()
        for i, request in enumerate(requests):
            try:
                events = self._events(request)
                reasons += self._suspicions(events)
                accepted.append((i, events))
            except ValueError as error:
                responses[i] = refused(str(error))
        stored = [event for _, events in accepted for event in events]
        statuses = iter(
            map(with_reason, self._statuses(stored), reasons)
        )  # before anything is stored: what fails then was not
        try:
            lengths = self.events.append(stored)
        except StoreUnreachableError as error:  # not one by one: what has no id may be stored
            lengths = {}
            for i, _ in accepted:
                responses[i] = failure(error)
        if self.drift is not None and lengths:
            self.drift.clicked(sum(bool(event.request_id and not event.shown) for event in stored))
        for i, events in accepted if lengths else ():
            length = np.array([[lengths[e.user_id]] for e in events], np.int32)
            values = {
                contract.HISTORY_LENGTH.name: length,
                contract.STATUS.name: strings([next(statuses) for _ in events]),
            }
            names = [name for name in self.outputs if name in values]  # a repository of before STATUS has one
            responses[i] = answer(requests[i], names, [values[name] for name in names])
        self.suspect.hand_over()
        if line := self.suspects.report(time.monotonic()):
            pb_utils.Logger.log_warn(line)
        return responses

    def _suspicions(self, events: list[Event]) -> list[str]:
        """What STATUS says of events that no person sends. Raises ValueError where they are refused."""
        try:
            reasons = self.suspects.reasons(events, int(time.time() * 1000))
        except ValueError:
            self.suspect("refused", len(events))
            raise
        self.suspect("kept", sum(map(bool, reasons)))
        return reasons

    def _statuses(self, events: list[Event]) -> list[str]:
        types, ids = self.events.event_types(), self.item_ids([event.item_id for event in events])
        if self.live is not None and (ids < contract.FIRST_ID).any():
            self.live.refresh()
            ids = np.array([id_ or self.live.stands_for(event.item_id)[1] for id_, event in zip(
                np.where(ids < contract.FIRST_ID, 0, ids).tolist(), events, strict=True)], np.int64)  # fmt: skip
        statuses = []
        for event, item_id in zip(events, ids.tolist(), strict=True):
            _, unknown = parse_context(event.context.encode(), self.columns)
            status = event_status(event, item_id, types)
            statuses.append(with_reason(status, unknown_names(unknown, self.columns)))
        return statuses

    def _sweep(self) -> None:
        while True:
            try:
                while self.events.sweep():
                    time.sleep(SWEEP_PAUSE_S)  # appends come between
            except Exception as error:  # such as a disk that is full: appends say so
                pb_utils.Logger.log_warn(f"sweep of the store: {type(error).__name__}: {error}")
            time.sleep(SWEEP_S)

    def _events(self, request: Any) -> list[Event]:
        columns: list[Any] = [tensor_of(request, t)[:, 0] for t in contract.APPEND if not t.optional]
        columns.append([c[0] for c in contexts_of(request, len(columns[0]))])
        parameters = json.loads(request.parameters() or "{}")
        event_id = parse_id(parameters.get(contract.EVENT_ID), contract.EVENT_ID)
        request_id = parse_id(parameters.get(contract.REQUEST_ID), contract.REQUEST_ID)
        now_ms = int(time.time() * 1000)
        return [
            parse_event(
                user,
                item,
                event_type,
                int(timestamp_ms) or now_ms,
                event_id and f"{event_id}/{row}",
                context,
                self.columns,
                request_id,
            )
            for row, (user, item, event_type, timestamp_ms, context) in enumerate(zip(*columns, strict=True))
        ]
