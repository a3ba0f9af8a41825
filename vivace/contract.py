"""The one contract: special ids, columns, wire tensors, stage tensors and data-set schema.

Everything that crosses a stage border is named here and nowhere else: training, the ONNX exports,
``config.pbtxt``, the clients and the load tests import it. What the data side reads lies in ``vivace.columns``.

Axis legend: B requests, H raw history events, T encoded history events, N candidates, V item ids, D width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from vivace.columns import (
    CLICKED as CLICKED,
    CONTEXT as CONTEXT,
    EVENT as EVENT,
    FIRST_ID as FIRST_ID,
    GIVEN as GIVEN,
    GIVEN_TEST as GIVEN_TEST,
    HOUR as HOUR,
    ITEM as ITEM,
    MAX_VALUES as MAX_VALUES,
    NULL_ID as NULL_ID,
    OOV_ID as OOV_ID,
    PADDING_ID as PADDING_ID,
    POSITION as POSITION,
    PUBLIC_TENSORS as PUBLIC_TENSORS,
    QUERY_TEXT as QUERY_TEXT,
    SEARCH as SEARCH,
    SEPARATOR as SEPARATOR,
    SOURCE_ROW as SOURCE_ROW,
    SPLIT as SPLIT,
    STOCK as STOCK,
    TARGET as TARGET,
    TARGET_TIME as TARGET_TIME,
    TEST as TEST,
    TEXT as TEXT,
    TIME as TIME,
    TITLE as TITLE,
    TRAIN as TRAIN,
    USER as USER,
    VALID as VALID,
    WEEKDAY as WEEKDAY,
    WEIGHT as WEIGHT,
    DataSchema as DataSchema,
    TaskHead as TaskHead,
    cross_name as cross_name,
    cross_value as cross_value,
    label_column as label_column,
    target_column as target_column,
)
from vivace.live_layout import (
    LIVE_FEATURES as LIVE_FEATURES,
    LIVE_HALF_LIVES_MS as LIVE_HALF_LIVES_MS,
    live_features as live_features,
)

# -- limits of the public call ---------------------------------------------------------------------
MAX_TOP_K = 100
MAX_ID_BYTES = 1024  # longer user or item ids are refused or, inside a history, unknown
MAX_EVENT_TYPE_BYTES = 128
MAX_PARAMETER_ID_BYTES = 128  # of the parameters EVENT_ID and REQUEST_ID
MAX_HISTORY_EVENTS = 100_000
MAX_QUERY_BYTES = 4096
MAX_CONTEXT_BYTES = 16_384
MAX_ROW_BYTES = 65_536  # of an item's row as JSON
MAX_SEEN = 4096  # newest distinct items that an index does not answer; exact search excludes all that a store keeps

DTYPES = ("BYTES", "INT64", "INT32", "FP32", "BOOL")


@dataclass(frozen=True)
class WireTensor:
    """One tensor between a client and a model or between two stages; the batch axis is not in ``dims``."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    optional: bool = False
    """A request may leave it out."""

    def __post_init__(self) -> None:
        if self.datatype not in DTYPES:
            raise ValueError(f"WireTensor {self.name}: expected a datatype of {DTYPES}, got {self.datatype!r}")

    @property
    def config_datatype(self) -> str:
        """The name ``config.pbtxt`` uses (TYPE_STRING for BYTES)."""
        return "TYPE_STRING" if self.datatype == "BYTES" else f"TYPE_{self.datatype}"


# -- the public call: model ``recommend`` -----------------------------------------------------------
USER_ID = WireTensor("USER_ID", "BYTES", (1,))
QUERY = WireTensor("QUERY", "BYTES", (1,))
HISTORY = WireTensor("HISTORY", "BYTES", (-1,))
TOP_K = WireTensor("TOP_K", "INT32", (1,))
CONTEXT_OF_REQUEST = WireTensor("CONTEXT", "BYTES", (1,), optional=True)
"""JSON by the names of the data set's context and user columns, such as {"device": "phone"}; "" for none."""
REQUEST = (USER_ID, QUERY, HISTORY, TOP_K, CONTEXT_OF_REQUEST)
EVENT_PART = "\x1f"
"""Between the parts of one event of HISTORY: item id, event type, Unix time in ms. The last two may be left out."""

ITEM_ID = WireTensor("ITEM_ID", "BYTES", (-1,))
SCORE = WireTensor("SCORE", "FP32", (-1,))
STATUS = WireTensor("STATUS", "BYTES", (1,))
STATUS_SO_FAR = WireTensor("STATUS_SO_FAR", "BYTES", (1,))  # between the stages; the last one adds to it
STATUS_BEFORE = WireTensor("STATUS_BEFORE", "BYTES", (1,))  # of the feature transform, where retrieval adds to it
STATUS_OK = "ok"
STATUS_DEGRADED = "degraded: "
STATUS_RULES = "rules: "  # behind "ok; " or what was degraded: the business rules that changed the answer
STATUS_ERROR = "error: "  # only inside a request of several rows: that row has no answer

UNDERSTOOD = WireTensor("UNDERSTOOD", "BYTES", (1,))  # JSON of what QUERY was taken for; only of a run with search

# parameters of the request, not tensors: when the client stops waiting, Unix time in ms; what the answer to a QUERY
# must be, JSON {"values": {attribute: [..]}, "ranges": {number: [low, high]}, "seen": false}, the last for nothing of
# the history; how unlike its items are, 0..1
DEADLINE = "deadline_ms"
FILTERS = "filters"
DIVERSITY = "diversity"

# -- the append call: model ``append_event`` --------------------------------------------------------
APPEND_ITEM_ID = WireTensor("ITEM_ID", "BYTES", (1,))
EVENT_TYPE = WireTensor("EVENT_TYPE", "BYTES", (1,))
TIMESTAMP_MS = WireTensor("TIMESTAMP_MS", "INT64", (1,))
APPEND = (USER_ID, APPEND_ITEM_ID, EVENT_TYPE, TIMESTAMP_MS, CONTEXT_OF_REQUEST)
HISTORY_LENGTH = WireTensor("HISTORY_LENGTH", "INT32", (1,))
APPEND_OUTPUTS = (HISTORY_LENGTH, STATUS)  # STATUS: "ok", or what of the event is not known; it is stored all the same

# parameter of the request, text: what its sender calls the event of a user. Sent again under the same id, an event is
# answered as stored and not stored again. Of a request of several rows it is the id of all, each in its own place
EVENT_ID = "event_id"

# parameter of the request, text: the id of the ``recommend`` request whose answer the event is of. That id is Triton's
# own of a request, which its answer carries; of row r of a request of several rows it is "<id>/<r>"
REQUEST_ID = "request_id"
SESSION = "session"  # parameter of a ``recommend`` request, text: by it someone anonymous is told from others
TRIAL = "trial"  # what the log of impressions calls the arm of a version on trial
UNLOGGED = "vivace-unlogged"  # id of a request that a server asks itself: nobody is shown its answer

# -- the call that changes the store: model ``update_store`` ------------------------------------------
UPSERT, REMOVE, FORGET = "upsert", "remove", "forget"
ACTION = WireTensor("ACTION", "BYTES", (1,))  # one of the three
RECORD = WireTensor("RECORD", "BYTES", (1,))  # an item's row as JSON; an item's id; a user's id
UPDATE = (ACTION, RECORD)
UPDATE_OUTPUTS = (STATUS,)  # "ok", what of it is not as it should be, or "error: …" where nothing was done
MAX_FRESH = 10_000  # items that are not in the trained tables and are recommended all the same

# -- models of the repository -----------------------------------------------------------------------
ENSEMBLE = "recommend"
DATA = "data"  # parameter of its configuration: name of the data set
FEATURE_TRANSFORM = "feature_transform"
RETRIEVAL, RANKING, RESPONSE = "retrieval", "ranking", "response"

# Between the stages of a search, one tensor each way: every tensor more costs a request without a query as much.
# QUERY as the feature transform hands it on: the ids of items that must not be found, by commas, a blank, the text; ""
# without a query
SEARCH_FOR = WireTensor("SEARCH_FOR", "BYTES", (1,))
# What the log of impressions keeps of a row beside its answer: ``vivace.impressions.queue.Viewer``; "" where there
# is no log. Last among the tensors of both stages
SHOWN_TO = WireTensor("SHOWN_TO", "BYTES", (1,))
FOUND = WireTensor("FOUND", "BYTES", (1,))  # ``search.online.pack``: items, features, UNDERSTOOD; "" without a query
QUERY_SEARCH = "query_search"  # between ranking and response, where a run has search
APPEND_EVENT = "append_event"
UPDATE_STORE = "update_store"
STAGES = (FEATURE_TRANSFORM, RETRIEVAL, RANKING, RESPONSE)

ENCODED_HISTORY = "ENCODED_HISTORY"  # the one tensor between stages whose axis is events, not items


def head_tensor(head: str, dims: tuple[int, ...] = (-1,)) -> WireTensor:
    """The output of one task head: calibrated probability per answered item, FP32."""
    return WireTensor(head.upper(), "FP32", dims)


@dataclass(frozen=True)
class StageTensors:
    """Shapes between the stages, fixed by the trained models.

    ``history`` T, ``candidates`` N, ``items`` V (ids 0..V-1, special ids included), ``width`` D; ``timed``: whether the
    retrieval model reads the times of the history; ``memory``: newest encoded events handed to the ranker (0: all T);
    ``indexed``: candidates come from an approximate index, which is told the newest ``seen`` items by id; ``search``:
    features of an item that a query found, for the search ranker (0: QUERY is not searched for); ``rising``: items of
    the live counters that join the candidates (0: none, and no counter is read); ``types``: whether the types of the
    history's events are read; ``context`` and ``amounts``: categorical and continuous columns of the request's moment;
    ``counted``: those of the categorical ones that live counters go by; ``fresh``: items that are not in the trained
    tables that join the ranked ones (0: none, and no live change of the catalogue is read); ``rising_fresh``: those of
    them that may be there because they are clicked most just now (0: their events are not counted); ``shards``: servers
    that the items of retrieval are dealt to (0: one graph scores them all); ``slide``: of the window (``windows``);
    ``same_item_s``, ``user_events``, ``minute_events`` and ``newcomers``: what live counters take (``limits``);
    ``shown``: whether they say how often an item was shown too.
    """

    history: int
    candidates: int
    items: int
    width: int
    timed: bool = False
    memory: int = 0
    indexed: bool = False
    search: int = 0
    seen: int = 1024  # what was compiled before it was a number of its own
    rising: int = 0
    types: bool = False
    context: int = 0
    amounts: int = 0
    counted: int = 0
    fresh: int = 0
    rising_fresh: int = 0
    shards: int = 0
    slide: int = 1
    same_item_s: int = 0
    user_events: int = 0
    minute_events: int = 0
    newcomers: float = 0.0
    shown: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.memory <= self.history:
            raise ValueError(f"StageTensors.memory: expected 0..{self.history}, got {self.memory}")
        for name in ("history", "candidates", "items", "width"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"StageTensors.{name}: expected at least 1, got {value}")
        if self.candidates > self.items - FIRST_ID:
            raise ValueError(
                f"StageTensors.candidates: expected at most the {self.items - FIRST_ID} items of the catalogue, "
                f"got {self.candidates}; lower the preset's candidates"
            )
        if not 0 <= self.shards <= self.items - FIRST_ID:
            raise ValueError(f"StageTensors.shards: expected 0..{self.items - FIRST_ID}, got {self.shards}")

    def reading(self, history: int) -> StageTensors:
        """The shapes if only the newest ``history`` events are read (0: all of them)."""
        if not history or history >= self.history:
            return self
        return dataclasses.replace(self, history=history, memory=min(self.memory, history))

    @property
    def history_ids(self) -> WireTensor:
        """Item ids, oldest first, padded on the left with PADDING_ID."""
        return WireTensor("HISTORY_IDS", "INT64", (self.history,))

    @property
    def history_times(self) -> WireTensor:
        """Unix time of the same events in ms; 0 where padded or not known."""
        return WireTensor("HISTORY_TIMES", "INT64", (self.history,))

    @property
    def history_types(self) -> WireTensor:
        """Ids of the types of the same events; PADDING_ID where padded, NULL_ID where not known."""
        return WireTensor("HISTORY_TYPES", "INT64", (self.history,))

    @property
    def context_ids(self) -> WireTensor:
        """Ids of the categorical columns of the request's moment and user, in the schema's order."""
        return WireTensor("CONTEXT_IDS", "INT64", (self.context,))

    @property
    def context_amounts(self) -> WireTensor:
        """The continuous ones, normalised."""
        return WireTensor("CONTEXT_AMOUNTS", "FP32", (self.amounts,))

    @property
    def moment(self) -> tuple[WireTensor, ...]:
        """What retrieval and ranking read beside items and times: of the history's events, then of the request."""
        types = [self.history_types] if self.types else []
        ids = [self.context_ids] if self.context else []
        return (*types, *ids, *([self.context_amounts] if self.amounts else []))

    @property
    def passed_on(self) -> int:
        """Place among the outputs of the feature transform of the first that ranking reads too: it reads all from there
        on, without STATUS and what is of a search."""
        return 2 + self.timed

    @property
    def exclude(self) -> WireTensor:
        """True where an item must not be answered (seen items, special ids)."""
        return WireTensor("EXCLUDE", "BOOL", (self.items,))

    @property
    def lists_seen(self) -> bool:
        """Whether retrieval is told by id what it may not answer, not by a row of all items."""
        return self.indexed or bool(self.shards)

    @property
    def seen_ids(self) -> WireTensor:
        """Items that must not be answered, newest last, padded on the left with PADDING_ID."""
        return WireTensor("SEEN_IDS", "INT64", (self.seen,))

    @property
    def rising_ids(self) -> WireTensor:
        """Items that are clicked most just now, best first, PADDING_ID where there are fewer."""
        return WireTensor("RISING_IDS", "INT64", (self.rising,))

    @property
    def rising_features(self) -> WireTensor:
        """What the live counters say of the same items (``vivace.live``)."""
        return WireTensor("RISING_FEATURES", "FP32", (self.rising, live_features(self.counted, self.shown)))

    @property
    def seen_fresh(self) -> WireTensor:
        """Newest fresh items of the history: slots (``store.lmdb_catalogue``), newest last, or 0. An id is V + slot."""
        return WireTensor("SEEN_FRESH", "INT64", (self.fresh,))

    @property
    def rising_of_fresh(self) -> tuple[WireTensor, ...]:
        """Slots of fresh items that are clicked most just now, best first, 0 where there are fewer; what the live
        counters say of them, as of other items. None where they are not counted."""
        m = self.rising_fresh
        features = WireTensor("RISING_FRESH_FEATURES", "FP32", (m, live_features(self.counted, self.shown)))
        return (WireTensor("RISING_FRESH", "INT64", (m,)), features) if m else ()

    @property
    def proposed(self) -> int:
        """Candidates that are ranked: the retriever's and the rising items."""
        return self.candidates + self.rising

    @property
    def candidate_ids(self) -> WireTensor:
        return WireTensor("CANDIDATE_IDS", "INT64", (self.proposed,))

    @property
    def candidate_scores(self) -> WireTensor:
        return WireTensor("CANDIDATE_SCORES", "FP32", (self.proposed,))

    @property
    def encoded_history(self) -> WireTensor:
        return WireTensor(ENCODED_HISTORY, "FP32", (self.memory or self.history, self.width))

    @property
    def ranked_ids(self) -> WireTensor:
        """Candidates, best first; PADDING_ID where there were fewer than N to choose from."""
        return WireTensor("RANKED_IDS", "INT64", (self.proposed,))

    def ranked_values(self, heads: tuple[TaskHead, ...]) -> WireTensor:
        """Row 0: the score that ordered the candidates; row 1 + i: calibrated probability of head i. One tensor, as
        each tensor between two stages costs the server more than its bytes do."""
        return WireTensor("RANKED_VALUES", "FP32", (1 + len(heads), self.proposed))


# -- stage signatures, in the order of the graph ------------------------------------------------------
def feature_transform_outputs(s: StageTensors) -> tuple[WireTensor, ...]:
    live = [s.rising_features] if s.rising else []
    fresh = [*s.rising_of_fresh, s.seen_fresh] if s.fresh else []
    status = STATUS_BEFORE if s.shards else STATUS_SO_FAR
    return (*retrieval_inputs(s), *live, *fresh, status, *([SEARCH_FOR] if s.search else []), SHOWN_TO)


def retrieval_inputs(s: StageTensors) -> tuple[WireTensor, ...]:
    seen = s.seen_ids if s.lists_seen else s.exclude
    times, rising = [s.history_times] if s.timed else [], [s.rising_ids] if s.rising else []
    return (s.history_ids, seen, *times, *s.moment, *rising)


def retrieval_outputs(s: StageTensors) -> tuple[WireTensor, ...]:
    return (s.candidate_ids, s.candidate_scores, s.encoded_history)


def retrieval_stage_inputs(s: StageTensors) -> tuple[WireTensor, ...]:
    """What the stage reads: the graph's inputs and, where it asks shards, STATUS so far."""
    return (*retrieval_inputs(s), *([STATUS_BEFORE] if s.shards else []))


def retrieval_stage_outputs(s: StageTensors) -> tuple[WireTensor, ...]:
    return (*retrieval_outputs(s), *([STATUS_SO_FAR] if s.shards else []))


def ranking_inputs(s: StageTensors) -> tuple[WireTensor, ...]:
    live = [s.rising_ids, s.rising_features] if s.rising else []
    return (s.history_ids, s.candidate_ids, s.candidate_scores, s.encoded_history, *s.moment, *live)


def ranking_stage_inputs(s: StageTensors) -> tuple[WireTensor, ...]:
    """What the stage reads: the graph's inputs and, where fresh items join, those that are rising and those that the
    history has."""
    return (*ranking_inputs(s), *([*s.rising_of_fresh, s.seen_fresh] if s.fresh else []))


def ranking_outputs(s: StageTensors, heads: tuple[TaskHead, ...]) -> tuple[WireTensor, ...]:
    return (s.ranked_ids, s.ranked_values(heads))


def query_search_inputs(s: StageTensors) -> tuple[WireTensor, ...]:
    """RANKED_IDS is there to be waited for: no two stages may be at work for one request, as Triton 2.51 loses requests
    and frees memory twice where one of two fails."""
    return (SEARCH_FOR, s.ranked_ids)


def response_inputs(s: StageTensors, heads: tuple[TaskHead, ...]) -> tuple[WireTensor, ...]:
    return (*ranking_outputs(s, heads), STATUS_SO_FAR, TOP_K, *([FOUND] if s.search else []), SHOWN_TO)


def response_outputs(s: StageTensors, heads: tuple[TaskHead, ...]) -> tuple[WireTensor, ...]:
    """What the last stage answers, and so the ensemble."""
    return (ITEM_ID, SCORE, *(head_tensor(h.name) for h in heads), *([UNDERSTOOD] if s.search else []), STATUS)
