"""Logs of processes that append to a file of their own: bounded, and readable by their owner alone."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from pathlib import Path
from typing import BinaryIO

MAX_BYTES = 8 << 20
ERROR, ERRORS = re.compile(r"E\d{4} "), 5  # Triton's error lines, and how many a message quotes
NOTE = re.compile(r"[IWEF]\d{4} ")  # how each of Triton's own lines begins
TABLE = re.compile(r"[+|]|\s*$")  # of its models and options, and blank lines
MORE, LAST, WIDE = 9, 6, 400  # lines of an error, last lines beside errors, characters of a line
KEPT = 4  # older files beside the one that is written: triton.log.1 is the newest of them


def open_log(path: Path) -> BinaryIO:
    """``path`` to append to, for a process's output; others cannot read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600))  # noqa: SIM115
    os.fchmod(stream.fileno(), 0o600)
    return stream


def rotate(path: Path, max_bytes: int = MAX_BYTES, kept: int = KEPT) -> bool:
    """Copies a log that is over ``max_bytes`` away and empties it; whether it did.

    Its writer goes on at the new beginning, as it opened the file to append. What it writes between the copy and the
    emptying is lost.
    """
    try:
        if path.stat().st_size <= max_bytes:
            return False
    except FileNotFoundError:
        return False
    place = [path.with_name(f"{path.name}.{n}") for n in range(1, kept + 1)]
    for newer, older in reversed(list(itertools.pairwise(place))):
        if newer.exists():
            os.replace(newer, older)
    with path.open("rb") as source, open_log(place[0]) as target:
        target.truncate(0)
        shutil.copyfileobj(source, target)
    os.truncate(path, 0)
    return True


def tail(path: Path | None, lines: int, start: int = 0) -> str:
    """Why a process ended, by what it wrote behind byte ``start`` of its log, and where the whole of it is: its last
    errors with what follows each, else its last lines; of a log that was emptied since, all there is counts. Triton's
    tables and notes are left out where there is an error, and long lines cut."""
    if path is None or not path.exists():
        return ""
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(start if start <= size else 0, size - (1 << 16)))
        every = [line for line in stream.read().decode(errors="replace").splitlines() if not TABLE.match(line)]
    places = [i for i, line in enumerate(every) if ERROR.match(line)][-ERRORS:]
    quoted = [line for i in places for line in [every[i], *itertools.takewhile(_goes_on, every[i + 1 : i + MORE])]]
    last = every[-lines:] if not quoted else [line for line in every[-LAST:] if _goes_on(line) and line not in quoted]
    text = "\n".join(line if len(line) <= WIDE else f"{line[:WIDE]}…" for line in [*quoted, *last])
    return f"{text}\nthe whole log: {path}"


def _goes_on(line: str) -> bool:
    """Whether a line belongs to the one before it."""
    return not NOTE.match(line)
