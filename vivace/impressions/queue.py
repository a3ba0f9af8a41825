"""From answers to files, off the request path: a request costs one step of a queue, and a thread does the rest.

Axis legend: B rows of a request, K answered items.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack
import numpy as np

from vivace.contract import MAX_PARAMETER_ID_BYTES

if TYPE_CHECKING:
    import pyarrow as pa

    from vivace.impressions.files import Part

log = logging.getLogger(__name__)
ENVIRONMENT = "VIVACE_IMPRESSIONS"  # what a server tells its workers: JSON of ``ImpressionOptions``
TIDY_S = 3600.0
CLOSE_S = 4.0  # of the seconds that Triton gives its workers to end
TURN_S = 4.0  # between two looks at what waits: few at once cost as much as many
CHUNK, PAUSE_S = 100, 0.002  # requests that are made columns of while the answers' thread waits for the interpreter


@dataclass(frozen=True)
class ImpressionOptions:
    """Where and how answers are logged. A process writes a file when it has ``rows`` requests for one or the oldest is
    of ``seconds`` ago; where more than ``waiting`` requests wait to be looked at, the newest are dropped and counted.
    ``days``: older files go (0: none does). ``variant``: what the rows say of the experiment's arm."""

    folder: str
    variant: str = ""
    days: int = 365
    seconds: float = 60.0
    rows: int = 50_000
    waiting: int = 20_000

    def __post_init__(self) -> None:
        if self.rows < 1 or self.waiting < 1:
            raise ValueError(f"impressions: expected rows and waiting of 1 and more, got {self.rows}, {self.waiting}")
        if self.seconds <= 0 or self.days < 0:
            raise ValueError(f"impressions: expected seconds > 0 and days >= 0, got {self.seconds:g}, {self.days}")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ImpressionOptions:
        return cls(**json.loads(text))


def folder_of(feature_store: Path) -> Path:
    """Where the impressions of a run lie, by the folder of its feature store, which a compressed variant shares."""
    return feature_store.resolve().parent / "impressions"


Viewer = tuple[str, str, bytes, float, str]
"""Whom an answer is for: user, query, CONTEXT, when its first stage began, Unix ms, and the session of someone
anonymous."""


def packed_viewer(viewer: Viewer) -> bytes:
    """One row of the tensor SHOWN_TO."""
    packed: bytes = msgpack.packb(viewer)
    return packed


def usable_id(request_id: str) -> str:
    """A request's id; one is made where the caller gave none, or one that an event cannot name."""
    if not request_id or len(request_id.encode()) > MAX_PARAMETER_ID_BYTES:
        return uuid.uuid4().hex
    return request_id


def row_ids(request_id: str, rows: int) -> list[str]:
    """The ids of a request's rows: its own of a single row, else with the row's number."""
    request_id = usable_id(request_id)
    return [request_id] if rows == 1 else [f"{request_id}/{row}" for row in range(rows)]


class Drafts(NamedTuple):
    """What two versions' rankings made of a request. ``teams_BK``: of each item shown the version that a click on it
    speaks for, object of str [B, K], "" for none; ``rankings``: ITEM_ID of the served version and of the one on trial,
    object [B, K] each, b"" behind the last."""

    teams_BK: np.ndarray
    rankings: tuple[np.ndarray, np.ndarray]


Shown = tuple[
    str,
    Sequence[Viewer | bytes | None],
    np.ndarray,
    np.ndarray,
    list[bytes],
    float,
    Drafts | None,
    np.ndarray | None,
]
"""Request id; of each row whom it is for, or that packed; ITEM_ID object [B, K]; SCORE float32 [B, K]; STATUS; Unix ms
of the answer; what was interleaved, None where nothing was; the chance of what is shown float32 [B, K], None where
there is none in it."""


class ImpressionQueue:
    """One process's. ``put`` never waits and never raises; ``close`` writes what waits."""

    def __init__(self, options: ImpressionOptions, model_version: str) -> None:
        table_of([], "", "")  # loads pyarrow now: what is loaded before a worker freezes its garbage is walked no more
        self.options, self.model_version = options, model_version
        self.logged = self.dropped = 0  # requests since the start; dropped: too many waited, or the disk refused
        self._waiting: deque[Shown] = deque()
        self._part: Part | None = None
        self._closing, self._over = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="impressions", daemon=True)
        self._thread.start()

    def put(self, shown: Shown) -> None:
        if len(self._waiting) < self.options.waiting:
            self._waiting.append(shown)
        else:
            self.dropped += 1

    def close(self) -> None:
        self._over = True
        self._closing.set()
        self._thread.join(CLOSE_S)

    # -- the thread ----------------------------------------------------------------------------------
    def _run(self) -> None:
        tables: list[pa.Table] = []
        requests, since, tidied = 0, time.monotonic(), time.monotonic() - TIDY_S
        while True:
            over, looked = self._over, time.monotonic()
            if not over:
                self._closing.wait(min(TURN_S, self.options.seconds))
            while self._waiting and requests < self.options.rows:
                if not requests:
                    since = looked  # the oldest came since then
                requests += self._columns(tables)
                if not over:
                    time.sleep(PAUSE_S)
            full = requests >= self.options.rows or time.monotonic() - since >= self.options.seconds
            if requests and (full or over):
                self._write(tables, requests)
                requests = 0
                tables.clear()
            if over and not self._waiting:
                return
            if time.monotonic() - tidied >= TIDY_S:
                tidied = time.monotonic()
                self._tidy()

    def _write(self, tables: list[pa.Table], requests: int) -> None:
        import pyarrow as pa

        from vivace.impressions.files import Part

        try:
            self._part = self._part or Part(Path(self.options.folder))
            self._part.write(pa.concat_tables(tables).combine_chunks())
            self.logged += requests
        except Exception as error:  # such as a disk that is full; answers go on
            self._drop(requests, error)

    def _tidy(self) -> None:
        from vivace.impressions.files import tidy

        try:
            if Path(self.options.folder).is_dir():
                tidy(Path(self.options.folder), self.options.days)
        except Exception as error:  # it is tried again in an hour
            log.warning("impressions: not tidied: %s: %s", type(error).__name__, error)

    def _drop(self, requests: int, error: Exception) -> None:
        self.dropped += requests
        log.warning("impressions: %d requests are not logged: %s: %s", requests, type(error).__name__, error)

    def _columns(self, tables: list[pa.Table]) -> int:
        """Makes columns of the oldest that wait; how many there were."""
        taken = [self._waiting.popleft() for _ in range(min(len(self._waiting), CHUNK))]
        try:
            tables.append(table_of(taken, self.options.variant, self.model_version))
        except Exception as error:  # a row that is not as expected costs its neighbours, not the log
            self._drop(len(taken), error)
            return 0
        return len(taken)


def table_of(taken: list[Shown], variant: str, model_version: str) -> pa.Table:
    """Requests as rows of ``files.SCHEMA``; rows that are for nobody are left out."""
    import pyarrow as pa  # a server without impressions does without

    from vivace.impressions.files import DRAFTED_FROM, ITEMS, PROPENSITIES, SCHEMA, SCORES, TEAM

    heads: list[tuple[Any, ...]] = []
    items: list[bytes] = []
    scores: list[np.ndarray] = []
    teams: list[str] = []
    chances: list[np.ndarray] = []
    ends = [0]
    rankings: list[list[list[bytes]]] = [[], []]
    for request_id, rows, items_BK, scores_BK, statuses, made_ms, drafts, propensities_BK in taken:
        for row, id_ in enumerate(row_ids(request_id, len(rows))):
            viewer = rows[row]
            if not viewer:
                continue
            user, query, context, began_ms, session = msgpack.unpackb(viewer) if isinstance(viewer, bytes) else viewer
            shown = [item for item in items_BK[row].tolist() if item]
            items += shown
            scores.append(scores_BK[row, : len(shown)])
            teams += [""] * len(shown) if drafts is None else drafts.teams_BK[row, : len(shown)].tolist()
            for team, of_team in enumerate(rankings):
                of_team.append([] if drafts is None else [item for item in drafts.rankings[team][row].tolist() if item])
            certain_K = np.ones(len(shown), np.float32)
            chances.append(certain_K if propensities_BK is None else propensities_BK[row, : len(shown)])
            ends.append(len(items))
            status = statuses[row].decode("utf-8", "replace")
            sent = context.decode("utf-8", "replace")
            heads.append((id_, user, session, int(made_ms), sent, query, made_ms - began_ms, status))
    *of_viewers, latencies, status_column = zip(*heads, strict=True) if heads else [()] * 8
    offsets = pa.array(ends, pa.int32())
    flat, chance = (np.concatenate(parts) if parts else np.empty(0, np.float32) for parts in (scores, chances))
    lists = [
        pa.ListArray.from_arrays(offsets, values)
        for values in (
            pa.array(items, pa.string()), pa.array(flat, pa.float32()), pa.array(chance, pa.float32()),
            pa.array(teams, pa.string()),
        )
    ]  # fmt: skip
    constants = [pa.repeat(pa.scalar(text), len(heads)) for text in (variant, model_version)]
    named = zip((ITEMS, SCORES, PROPENSITIES, TEAM), lists, strict=True)
    *lists, team = [array.cast(SCHEMA.field(name).type) for name, array in named]
    drafted = [pa.array(of, SCHEMA.field(name).type) for name, of in zip(DRAFTED_FROM, rankings, strict=True)]
    columns = [*of_viewers, *lists, *constants, latencies, status_column, team, *drafted]
    typed = [c if isinstance(c, pa.Array) else pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)]
    return pa.Table.from_arrays(typed, schema=SCHEMA)


def queue_of_worker(environment: str, model_version: str) -> ImpressionQueue | None:
    """That of a worker whose server was told to log (``environment``: of ENVIRONMENT); None where it was not."""
    return ImpressionQueue(ImpressionOptions.from_json(environment), model_version) if environment else None
