"""What was shown, as Parquet files in ``artifacts/<name>/impressions``: one row a request.

Every process that answers writes files of its own (``PART``), whole or not at all: under a name that no reader takes,
then renamed. Files of a day that is over are merged to one (``DAY``). Who writes a file holds the folder's lock shared,
from looking at who was forgotten to the renaming; who forgets, merges or tidies holds it alone. So a user who is
forgotten is in no file afterwards, not even in one that was about to be written.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vivace.columns import QUERY_TEXT as QUERY, TIME, USER
from vivace.contract import SESSION
from vivace.impressions import samples
from vivace.store.retention import DAY_MS

REQUEST_ID, CONTEXT = "request_id", "context"
ITEMS, SCORES, PROPENSITIES = "items", "scores", "propensities"
VARIANT, MODEL_VERSION, LATENCY, STATUS = "variant", "model_version", "latency_ms", "status"
TEAM = "team"
DRAFTED_FROM = ("served_ranking", "tried_ranking")  # team 0 and 1


def _list(values: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", values))  # as Parquet calls it, and gives it back


SCHEMA = pa.schema(
    [
        (REQUEST_ID, pa.string()),
        (USER, pa.string()),  # "" for an anonymous request
        (SESSION, pa.string()),  # of an anonymous request that named one
        (TIME, pa.int64()),  # Unix ms, when the answer was made
        (CONTEXT, pa.string()),  # JSON as it was sent
        (QUERY, pa.string()),
        (ITEMS, _list(pa.string())),  # in the order shown
        (SCORES, _list(pa.float32())),
        (PROPENSITIES, _list(pa.float32())),  # chance that this item was shown at this place
        (VARIANT, pa.string()),
        (MODEL_VERSION, pa.string()),
        (LATENCY, pa.float32()),  # from the first stage's begin to the answer
        (STATUS, pa.string()),
        (TEAM, _list(pa.string())),  # version that a click on this item speaks for; "" for none
        *((name, _list(pa.string())) for name in DRAFTED_FROM),  # items that a draft was made of; empty where none was
    ]
)
SUFFIX, PARTIAL = ".parquet", ".partial"
LOCK, FORGOTTEN = "impressions.lock", "forgotten.json"
KEPT_FORGOTTEN_MS = DAY_MS  # far longer than a row waits to be written


def completed(table: pa.Table) -> pa.Table:
    """What a file holds as ``SCHEMA``: one that was written before versions were interleaved names no team, and one
    before rankings were kept has none."""
    starts = pa.array(np.zeros(len(table) + 1), pa.int32())
    if TEAM not in table.column_names:
        lengths = pc.list_value_length(table[ITEMS].combine_chunks()).to_numpy(zero_copy_only=False)
        ends = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        table = table.append_column(TEAM, pa.ListArray.from_arrays(ends, pa.repeat("", int(lengths.sum()))))
    for name in DRAFTED_FROM:
        if name not in table.column_names:
            table = table.append_column(name, pa.ListArray.from_arrays(starts, pa.array([], pa.string())))
    return table.select(SCHEMA.names).cast(SCHEMA)


@contextlib.contextmanager
def locked(folder: Path, alone: bool = False, wait: bool = True) -> Iterator[bool]:
    """Holds the folder's lock; False, and nothing is held, where another has it and ``wait`` is not said."""
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        yield held
    finally:
        os.close(handle)


def _day(moment_ms: int) -> str:
    return time.strftime("%Y%m%d", time.gmtime(moment_ms / 1000))


def write_whole(table: pa.Table | Iterable[pa.Table], path: Path) -> None:
    """``path`` appears whole, for its owner alone, and stays after a loss of power."""
    partial = path.with_name(f"{path.name}{PARTIAL}")
    handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        with pq.ParquetWriter(file, SCHEMA, compression="zstd", compression_level=1) as writer:
            for part in [table] if isinstance(table, pa.Table) else table:
                writer.write_table(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def parts(folder: Path) -> list[Path]:
    """The files with what was shown, oldest first. Files of a day that was merged since are left out."""
    files = sorted(folder.glob(f"*{SUFFIX}"))
    merged = {file.name[:8] for file in files if _is_day(file)}
    return [file for file in files if _is_day(file) or file.name[:8] not in merged]


def _is_day(file: Path) -> bool:
    return len(file.name) == len("20260131") + len(SUFFIX)


def joined_of(folder: Path) -> Path:
    """The file that the impressions are joined to with their events, unless another is named."""
    return folder.with_name(f"{folder.name}{SUFFIX}")


class Part:
    """Names of one process's files, and the writing of one."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._process, self._number = folder, secrets.token_hex(4), 0

    def write(self, table: pa.Table) -> int:
        """Writes ``table`` (``SCHEMA``) without the rows of users who were forgotten since; the rows written."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # someone may have removed it
        with locked(self._folder):
            table = without_forgotten(table, _forgotten(self._folder))
            if not len(table):
                return 0
            moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
            write_whole(table, self._folder / f"{moment}-{self._process}-{self._number:06d}{SUFFIX}")
            self._number += 1
        return len(table)


# -- a user who is to be forgotten ------------------------------------------------------------------------
def _digest(user_id: str) -> str:
    return hashlib.sha256(user_id.encode()).hexdigest()


def _forgotten(folder: Path) -> dict[str, int]:
    """When users were forgotten, Unix ms, by the digest of their ids."""
    try:
        forgotten: dict[str, int] = json.loads((folder / FORGOTTEN).read_text())
    except FileNotFoundError:
        return {}
    return forgotten


def without_forgotten(table: pa.Table, forgotten: Mapping[str, int]) -> pa.Table:
    """Rows but those of users who were forgotten after them."""
    if not forgotten:
        return table
    users, times = table[USER].to_pylist(), table[TIME].to_pylist()
    keep = [time_ms > forgotten.get(_digest(user), 0) for user, time_ms in zip(users, times, strict=True)]
    return table.filter(pa.array(keep))


def forget(folder: Path, user_id: str) -> int:
    """Takes a user out of every file, and out of what is about to be written; the rows that were there. The joined file
    beside the folder goes whole, as it can be joined again, and so do samples of requests."""
    if not folder.is_dir():
        return 0
    joined_of(folder).unlink(missing_ok=True)
    samples.forget(samples.folder_of(folder))
    removed = 0
    with locked(folder, alone=True):
        now_ms = int(time.time() * 1000)
        known = {d: ms for d, ms in _forgotten(folder).items() if ms > now_ms - KEPT_FORGOTTEN_MS}
        partial = folder / f"{FORGOTTEN}{PARTIAL}"
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(known | {_digest(user_id): now_ms}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / FORGOTTEN)
        for path in parts(folder):
            removed += _without(path, user_id)
    return removed


def _without(path: Path, user_id: str) -> int:
    file = pq.ParquetFile(path)
    of_user = sum(
        pc.sum(pc.equal(file.read_row_group(group, columns=[USER])[USER], user_id)).as_py() or 0
        for group in range(file.num_row_groups)
    )
    if of_user == file.metadata.num_rows:
        path.unlink()
    elif of_user:
        groups = (completed(file.read_row_group(group)) for group in range(file.num_row_groups))
        write_whole((g.filter(pc.not_equal(g[USER], user_id)) for g in groups), path)
    return int(of_user)


# -- what is over -----------------------------------------------------------------------------------------
def tidy(folder: Path, days: int, now_ms: int | None = None) -> None:
    """Merges the files of each day that is over, removes what is older than ``days`` (0: nothing) and what a writer
    that was killed left. Does nothing while another process writes, and is safe to be killed: until the merged file is
    whole the others count, from then on it does."""
    now_ms = int(time.time() * 1000) if now_ms is None else now_ms
    with locked(folder, alone=True, wait=False) as held:
        if not held:
            return
        for left in folder.glob(f"*{PARTIAL}"):
            left.unlink()
        oldest, today = _day(now_ms - days * DAY_MS) if days else "", _day(now_ms)
        for path in folder.glob(f"*{SUFFIX}"):
            if path.name[:8] < oldest:
                path.unlink()
        of_day: dict[str, list[Path]] = {}
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            of_day.setdefault(path.name[:8], []).append(path)
        for day, paths in of_day.items():
            if day >= today:
                continue
            whole = folder / f"{day}{SUFFIX}"
            others = [path for path in paths if path != whole]
            if whole not in paths:
                write_whole((completed(pq.ParquetFile(path).read()) for path in others), whole)
            for path in others:
                path.unlink()
