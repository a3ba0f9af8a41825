"""How far a fleet's requests and answers of the last hour are from those of training, for Prometheus and ``vivace
drift``.

Workers count into small files (``serving.runtime.drift``); a thread of the supervisor adds up what is new in them, by
version, minute and hour. Counts of workers that ended stay counted.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import Metric

from serving.releases import version_of
from serving.runtime.drift import SUFFIX
from vivace.contract import ENSEMBLE
from vivace.drift import CLICKED, EXPECTED, FILE, Reference, compare
from vivace.impressions.queue import folder_of as impressions_of
from vivace.impressions.samples import RESULT, folder_of as samples_of

log = logging.getLogger("vivace.serve")
EVERY_S = 10.0
WINDOW, HOURS = 60, 24  # minutes that "the last hour" has; whole hours that are kept

Serving = Callable[[], Iterable[tuple[Path, Path]]]
"""(folder of the version, folder of its workers' counts) of each server there is."""


@dataclass
class _Version:
    """What was counted of one version: by minute, newest last; by whole hour of Unix time; since the start."""

    reference: Reference
    total: np.ndarray
    minutes: deque[tuple[int, np.ndarray]] = field(default_factory=lambda: deque(maxlen=WINDOW + 1))
    hours: deque[tuple[int, np.ndarray]] = field(default_factory=lambda: deque(maxlen=HOURS))

    def add(self, slots_S: np.ndarray, now_s: float) -> None:
        self.total += slots_S
        for kept, unit in ((self.minutes, 60), (self.hours, 3600)):
            at = int(now_s // unit)
            if not kept or kept[-1][0] != at:
                kept.append((at, np.zeros_like(slots_S)))
            kept[-1][1][:] += slots_S

    def last_hour(self, now_s: float) -> np.ndarray:
        first = int(now_s // 60) - WINDOW
        recent = [slots for minute, slots in self.minutes if minute > first]
        return np.sum(recent, axis=0) if recent else np.zeros_like(self.total)


class Drift:
    """A context manager that looks every ``every_s``; a collector of Prometheus' metrics."""

    def __init__(self, serving: Serving, every_s: float = EVERY_S) -> None:
        self._serving, self._every_s = serving, every_s
        self._versions: dict[Path, _Version | None] = {}  # None: made before there was a reference
        self._read: dict[Path, np.ndarray] = {}  # what each file held when it was read last
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="drift", daemon=True)

    def __enter__(self) -> Drift:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self.look(time.time())
            except Exception:
                log.exception("drift")

    # -- counting ------------------------------------------------------------------------------------
    def look(self, now_s: float) -> None:
        """Adds what workers have counted since the last look."""
        with self._lock:
            for release, folder in self._serving():
                version = self._version(release)
                for file in folder.glob(f"*{SUFFIX}") if version is not None else ():
                    slots_S = np.fromfile(file, np.float64)
                    if version is None or len(slots_S) != version.reference.slots:
                        continue  # it is being made
                    version.add(slots_S - self._read.get(file, np.zeros_like(slots_S)), now_s)
                    self._read[file] = slots_S
            self._read = {file: slots for file, slots in self._read.items() if file.exists()}
            idle = now_s // 3600 - HOURS
            for release in [r for r, v in self._versions.items() if v is not None and v.hours]:
                kept = self._versions[release]
                if kept is not None and kept.hours[-1][0] < idle and not release.exists():
                    del self._versions[release]

    def _version(self, release: Path) -> _Version | None:
        if release not in self._versions:
            files = sorted(release.glob(f"{ENSEMBLE}/*/{FILE}"))
            reference = Reference.load(files[0]) if files else None
            self._versions[release] = None if reference is None else _Version(reference, np.zeros(reference.slots))
        return self._versions[release]

    # -- for those who ask ---------------------------------------------------------------------------
    def report(self, hours: int = 0, now_s: float | None = None) -> list[dict[str, Any]]:
        """Each version that is served: its features beside the reference, in the last hour (0) or so many whole hours
        ago; what clicks were expected and came. ``features`` is None of a version that has no reference."""
        now_s = time.time() if now_s is None else now_s
        with self._lock:
            releases = dict.fromkeys(release for release, _ in self._serving())
            return [self._report(release, hours, now_s) for release in releases]

    def _report(self, release: Path, hours: int, now_s: float) -> dict[str, Any]:
        version, number = self._version(release), version_of(release)
        if version is None:
            return {"version": number, "features": None}
        at = int(now_s // 3600) - hours
        of_hour = [slots for hour, slots in version.hours if hour == at]
        slots = (of_hour or [np.zeros_like(version.total)])[0] if hours else version.last_hour(now_s)
        reference = version.reference
        return {
            "version": number, "part": reference.part, "requests": reference.requests,
            "features": [asdict(row) for row in compare(reference, slots)],
            "expected": float(slots[EXPECTED]), "clicked": float(slots[CLICKED]),
            "reference_expected": reference.expected, "reference_clicked": reference.clicked,
        }  # fmt: skip

    def collect(self) -> Iterator[Metric]:
        now_s = time.time()
        words = {
            "vivace_drift_psi": "PSI of the last hour against training; absent where requests are too few",
            "vivace_drift_ks": "Distance of distributions of the last hour and training, of numbers",
            "vivace_drift_requests": "Requests of the last hour that count for a feature",
        }
        families = {name: Metric(name, text, "gauge") for name, text in words.items()}
        expected = Metric("vivace_expected_clicks", "Clicks that the first head promised of what was shown", "counter")
        clicked = Metric("vivace_answer_events", "Events that name the request whose answer they are of", "counter")
        with self._lock:
            for release, version in self._versions.items():
                if version is None:
                    continue
                label = {"version": str(version_of(release))}
                for row in compare(version.reference, version.last_hour(now_s)):
                    labels = {**label, "feature": row.feature}
                    families["vivace_drift_requests"].add_sample("vivace_drift_requests", labels, row.requests)
                    for name, value in (("vivace_drift_psi", row.psi), ("vivace_drift_ks", row.ks)):
                        if value is not None:
                            families[name].add_sample(name, labels, value)
                expected.add_sample("vivace_expected_clicks_total", label, float(version.total[EXPECTED]))
                clicked.add_sample("vivace_answer_events_total", label, float(version.total[CLICKED]))
            runs = {release.parent for release in self._versions}
        yield from (*families.values(), expected, clicked)
        yield from _parity(runs)


def _parity(runs: set[Path]) -> Iterator[Metric]:
    """What ``vivace parity`` has left word of; nothing where it was not called."""
    replayed = Metric("vivace_parity_requests", "Served requests that were computed again offline", "counter")
    skewed = Metric("vivace_parity_skewed", "Those that differ, by what: ids or answer", "counter")
    for root in runs:
        try:
            tally = json.loads((samples_of(impressions_of(root / "feature_store")) / RESULT).read_text())
            replayed.add_sample("vivace_parity_requests_total", {}, tally["replayed"])
            for what in ("ids", "answer"):
                skewed.add_sample("vivace_parity_skewed_total", {"what": what}, tally[what])
        except (OSError, ValueError, KeyError):
            continue
        yield from (replayed, skewed)
