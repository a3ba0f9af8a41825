"""A refreshed state takes a run's place: one record says what moves, and from then on whoever opens the run finishes.

artifacts/<name>/refresh/exchange.json      written last of the work; before it nothing of the run has changed
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from serving.releases import take_over
from vivace.manifest import exclusive, write_json
from vivace.run import Run

WORK, RECORD = "refresh", "exchange.json"


def begin_exchange(root: Path, parts: Sequence[str], dropped: Sequence[str], version: int) -> None:
    """Records that the folders ``parts`` of ``root/refresh`` and its repository's ``version`` (0: none) take the place
    of the run's, and that its folders ``dropped`` go."""
    write_json(root / WORK / RECORD, {"parts": list(parts), "dropped": list(dropped), "version": version})


def finish_exchange(root: Path) -> bool:
    """Does what is left of an exchange that was begun; whether there was one. The caller holds the run."""
    record = root / WORK / RECORD
    if not record.exists():
        return False
    wanted = json.loads(record.read_text())
    for name in wanted["parts"]:
        fresh, old = root / WORK / name, root / name
        if fresh.exists():
            _put_away(old)
            fresh.rename(old)
    for name in wanted["dropped"]:
        _put_away(root / name)
    if wanted["version"]:
        repository = Run(root).repository
        take_over(root / WORK / f"{repository.name}.{wanted['version']}", repository)
    record.unlink()
    shutil.rmtree(root / WORK)
    return True


def _put_away(folder: Path) -> None:
    """Moves a folder of the run to where it is removed at the end."""
    if not folder.exists():
        return
    away = folder.parent / WORK / f"old.{folder.name}"
    shutil.rmtree(away, ignore_errors=True)
    folder.rename(away)


def finish_exchange_of(root: Path) -> None:
    """The same for a caller that does not hold the run. Raises BusyError while another process works on it."""
    if is_exchanging(root):
        with exclusive(root):
            finish_exchange(root)


def is_exchanging(root: Path) -> bool:
    """Whether an exchange was begun and not finished."""
    return (root / WORK / RECORD).exists()
