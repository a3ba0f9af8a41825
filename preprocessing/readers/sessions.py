"""Session logs one a line: items in order, separated by blanks; the layout of SR-GNN's and GCE-GNN's prepared files.

Licence: Tmall (IJCAI-15, Tianchi): research, non-commercial.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from preprocessing.readers.base import CHUNK_ROWS, LINE, Chunk, require
from vivace.contract import EVENT, GIVEN, GIVEN_TEST, ITEM, SOURCE_ROW, SPLIT, TIME, TRAIN, USER, DataSchema, TaskHead
from vivace.manifest import fingerprint_files

SESSIONS_FILE, TEST_FILE = "train_sessions.txt", "test_prefix_target.tsv"
LICENCE = "Tmall (IJCAI-15, Tianchi): research, non-commercial"


class Sessions:
    """``train_sessions.txt``, one session a line, the oldest first; and where it is there ``test_prefix_target.tsv``,
    one request a line: the items so far, a tab, the next one. Time is the place of the event in the log: the files have
    none. A session is called by its line, "s17", a request "t17": each is somebody unknown.

    A line of a session without an item is skipped; a request without items before, or without exactly one after, the
    tab is malformed.
    """

    schema = DataSchema(
        name="sessions", event_continuous=(), heads=(TaskHead("click", float("-inf")),), exclude_seen=False,
        sessions=True,
    )  # fmt: skip

    def __init__(self, path: Path) -> None:
        require(path, (SESSIONS_FILE,), "sessions, one a line")
        self.log, self.test = path / SESSIONS_FILE, path / TEST_FILE

    def fingerprint(self) -> str:
        return fingerprint_files(p for p in (self.log, self.test) if p.exists())

    def items(self) -> None:
        """No catalogue: the items are those of the log."""
        return None

    def interactions(self) -> Iterator[Chunk]:
        """Events of the sessions, then those of the test requests, in chunks of whole lines."""
        first = 0
        for file, of_line in ((self.log, _session), (self.test, _request)):
            if not file.exists():
                continue
            rows: list[tuple[str, str, int]] = []
            malformed: list[tuple[str, int]] = []
            with file.open(encoding="utf-8") as stream:
                for number, line in enumerate(stream, 1):
                    events = of_line(line, number)
                    rows += events or ()
                    if events is None:
                        malformed.append((line.rstrip("\n"), number))
                    if len(rows) >= CHUNK_ROWS:
                        yield _chunk(rows, malformed, first, file)
                        first, rows, malformed = first + len(rows), [], []
            yield _chunk(rows, malformed, first, file)
            first += len(rows)


class Tmall(Sessions):
    """Tmall in that layout: 65,286 sessions and 25,898 test requests."""

    schema = replace(Sessions.schema, name="tmall", licence=LICENCE)


def _session(line: str, number: int) -> list[tuple[str, str, int]]:
    """(user, item, mark) of each event of a session."""
    return [(f"s{number}", item, TRAIN) for item in line.split()]


def _request(line: str, number: int) -> list[tuple[str, str, int]] | None:
    """(user, item, mark) of each event of a test request, the one to predict last; None where it is none."""
    before, _, after = line.rstrip("\n").partition("\t")
    history, target = before.split(), after.split()
    if not history or len(target) != 1:
        return None
    user = f"t{number}"
    return [*((user, item, GIVEN) for item in history), (user, target[0], GIVEN_TEST)]


def _chunk(rows: list[tuple[str, str, int]], malformed: list[tuple[str, int]], first: int, file: Path) -> Chunk:
    frame = pd.DataFrame(rows, columns=[USER, ITEM, SPLIT])
    frame[SOURCE_ROW] = np.arange(first, first + len(frame))
    frame[TIME], frame[EVENT] = frame[SOURCE_ROW].astype(float) + 1, "click"
    bad = pd.DataFrame(malformed, columns=[LINE, SOURCE_ROW])
    bad["why"] = f"a line of {file.name}: expected items, a tab and one item"
    return Chunk(frame, malformed=bad if len(bad) else None)
