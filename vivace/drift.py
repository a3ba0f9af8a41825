"""What requests and answers looked like when a version was made, and how far those of now are from it.

A version carries ``Reference`` as ``FILE`` beside its model card. A server counts into the same bins, so the two are
compared bin by bin; counts of several processes add up.

Axis legend: n values of a feature, S slots: all that is counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

FILE = "drift.json"
NUMBER, CATEGORY = "number", "category"
LOOK, LARGE = 0.1, 0.25  # of the PSI: below the first stable, from the second on shifted. Siddiqi, Credit Risk
# Scorecards, 2006; Lewis, An Introduction to Credit Scoring, 1994
DECILES = np.arange(0.1, 0.95, 0.1)
MOST_IDS = 9  # ids of a category with a bin of their own; the others share one
STABLE, MODERATE, SHIFTED = "stable", "moderate shift", "large shift"


@dataclass(frozen=True)
class Feature:
    """One number or category of a request. ``bins``: their names; ``counts``: requests of the reference in each.

    A number x is in bin i where edges[i-1] < x <= edges[i]; a category in that of its place in ``ids``, else in the
    last. ``mean`` of the reference's numbers; ``judged``: whether the reference is one to be held to."""

    name: str
    kind: Literal["number", "category"]
    bins: tuple[str, ...]
    counts: tuple[int, ...]
    edges: tuple[float, ...] = ()
    ids: tuple[int, ...] = ()
    mean: float = 0.0
    judged: bool = True

    def __post_init__(self) -> None:
        inner = self.edges if self.kind == NUMBER else self.ids
        if not len(self.bins) == len(self.counts) == len(inner) + 1:
            raise ValueError(
                f"drift: {self.name}: expected a bin and a count more than edges or ids, got {len(self.bins)} bins, "
                f"{len(self.counts)} counts, {len(inner)} edges or ids"
            )

    def places(self, values: np.ndarray) -> np.ndarray:
        """Bins int64 [n] of values [n]."""
        if self.kind == NUMBER:
            return np.searchsorted(np.array(self.edges), values, side="left")
        equal = np.asarray(values)[:, None] == np.array(self.ids, np.int64)[None]
        return np.where(equal.any(1), equal.argmax(1), len(self.ids)) if self.ids else np.zeros(len(values), np.int64)

    def counted(self, values: np.ndarray) -> np.ndarray:
        """Slots float64 [bins + 1] of values: how many in each bin, then their sum."""
        counts = np.bincount(self.places(values), minlength=len(self.bins)).astype(np.float64)
        return np.append(counts, values.sum() if self.kind == NUMBER else 0.0)


def number(name: str, values: np.ndarray, edges: Sequence[float] | None = None, judged: bool = True) -> Feature:
    """Bins of equal share of the values, or between ``edges``; fewer where values repeat, three where they are one."""
    values = np.asarray(values, np.float64)
    if edges is None:
        quantiles = np.unique(np.quantile(values, DECILES))
        edges = [float(e) for e in quantiles if e < values.max()]
    if edges:
        ends = [f"{e:.4g}" for e in edges]
        bins = [f"<= {ends[0]}", *(f"{a} .. {b}" for a, b in zip(ends, ends[1:], strict=False)), f"> {ends[-1]}"]
    else:  # all values are the same: what is less and what is more is told apart from it
        only = float(values.max())
        edges, bins = [float(np.nextafter(only, -np.inf)), only], [f"< {only:.4g}", f"{only:.4g}", f"> {only:.4g}"]
    empty = Feature(name, "number", tuple(bins), (0,) * len(bins), tuple(edges))
    counts = np.bincount(empty.places(values), minlength=len(empty.bins))
    return Feature(
        name, "number", empty.bins, tuple(counts.tolist()), empty.edges, mean=float(values.mean()), judged=judged
    )


def category(name: str, values: np.ndarray, words: dict[int, str], always: Sequence[int] = ()) -> Feature:
    """Bins of the most frequent ids, and of those that are ``always`` to be told apart. ``words``: what they mean."""
    ids, counts = np.unique(np.asarray(values, np.int64), return_counts=True)
    frequent = [int(i) for i in ids[np.argsort(-counts, kind="stable")] if i not in always][: MOST_IDS - len(always)]
    chosen, count = (*frequent, *always), dict(zip(ids.tolist(), counts.tolist(), strict=True))
    of_chosen = [count.get(i, 0) for i in chosen]
    bins = (*(words.get(i, str(i)) for i in chosen), "others")
    return Feature(name, "category", bins, (*of_chosen, len(values) - sum(of_chosen)), ids=chosen)


@dataclass(frozen=True)
class Reference:
    """``inputs``: features of requests; ``answers``: of what they were answered, score first, then a head each;
    ``expected``: clicks that the first head promises of the first ten items, a request; ``clicked``: how many of the
    requests had their next item there; ``part`` of the split that they are of; ``history``: events that were read."""

    part: str
    requests: int
    history: int
    inputs: tuple[Feature, ...]
    answers: tuple[Feature, ...]
    expected: float = 0.0
    clicked: float = 0.0
    offsets: dict[str, int] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        places, start = dict[str, int](), 0
        for feature in self.features:
            places[feature.name] = start
            start += len(feature.bins) + 1
        object.__setattr__(self, "offsets", places)

    @property
    def features(self) -> tuple[Feature, ...]:
        return (*self.inputs, *self.answers)

    @property
    def slots(self) -> int:
        """S: those of the features, then EXPECTED and CLICKED."""
        return sum(len(f.bins) + 1 for f in self.features) + 2

    def of(self, feature: Feature, slots_S: np.ndarray) -> np.ndarray:
        """The slots [bins + 1] of one feature."""
        start = self.offsets[feature.name]
        return slots_S[start : start + len(feature.bins) + 1]

    def save(self, path: Path) -> None:
        record = asdict(self)
        del record["offsets"]
        path.write_text(json.dumps(record, ensure_ascii=False))

    @classmethod
    def load(cls, path: Path) -> Reference:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for part in ("inputs", "answers"):
            features: list[dict[str, Any]] = record[part]
            fields = [{k: tuple(v) if isinstance(v, list) else v for k, v in f.items()} for f in features]
            record[part] = tuple(Feature(**f) for f in fields)  # type: ignore[arg-type]
        return cls(**record)


EXPECTED, CLICKED = -2, -1  # slots: clicks that the first head promised of what was shown; events that name a request


# -- two distributions -----------------------------------------------------------------------------------
def _shares(counts: np.ndarray) -> np.ndarray:
    """Half a request more in each bin, so that an empty one is no infinity."""
    return (counts + 0.5) / (counts.sum() + 0.5 * len(counts))


def psi(reference: np.ndarray, counts: np.ndarray) -> float:
    """Population stability index of two counts by bin: sum of (q - p) ln(q / p)."""
    p, q = _shares(np.asarray(reference, np.float64)), _shares(np.asarray(counts, np.float64))
    return float(((q - p) * np.log(q / p)).sum())


def ks(reference: np.ndarray, counts: np.ndarray) -> float:
    """Largest difference of the two distribution functions at the bins' ends: at most the Kolmogorov-Smirnov statistic
    of the values themselves."""
    p, q = (np.cumsum(c) / max(np.sum(c), 1) for c in (reference, counts))
    return float(np.abs(p - q).max())


def least(feature: Feature) -> float:
    """Requests from which on chance alone stays below LOOK in 95 of 100 hours; infinite where the reference is too
    small. Of two samples of one distribution (1/n + 1/m) chi2(bins - 1) is the law of the PSI (Yurdakul 2018); the
    quantile by Wilson and Hilferty (1931)."""
    freedom = len(feature.bins) - 1
    if not freedom:
        return 0.0
    spread = 2 / (9 * freedom)
    quantile = freedom * (1 - spread + 1.645 * math.sqrt(spread)) ** 3
    rest = LOOK / quantile - 1 / max(sum(feature.counts), 1)
    return math.ceil(1 / rest) if rest > 0 else math.inf


@dataclass(frozen=True)
class Comparison:
    """A feature then and now. ``psi`` and ``ks`` are None where there is too little to say."""

    feature: str
    requests: int
    reference: str
    now: str
    psi: float | None
    ks: float | None
    verdict: str


def _words(feature: Feature, slots: np.ndarray) -> str:
    """The mean of a number; the shares of the most frequent categories."""
    counts = slots[:-1]
    if not counts.sum():
        return "-"
    if feature.kind == NUMBER:
        return f"{slots[-1] / counts.sum():.4g}"
    order = np.argsort(-counts, kind="stable")[:2]
    return ", ".join(f"{feature.bins[i]} {counts[i] / counts.sum():.0%}" for i in order if counts[i])


def compare(reference: Reference, slots_S: np.ndarray) -> list[Comparison]:
    """Every feature of ``reference`` beside what was counted."""
    rows = []
    for feature in reference.features:
        slots = reference.of(feature, slots_S)
        before, counts = np.array(feature.counts, np.float64), slots[:-1]
        requests, needed, index, distance = int(counts.sum()), least(feature), None, None
        if len(feature.bins) == 1:
            verdict = "one value in training: not compared"
        elif requests < needed:
            few = f"too few requests: {requests} of {needed:.0f}"
            verdict = few if math.isfinite(needed) else f"too few requests in training: {sum(feature.counts)}"
        else:
            index = psi(before, counts)
            distance = ks(before, counts) if feature.kind == NUMBER else None
            verdict = STABLE if index < LOOK else MODERATE if index < LARGE else SHIFTED
            if not feature.judged:
                verdict = f"not judged: the models have learned from these requests ({verdict})"
        then = np.append(before, feature.mean * before.sum())
        rows.append(
            Comparison(feature.name, requests, _words(feature, then), _words(feature, slots), index, distance, verdict)
        )
    return rows
