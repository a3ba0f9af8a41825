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
    """The last lines behind byte ``start``, and before them the last errors further up, which say why; of a log that
    was emptied since, all there is."""
    if path is None or not path.exists():
        return ""
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(start if start <= size else 0, size - (1 << 16)))
        every = stream.read().decode(errors="replace").splitlines()
    errors = [line for line in every[:-lines] if ERROR.match(line)]
    return "\n".join([*errors[-ERRORS:], *every[-lines:]])
