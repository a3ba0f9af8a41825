"""What the repository's Python models share: from Triton's requests to rows and back, counts for its metrics page.

Runs inside Triton's Python stub only (it imports ``triton_python_backend_utils``).
"""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import triton_python_backend_utils as pb_utils

from serving.process import close_callers, give_way
from serving.runtime.live_catalogue import LiveCatalogue
from serving.runtime.rules import ENVIRONMENT as RULES, rules_file
from serving.runtime.stages import NO_IDS, ItemVocabulary, Row, parse_row
from serving.triton import byte_strings
from serving.triton.graph_model import deadline
from vivace import contract
from vivace.context import ContextColumns
from vivace.store.interface import ServingStore
from vivace.store.opening import store_of_worker

if TYPE_CHECKING:
    from search.online import SearchOptions

byte_strings.install()


def tensor_of(request: Any, tensor: contract.WireTensor | str) -> np.ndarray:
    """A request's input, whole."""
    name = tensor if isinstance(tensor, str) else tensor.name
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()


def refused(error: str) -> Any:
    """The answer to a request that is at fault."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(error, pb_utils.TritonError.INVALID_ARG))


def strings(values: list[str]) -> np.ndarray:
    """A BYTES tensor [n, 1]."""
    return np.array([v.encode() for v in values], object).reshape(-1, 1)


class Stage:
    """Reads its own config: parameters and the shapes the repository was compiled for."""

    def initialize(self, args: dict[str, Any]) -> None:
        close_callers()
        config = json.loads(args["model_config"])
        self.parameters = {k: v["string_value"] for k, v in config.get("parameters", {}).items()}
        self.folder = Path(args["model_repository"]) / args["model_version"]
        self.largest = int(config["max_batch_size"])
        self.inputs = [t["name"] for t in config["input"]]
        self.outputs = [t["name"] for t in config["output"]]
        self.setup()
        gc.collect()
        gc.freeze()  # what is loaded stays: later collections need not walk it
        give_way()

    def setup(self) -> None: ...

    def shapes(self) -> contract.StageTensors:
        return contract.StageTensors(**json.loads(self.parameters["shapes"]))

    def store(self, readonly: bool) -> ServingStore:
        """The run's store, or the one that the server was started with."""
        return store_of_worker(self.folder.parent.parent / self.parameters["feature_store"], readonly)

    def beside(self, model: str) -> Path:
        """Folder of the same version of another model."""
        return self.folder.parent.parent / model / self.folder.name

    @property
    def rules_file(self) -> Path:
        """Where the business rules are, if there are any: those that the server accepted, or the run's."""
        return Path(os.environ.get(RULES, "") or rules_file(self.folder.parent.parent))

    def catalogue(self, store: ServingStore | None = None) -> LiveCatalogue | None:
        """The live catalogue; None for a run without one. ``store``: what is open already."""
        if "shapes" not in self.parameters or not self.shapes().fresh:
            return None
        ids = ItemVocabulary(self.beside(contract.FEATURE_TRANSFORM) / "transform.onnx", lazy=True)
        return LiveCatalogue(store or self.store(readonly=True), self.beside(contract.UPDATE_STORE), ids, self.shapes())


NO_CONTEXT = [(b"",)]
COLD = f"{contract.STATUS_DEGRADED}popular items"


def asks_itself(request: Any) -> bool:
    """Whether the server asks it: nobody is shown the answer, and nobody counts it."""
    try:
        return bool(request.request_id() == contract.UNLOGGED)
    except UnicodeDecodeError:
        return False


class Counts:
    """Rows by how they were answered, for Triton's metrics page; handed on a few times a second, as each hand-over is a
    call to another process. ``label``: what the page calls the how."""

    EVERY_S = 0.25

    def __init__(
        self, name: str = "vivace_answers_total", description: str = "Rows answered, by how", label: str = "how",
        every_s: float = EVERY_S,
    ) -> None:  # fmt: skip
        self._label, self._every_s = label, every_s
        self._family = pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.COUNTER)
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

    def hand_over(self) -> bool:
        """Whether it was time to."""
        now = time.monotonic()
        if now - self._last < self._every_s:
            return False
        for how, rows in self._waiting.items():
            if how not in self._metrics:
                self._metrics[how] = self._family.Metric(labels={self._label: how})
            self._metrics[how].increment(rows)
        self._waiting, self._last = {}, now
        return True


class ShardCounts:
    """Questions to shards, by shard and what came of them, for Triton's metrics page."""

    def __init__(self) -> None:
        self._family = pb_utils.MetricFamily(
            name="vivace_shard_calls_total", description="Questions to shards", kind=pb_utils.MetricFamily.COUNTER
        )
        self._metrics: dict[tuple[int, str], Any] = {}
        self._last = 0.0

    def hand_over(self, counts: dict[tuple[int, str], int]) -> None:
        """Takes what is in ``counts`` away, a few times a second."""
        if time.monotonic() - self._last < Counts.EVERY_S:
            return
        self._last = time.monotonic()
        for shard, how in list(counts):
            if (shard, how) not in self._metrics:
                self._metrics[shard, how] = self._family.Metric(labels={"shard": str(shard), "how": how})
            self._metrics[shard, how].increment(counts.pop((shard, how)))


class ParsedRequest:
    """One request as it goes through the stages: its ``place`` among those at hand, its rows, what is wrong with each
    ("" if nothing), CONTEXT of each as sent, its deadline (Unix ms). For requests with a query: ``options`` and, of
    each row, ``understood`` and ``unwanted``, ids that must not be found."""

    def __init__(self, place: int, request: Any, columns: ContextColumns) -> None:
        self.place, self.request, self.deadline = place, request, math.inf
        self.rows, self.errors, self.contexts = _parse(request, columns)
        try:
            self.deadline = deadline(request)
        except ValueError as error:
            self.errors = [row_error or str(error) for row_error in self.errors]
        self.options: SearchOptions | None = None
        self.understood = [""] * len(self.rows)
        self.unwanted = [NO_IDS] * len(self.rows)

    @cached_property
    def itself(self) -> bool:
        """See ``asks_itself``."""
        return asks_itself(self.request)

    @property
    def has_query(self) -> bool:
        return any(row.query for row in self.rows)


def contexts_of(request: Any, rows: int) -> Any:
    """CONTEXT of each row, [rows][1] of bytes; b"" where the request has none."""
    sent = pb_utils.get_input_tensor_by_name(request, contract.CONTEXT_OF_REQUEST.name)
    return NO_CONTEXT * rows if sent is None else sent.as_numpy()


def _parse(request: Any, columns: ContextColumns) -> tuple[list[Row], list[str], list[bytes]]:
    users, queries, histories, top_ks = (
        tensor_of(request, t) for t in (contract.USER_ID, contract.QUERY, contract.HISTORY, contract.TOP_K)
    )
    contexts = [context[0] for context in contexts_of(request, len(users))]
    rows, errors = [], []
    for user, query, history, top_k, context in zip(users, queries, histories, top_ks, contexts, strict=True):
        try:
            rows.append(parse_row(user[0], query[0], history, int(top_k[0]), context, columns))
            errors.append("")
        except ValueError as error:
            rows.append(Row("", None, 1))
            errors.append(str(error))
    return rows, errors, contexts


def new_only(request: Any) -> bool:
    """Whether a query must find nothing of the history."""
    if "seen" not in request.parameters():
        return False
    try:
        return not search_options(request).seen
    except ValueError:  # for the stage that reads all options to report
        return False


def search_options(request: Any) -> SearchOptions:
    """What the request's parameters ask of an answer to a query. Raises ValueError."""
    from search.online import SearchOptions  # its libraries, which a run without search does without

    return SearchOptions.parse(json.loads(request.parameters() or "{}"))
