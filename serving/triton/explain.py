"""The model ``explain``: from Triton's requests to ``serving.runtime.why`` and back.

An instance of its own with a short queue, behind all other workers in priority, so that no flood of these calls keeps
``recommend`` from answering. It opens the graphs when it is first asked: a server that nobody asks pays nothing.
Runs inside Triton's Python stub only (it imports ``triton_python_backend_utils``).
"""

from __future__ import annotations

import json
import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.process import give_way
from serving.triton.graph_model import answer, each_by_itself, failure, refusal
from serving.triton.stage import Counts, ParsedRequest, Stage, refused, search_options, strings
from vivace import contract
from vivace.context import CONTEXT_FILE, ContextColumns
from vivace.explain_contract import ENGLISH, EXPLAIN, LANGUAGE, LANGUAGES

if TYPE_CHECKING:
    from serving.runtime.paths import Paths
    from serving.runtime.pipeline import Pipeline
    from serving.runtime.ruled import Rules


class ExplainModel(Stage):
    """One request of one row at a time: ITEM_ID, SCORE and EXPLANATION of each item, STATUS."""

    def setup(self) -> None:
        context = self.beside(contract.FEATURE_TRANSFORM) / CONTEXT_FILE
        self.columns = ContextColumns.load(context) if context.exists() else ContextColumns()
        self.heads: list[str] = json.loads(self.parameters["heads"])
        self.counts = Counts("vivace_explanations_total", "Requests of explain, by how they were answered")

    @cached_property
    def opened(self) -> tuple[Pipeline, Rules, Paths | None]:
        """The graphs that ``recommend`` answers by, its business rules, and what the catalogue relates."""
        from serving.runtime.paths import Paths  # what a server that nobody asks does without
        from serving.runtime.pipeline import Pipeline
        from serving.runtime.ruled import Rules

        seen, threads = self.parameters["exclude_seen"] == "true", int(self.parameters["intra_op_thread_count"])
        repository, ranked = self.folder.parent.parent, int(self.parameters["ranked"])
        self.titles = self.store(readonly=True)
        pipeline = Pipeline(repository, self.folder.name, self.shapes(), self.titles, seen, threads, ranked)
        give_way()  # what it started too
        response = self.beside(contract.RESPONSE)
        return pipeline, Rules(self.rules_file, response, pipeline.respond), Paths.of(response, pipeline.respond)

    @each_by_itself
    def execute(self, requests: list[Any]) -> list[Any]:
        responses = [self._one(ParsedRequest(i, request, self.columns)) for i, request in enumerate(requests)]
        self.counts.hand_over()
        return responses

    def _one(self, parsed: ParsedRequest) -> Any:
        late_ms = time.time() * 1000 - parsed.deadline
        if late_ms > 0:
            self.counts("deadline passed")
            return refusal(late_ms, EXPLAIN)
        if parsed.errors[0]:
            return refused(parsed.errors[0])
        if parsed.itself:  # whether it lives: nothing is opened for that
            nothing = np.empty((1, 0), object)
            return self._answer(parsed, nothing, np.empty((1, 0), np.float32), nothing, contract.STATUS_OK)
        try:
            values = self._explained(parsed)
        except Exception as error:
            return failure(error)
        self.counts("full")
        return self._answer(parsed, *values)

    def _answer(
        self, parsed: ParsedRequest, items: np.ndarray, scores: np.ndarray, texts: np.ndarray, status: str
    ) -> Any:
        return answer(parsed.request, self.outputs, [items, scores, texts, strings([status])])

    def _explained(self, parsed: ParsedRequest) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
        """ITEM_ID object [1, K], SCORE float32 [1, K], EXPLANATION object [1, K], STATUS. Raises ValueError."""
        from serving.runtime.why import SERVED_MOST, SERVED_TRIED, because, record, titled

        language = str(json.loads(parsed.request.parameters() or "{}").get(LANGUAGE) or ENGLISH)
        if language not in LANGUAGES:
            raise ValueError(f"{LANGUAGE}: expected one of {', '.join(LANGUAGES)}, got {language[:80]!r}")
        (pipeline, rules, paths), row, options = self.opened, parsed.rows[0], None
        if row.query and pipeline.search is not None:
            options = search_options(parsed.request)
            pipeline.search.index.allowed(options.filters)
        found, status = because(pipeline, row, options=options, rules=rules, tried=SERVED_TRIED, most=SERVED_MOST)
        items = titled(found)
        titles = {item: title or "" for item, title in zip(items, self.titles.titles(items), strict=True)}
        joined = [paths(of) if paths else None for of in found]
        records = [record(of, self.heads, titles, language, path) for of, path in zip(found, joined, strict=True)]
        texts = [json.dumps(each, ensure_ascii=False).encode() for each in records]
        return (
            np.array([[of.item.encode() for of in found]], object).reshape(1, -1),
            np.array([[of.score for of in found]], np.float32).reshape(1, -1),
            np.array([texts], object).reshape(1, -1),
            status,
        )
