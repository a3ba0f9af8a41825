"""When which share of the users was on trial, beside the run: for whoever compares the arms afterwards."""

from __future__ import annotations

import contextlib
import json
import time
from bisect import bisect_right
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from serving.door.rollout import Split
from vivace.manifest import write_json

FILE = "rollout.json"  # in a run's folder: of its newest rollout


@dataclass(frozen=True)
class RolloutSteps:
    """``steps``: (Unix ms at which it began, share) of each step so far; ``most``: the share of the last one there will
    be."""

    salt: str
    most: float
    steps: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if list(self.steps) != sorted(self.steps):
            raise ValueError(f"steps: expected each to be later and no smaller than the one before, got {self.steps}")
        for _, share in self.steps:
            Split(self.salt, share, self.most)

    @property
    def began_ms(self) -> int:
        """0 before the first."""
        return self.steps[0][0] if self.steps else 0

    def counts(self, who: str, time_ms: int, on_trial: bool) -> bool:
        """Whether what this user, or session, was shown then by one version counts: of a side that is never left."""
        place = bisect_right(self.steps, time_ms, key=lambda step: step[0]) - 1
        if place < 0:
            return False
        split = Split(self.salt, self.steps[place][1], self.most)
        return split.takes(who) if on_trial else split.compares(who)

    def after(self, share: float, run: Path) -> RolloutSteps:
        """With a step that begins now, and written down where the run is not mounted read-only."""
        more = replace(self, steps=(*self.steps, (int(time.time() * 1000), share)))
        with contextlib.suppress(OSError):
            more.write(run)
        return more

    def write(self, run: Path) -> None:
        write_json(run / FILE, asdict(self))

    @classmethod
    def read(cls, run: Path) -> RolloutSteps | None:
        """None where the run had no rollout. Raises ValueError for what is none."""
        file = run / FILE
        if not file.exists():
            return None
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            steps = tuple((int(at), float(share)) for at, share in raw["steps"])
            return cls(str(raw["salt"]), float(raw["most"]), steps)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: expected the steps of a rollout; move it away to do without: {error}") from None
