"""A sample of requests with all that their answers were computed from, to be computed again offline.

Histories change with the next event, so a sample carries its own: items, types and times as they were read, the values
of the context, and the ids that the served transform made of them. What was answered is in the log of impressions,
under the same id. Files appear whole, one a turn and worker, and go when they are replayed or a day old.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
ENVIRONMENT = "VIVACE_PARITY"  # what a server tells its workers: JSON of ``SampleOptions``
SUFFIX, PARTIAL, RESULT, TURN = ".jsonl", ".partial", "result.json", "turn.json"
WAITING, MOST_FILES, KEPT_S = 200, 500, 86_400
LATE_S = 30.0  # after which a worker whose turn it was is taken for gone


@dataclass(frozen=True)
class SampleOptions:
    """Where, which share of the requests, and how often what waits is written. Raises ValueError for a share that is
    none."""

    folder: str
    share: float
    seconds: float = 60.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"--parity: expected 0 % to 100 % of the requests, got {self.share:.4g} of 1")

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Sample:
    """``id``: of the impressions' row; ``history_ids``, ``context_ids`` and ``amounts``: what the served transform made
    of the others, without padding; ``changes``: number of the catalogue's newest change."""

    id: str
    version: str
    moment_ms: int
    items: list[str]
    types: list[str]
    times: list[int]
    context: dict[str, Any]
    history_ids: list[int]
    context_ids: list[int] = field(default_factory=list)
    amounts: list[float] = field(default_factory=list)
    changes: int = 0


def folder_of(impressions: Path) -> Path:
    """Where samples lie, by the folder of the impressions."""
    return impressions.with_name("parity")


class SampleWriter:
    """One worker's. ``put`` never waits: what is too much is dropped."""

    def __init__(self, options: SampleOptions) -> None:
        self.options = options
        self._waiting: deque[Sample] = deque(maxlen=WAITING)
        self._closing = threading.Event()
        self._process, self._number = secrets.token_hex(4), 0
        self._thread = threading.Thread(target=self._run, name="samples", daemon=True)
        self._thread.start()

    def put(self, sample: Sample) -> None:
        self._waiting.append(sample)

    def close(self) -> None:
        self._closing.set()
        self._thread.join(4.0)

    def _run(self) -> None:
        over = False
        self._say_turn()
        while not over:
            over = self._closing.wait(self.options.seconds)
            try:
                self._write()
            except OSError as error:  # such as a disk that is full: answers go on
                log.warning("samples: not written: %s", error)
            self._say_turn()

    def _say_turn(self) -> None:
        """Leaves word of when the next turn is (``next_turn_s``)."""
        folder = Path(self.options.folder)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            partial = folder / f"{self._process}{PARTIAL}"
            partial.write_text(json.dumps({"seconds": self.options.seconds}))
            os.replace(partial, folder / TURN)
        except OSError as error:
            log.warning("samples: %s not written: %s", folder / TURN, error)

    def _write(self) -> None:
        taken = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not taken:
            return
        folder = Path(self.options.folder)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for old in files(folder)[: -MOST_FILES + 1]:
            old.unlink(missing_ok=True)
        moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        write(folder / f"{moment}-{self._process}-{self._number:06d}{SUFFIX}", taken)
        self._number += 1


def write(path: Path, samples: list[Sample]) -> None:
    """``path`` appears whole, for its owner alone."""
    partial = path.with_name(f"{path.name}{PARTIAL}")
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
        file.writelines(f"{json.dumps(asdict(sample), ensure_ascii=False)}\n" for sample in samples)
    os.replace(partial, path)


def files(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob(f"*{SUFFIX}"))


def next_turn_s(folder: Path) -> float | None:
    """Seconds until every worker of the server has written the samples that wait; None where no server samples."""
    try:
        word = folder / TURN
        left = word.stat().st_mtime + float(json.loads(word.read_text())["seconds"]) - time.time()
    except (OSError, ValueError, KeyError):
        return None
    return None if left < -LATE_S else max(left, 0.0)


def read(folder: Path) -> Iterator[tuple[Path, list[Sample]]]:
    """Each file and its samples; files that are too old are removed."""
    for path in files(folder):
        try:
            if time.time() - path.stat().st_mtime > KEPT_S:
                path.unlink()
                continue
            samples = [Sample(**json.loads(line)) for line in path.read_text().splitlines()]
        except FileNotFoundError:  # its user was forgotten, or a writer made room
            continue
        yield path, samples


def forget(folder: Path) -> None:
    """Removes all samples: none says whose it is, and others come."""
    for path in files(folder):
        path.unlink(missing_ok=True)


def writer_of_worker() -> SampleWriter | None:
    """That of a worker whose server samples; None where it does not."""
    given = os.environ.get(ENVIRONMENT, "")
    return SampleWriter(SampleOptions(**json.loads(given))) if given else None
