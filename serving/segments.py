"""Shared memory of a server's Python workers: segments in /dev/shm whose names begin with a prefix of the server's own,
so that whatever a dead worker left can be found."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

SHM = Path("/dev/shm")
SHM_PREFIX = "vivace_"


class Segments:
    """Those of one server, by their prefix."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix or f"{SHM_PREFIX}{uuid.uuid4().hex[:12]}_"

    def names(self, older_than_s: float = 0.0) -> set[str]:
        """Segments that were made at least so long ago."""
        now, names = time.time(), set()
        for path in SHM.glob(f"{self.prefix}*"):
            try:
                if now - path.stat().st_ctime >= older_than_s:
                    names.add(path.name)
            except FileNotFoundError:
                continue
        return names

    def close(self) -> None:
        """What users send lies there: it becomes the owner's alone. Triton's library makes segments readable for
        everyone, whatever the umask."""
        for segment in SHM.glob(f"{self.prefix}*"):
            with contextlib.suppress(FileNotFoundError):
                segment.chmod(0o600)

    def remove(self) -> None:
        for segment in SHM.glob(f"{self.prefix}*"):
            segment.unlink(missing_ok=True)

    def sweep(self, candidates: set[str], workers: Iterable[int]) -> list[str]:
        """Removes those of ``candidates`` that no living worker maps; returns their names.

        Triton itself keeps a dead worker's segment mapped, so only the workers are asked; ``candidates`` must be from
        before a reload, as a segment is made before its worker maps it.
        """
        mapped: set[str] = set()
        for pid in workers:
            try:
                text = Path(f"/proc/{pid}/maps").read_text()
            except OSError:
                continue
            mapped.update(name for name in candidates if name in text)
        removed = sorted(candidates - mapped)
        for name in removed:
            (SHM / name).unlink(missing_ok=True)
        return removed
