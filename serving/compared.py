"""What two versions answer in the same seconds, side by side, from samples that their workers send.

Of the version on trial two kinds of answers come: its users', and those to copies of others' requests
(``vivace rollout start --shadow``), which nobody sees. A copy is compared with what was shown under the same id.
Clicks are live events that name a shown request.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import threading
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from serving.door.rollout import Split
from serving.runtime.answer_samples import Answer, unpacked
from serving.runtime.team_draft import NOBODY, winner
from vivace.contract import TRIAL
from vivace.drift import psi
from vivace.sequential import Comparison, Plan, Preference, Rate, compare, preferred
from vivace.store.interface import FeatureStore

log = logging.getLogger(__name__)
KEPT = 40_000  # answers that wait for a copy or a click, and requests whose clicks came before their answers did
UNITS = 1 << 16  # users are summed in so many groups, by a hash
RECENT, RECENT_S = 20_000, 300.0  # answers of each version that are looked at
EVENTS_S = 1.0  # between two looks at the live events
WAIT_S = 0.5
SPREAD_OF_QUARTILES = 1.349  # of a normal distribution, in standard deviations
BUFFER = 1 << 20
NOW_MS_MARGIN = 1_000


@dataclass
class Shown:
    """An answer that someone saw: which version's, whose, and the items that were clicked."""

    on_trial: bool
    unit: int
    answer: Answer
    counts: bool
    """Whether its user is of either side; who only waits for a later step is of none."""
    clicked: set[str] = field(default_factory=set)
    won: int = 0
    """Of interleaved versions: the winner, as ``team_draft.winner``."""


@dataclass(frozen=True)
class Side:
    """One version's answers of late, the last one of each user. ``scores``: of the first item, float [users]."""

    users: int = 0
    empty: int = 0
    no_numbers: int = 0
    scores: np.ndarray = field(default_factory=lambda: np.empty(0))

    @property
    def median(self) -> float:
        return float(np.median(self.scores)) if len(self.scores) else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation of the scores by their quartiles, which single ones do not move; a thousandth of the
        median at least, where all are alike."""
        if not len(self.scores):
            return math.nan
        low, high = np.quantile(self.scores, [0.25, 0.75])
        return max(float(high - low) / SPREAD_OF_QUARTILES, 1e-3 * abs(self.median), 1e-9)


def shift(tried: Side, served: Side) -> float:
    """By how many of the served version's spreads the median score lies higher; NaN where either has no score."""
    return (tried.median - served.median) / served.spread


def stability(tried: Side, served: Side, parts: int = 10) -> float:
    """Population stability index of the scores over the served version's deciles: by custom 0.1 is little, 0.25 much;
    NaN where either has no score."""
    if not len(tried.scores) or not len(served.scores):
        return math.nan
    edges = np.quantile(served.scores, np.linspace(0, 1, parts + 1)[1:-1])
    counts = [np.bincount(np.searchsorted(edges, of.scores, side="right"), minlength=parts) for of in (tried, served)]
    return psi(counts[1], counts[0])


@dataclass(frozen=True)
class Copies:
    """Means over requests that both versions answered. ``overlap``: of the first ten items, shared. ``moved``: of the
    score of the first item, in the served version's spreads. Milliseconds in the stages, as medians."""

    compared: int = 0
    overlap: float = math.nan
    moved: float = math.nan
    served_ms: float = math.nan
    tried_ms: float = math.nan


@dataclass(frozen=True)
class Clicks:
    """Of users who count on either side since the trial began. ``preference``: of interleaved ones."""

    served: Rate
    tried: Rate
    comparison: Comparison
    preference: Preference


class Compared:
    """Listens at ``path`` while it is entered. ``split``: who is answered by the version on trial, ``tried``.
    ``store``: opens the one with the live events, which stays open meanwhile. ``plan``: of the comparison of clicks."""

    def __init__(self, path: Path, split: Split, tried: int, store: Callable[[], FeatureStore], plan: Plan) -> None:
        self._path, self._split, self._tried, self._open, self.plan = path, split, str(tried), store, plan
        self._recent = {on_trial: deque[tuple[float, int, float]](maxlen=RECENT) for on_trial in (False, True)}
        self._shown, self._copies = OrderedDict[str, Shown](), OrderedDict[str, Answer]()
        self._early = OrderedDict[str, list[str]]()  # clicks of answers that a worker has not handed over yet
        self._pairs: deque[tuple[float, float, float, float]] = deque(maxlen=RECENT)
        self._lock, self._over = threading.Lock(), threading.Event()
        self._sums = np.zeros((4, 2, UNITS))  # shown, clicked, decided, won; of the served version and the one on trial
        self._event, self._looked, self._fault = -1, 0.0, ""
        self._store: FeatureStore | None = None
        self._thread = threading.Thread(target=self._run, name="comparison", daemon=True)

    def __enter__(self) -> Compared:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._path.unlink(missing_ok=True)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        self._socket.bind(str(self._path))
        self._path.chmod(0o600)
        self._socket.settimeout(WAIT_S)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._path.unlink(missing_ok=True)
        self._thread.join()
        self._socket.close()

    def step(self, split: Split) -> None:
        """Another share of the users from now on. Who counts on a side stays there, so what was counted does."""
        with self._lock:
            self._split = split

    # -- for those who ask ---------------------------------------------------------------------------
    def side(self, on_trial: bool) -> Side:
        """Of the last ``RECENT_S``."""
        with self._lock:
            since = time.monotonic() - RECENT_S
            last = {unit: score for moment, unit, score in self._recent[on_trial] if moment >= since}
        scores = np.fromiter(last.values(), float, len(last))
        empty = int(np.isneginf(scores).sum())
        finite = scores[np.isfinite(scores)]
        return Side(len(scores), empty, len(scores) - empty - len(finite), finite)

    def copies(self) -> Copies:
        with self._lock:
            pairs = np.array(self._pairs)
        if not len(pairs):
            return Copies()
        moved = float(np.median(pairs[:, 1])) / self.side(False).spread
        served_ms, tried_ms = np.median(pairs[:, 2:], axis=0)
        return Copies(len(pairs), float(pairs[:, 0].mean()), moved, float(served_ms), float(tried_ms))

    def clicks(self) -> Clicks:
        with self._lock:
            shown, clicked, decided, won = self._sums.copy()
        served, tried = (Rate.of(clicked[side], shown[side]) for side in (0, 1))
        return Clicks(served, tried, compare(served, tried, self.plan), preferred(won[1], decided[1], self.plan))

    # -- the thread ----------------------------------------------------------------------------------
    def _run(self) -> None:
        with contextlib.ExitStack() as life:
            while not self._over.is_set():
                with contextlib.suppress(TimeoutError):
                    self.take(self._socket.recv(BUFFER))
                if time.monotonic() - self._looked >= EVENTS_S:
                    self._looked = time.monotonic()
                    self._read_events(life)

    def take(self, raw: bytes) -> None:
        """A datagram of a worker; what is none is left out."""
        try:
            on_trial, answers = unpacked(raw)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            log.warning("comparison: expected answers of a worker, got %s", error)
            return
        with self._lock:
            for answer in answers:
                self._answer(on_trial, answer)

    def _answer(self, on_trial: bool, answer: Answer) -> None:
        score = answer.score if answer.items else -math.inf
        score = math.nan if answer.items and not math.isfinite(score) else score
        unit = zlib.crc32((answer.who or answer.request_id).encode()) % UNITS
        self._recent[on_trial].append((time.monotonic(), unit, score))
        if not answer.request_id:
            return
        if on_trial and not self._split.takes(answer.who):
            _keep(self._copies, answer.request_id, answer)
        else:
            counts = on_trial or self._split.compares(answer.who)
            _keep(self._shown, answer.request_id, Shown(on_trial, unit, answer, counts))
            if counts:
                self._sums[0, int(on_trial), unit] += len(answer.items)
            for item in self._early.pop(answer.request_id, ()):
                self._click(self._shown[answer.request_id], item)
        copy, shown = self._copies.get(answer.request_id), self._shown.get(answer.request_id)
        if copy is not None and shown is not None:
            del self._copies[answer.request_id]
            of = shown.answer
            overlap = len(set(copy.items) & set(of.items)) / max(len(of.items), len(copy.items), 1)
            self._pairs.append((overlap, copy.score - of.score, of.latency_ms, copy.latency_ms))

    def _read_events(self, life: contextlib.ExitStack) -> None:
        """Clicks that came since the last look. Without a store that can be read there are none to judge by."""
        try:
            if self._store is None:
                self._store = life.enter_context(contextlib.closing(self._open()))
            if self._event < 0:
                now_ms = int(time.time() * 1000)
                self._event, _ = self._store.live_events(0, now_ms - NOW_MS_MARGIN, 1)
            self._event, events = self._store.live_events(self._event, most=RECENT)
        except Exception as error:  # whatever a store raises: answers are judged all the same
            if f"{error}" != self._fault:
                self._fault = f"{error}"
                log.warning("comparison: clicks are not judged: %s: %s", type(error).__name__, error)
            return
        with self._lock:
            for event in events:
                if not event.request_id or event.shown:
                    continue
                if (shown := self._shown.get(event.request_id)) is not None:
                    self._click(shown, event.item_id)
                else:
                    _keep(self._early, event.request_id, [*self._early.get(event.request_id, ()), event.item_id])

    def _click(self, shown: Shown, item: str) -> None:
        if item in shown.clicked or item not in shown.answer.items:
            return
        if not shown.counts:
            return
        shown.clicked.add(item)
        self._sums[1, int(shown.on_trial), shown.unit] += 1
        if shown.answer.teams:
            served = next((team for team in shown.answer.teams if team not in (NOBODY, self._tried)), NOBODY)
            won = winner(shown.answer.teams, [i in shown.clicked for i in shown.answer.items], served)
            self._sums[2, 1, shown.unit] += abs(won) - abs(shown.won)
            self._sums[3, 1, shown.unit] += (won > 0) - (shown.won > 0)
            shown.won = won


def _keep(into: OrderedDict[str, Any], request_id: str, value: Any) -> None:
    into[request_id] = value
    if len(into) > KEPT:
        into.popitem(last=False)


def as_metrics(compared: Compared) -> Iterator[Metric]:
    """What is compared, for Prometheus."""
    served, tried = compared.side(False), compared.side(True)
    copies, clicks = compared.copies(), compared.clicks()
    of_each = (
        ("users", "Users whose last answer of late is compared", served.users, tried.users),
        ("empty", "Of these, whose answer has no item", served.empty, tried.empty),
        ("score_median", "Median score of the first item", served.median, tried.median),
        ("clicks_per_item", "Clicks a shown item since the trial began", clicks.served.value, clicks.tried.value),
        ("latency_ms", "Median of requests that both versions answered", copies.served_ms, copies.tried_ms),
    )
    for name, description, *values in of_each:
        family = GaugeMetricFamily(f"vivace_rollout_{name}", description, labels=["variant"])
        for variant, value in zip(("served", TRIAL), values, strict=True):
            family.add_metric([variant], value)
        yield family
    of_both = (
        ("score_shift", "Shift of the median score, in the served version's spreads", shift(tried, served)),
        ("score_psi", "Population stability index of the score", stability(tried, served)),
        ("copies", "Requests that both versions answered", copies.compared),
        ("overlap", "Of these, mean share of the first ten items that both answer", copies.overlap),
        ("won", "Of requests that one of two interleaved versions won, those of this one", clicks.preference.share),
    )
    for name, description, value in of_both:
        yield GaugeMetricFamily(f"vivace_rollout_{name}", description, value=value)


def as_state(compared: Compared) -> dict[str, Any]:
    """The same for ``vivace rollout status``, as JSON."""
    served, tried = compared.side(False), compared.side(True)
    clicks = compared.clicks()
    sides = {
        name: {"users": side.users, "empty": side.empty, "score": side.median}
        for name, side in (("served", served), ("trial", tried))
    }
    rates = {"served": clicks.served.value, "trial": clicks.tried.value}
    return sides | {
        "score_shift": shift(tried, served), "score_psi": stability(tried, served),
        "copies": asdict(compared.copies()),
        "clicks": rates | asdict(clicks.comparison) | {"verdict": clicks.comparison.verdict},
        "preference": asdict(clicks.preference) | {"verdict": clicks.preference.verdict},
    }  # fmt: skip
