"""Which version is better by what came of what it showed: figures of each arm, and each beside the control.

Users are the unit: a user counts in one arm, all that one was shown and clicked together; someone anonymous counts by
the session, or without one by the request. Users of several arms are left out and counted; of a rollout, what a user
was shown counts from when its steps put that user on a side for good.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from serving.rollout_steps import RolloutSteps
from training.judge.clicks.places import examined_in
from vivace.columns import CLICKED, ITEM, POSITION, TIME, USER
from vivace.contract import SESSION, TRIAL
from vivace.impressions.files import LATENCY, REQUEST_ID, VARIANT
from vivace.impressions.joined import PROPENSITY
from vivace.sequential import Comparison, Plan, Rate, compare

ARMS = ("variant", "model_version")  # columns of the joined log that may make the arms
CTR, NDCG = "CTR", "NDCG of clicks"
LOOKS = 60  # of the picture: moments at which the interval is drawn
BATCH = 500_000  # rows read at once
SHOWN, CLICKS, GAIN, CLICKED_REQUESTS, ARM, UNIT = "shown", "clicks", "gain", "clicked_requests", "arm", "unit"
SUMS = [SHOWN, CLICKS, GAIN, CLICKED_REQUESTS]


@dataclass(frozen=True)
class Look:
    """The control's comparison up to a moment, Unix ms."""

    until_ms: int
    comparison: Comparison


@dataclass
class Arm:
    """One arm. ``rates``: CTR over the first k places, and the NDCG of the clicks of requests that have any.
    ``coverage``: different items among the first k. Latencies in ms, of the stages; NaN where none was logged."""

    name: str
    users: int
    requests: int
    rates: dict[str, Rate]
    coverage: int
    p50_ms: float
    p99_ms: float
    by_place: list[tuple[int, int]]
    """(shown, clicked) of each place."""
    beside: dict[str, Comparison] = field(default_factory=dict)
    looks: list[Look] = field(default_factory=list)


@dataclass
class Evidence:
    """What a joined log says. ``crossed``: users of several arms, who are left out."""

    arms: list[Arm]
    control: str
    plan: Plan
    top_k: int
    crossed: int
    items: int
    """Different items that any arm showed."""
    began_ms: int
    ended_ms: int
    examined: list[float]
    """How often each place is looked at, relative to the first; NaN where the log does not say."""


def _requests(file: Path, by: str, top_k: int, unseen: set[str], since_ms: int = 0) -> Iterator[pd.DataFrame]:
    """The joined log's rows among the first ``top_k`` places, whole requests at a time, from a moment on, Unix ms,
    without copies of calls whose answers nobody saw (``shadows``)."""
    columns = [REQUEST_ID, USER, SESSION, TIME, *dict.fromkeys([by, VARIANT]), LATENCY, ITEM, POSITION, CLICKED]
    held = pd.DataFrame(columns=columns)
    for batch in pq.ParquetFile(file).iter_batches(BATCH, columns=columns):
        frame = batch.to_pandas()
        frame = frame[frame[TIME] >= since_ms]
        if unseen:
            frame = frame[(frame[VARIANT] != TRIAL) | ~frame[REQUEST_ID].isin(unseen)]
        if not len(frame):
            continue
        if len(held):
            frame = pd.concat([held, frame], ignore_index=True)
        last = frame[REQUEST_ID] == frame[REQUEST_ID].iloc[-1]  # it may go on in the next
        held, whole = frame[last], frame[~last]
        yield whole[whole[POSITION] <= top_k]
    yield held[held[POSITION] <= top_k]


def shadows(file: Path) -> set[str]:
    """Requests that the version on trial answered beside another: it was sent a copy (``vivace rollout --shadow``)."""
    first = pq.read_table(file, columns=[REQUEST_ID, VARIANT], filters=[(POSITION, "=", 1)]).to_pandas()
    of_trial = first[VARIANT] == TRIAL
    return set(first[REQUEST_ID][of_trial]) & set(first[REQUEST_ID][~of_trial])


def last_arm_began(file: Path, by: str, unseen: set[str]) -> int:
    """When the youngest arm showed its first item, Unix ms: before that there was no choice between the arms, and whom
    it took had been another's."""
    columns = [REQUEST_ID, TIME, *dict.fromkeys([by, VARIANT])]
    first = pq.read_table(file, columns=columns, filters=[(POSITION, "=", 1)]).to_pandas()
    first = first[(first[VARIANT] != TRIAL) | ~first[REQUEST_ID].isin(unseen)]
    return int(first.groupby(by)[TIME].min().max()) if len(first) else 0


def arms_in(file: Path, by: str, since_ms: int) -> set[str]:
    """Names of the arms that showed something from that moment on, Unix ms."""
    names = pq.read_table(file, columns=[by], filters=[(POSITION, "=", 1), (TIME, ">=", since_ms)])[by]
    return set(map(str, names.unique().to_pylist()))


def _of_requests(frame: pd.DataFrame, by: str) -> pd.DataFrame:
    """A row a request: its arm, unit, time and latency, and its SUMS."""
    gain = frame[CLICKED] / np.log2(frame[POSITION] + 1)
    sums = frame.assign(_gain=gain).groupby(REQUEST_ID, sort=False).agg(
        **{ARM: (by, "first"), USER: (USER, "first"), SESSION: (SESSION, "first"), TIME: (TIME, "first"),
           LATENCY: (LATENCY, "first"), SHOWN: (CLICKED, "size"), CLICKS: (CLICKED, "sum"), GAIN: ("_gain", "sum")}
    )  # fmt: skip
    most = int(sums[CLICKS].max()) if len(sums) else 0
    ideal = np.concatenate([[1.0], np.cumsum(1 / np.log2(np.arange(2, most + 2)))])
    sums[GAIN] = sums[GAIN] / ideal[sums[CLICKS].astype(int)]
    sums[CLICKED_REQUESTS] = (sums[CLICKS] > 0).astype(float)
    sums = sums.reset_index()
    return sums.assign(**{UNIT: units_of(sums)})


def units_of(frame: pd.DataFrame) -> np.ndarray:
    """Whom randomness goes by: the user, the session of someone anonymous, or else the request; object [rows]."""
    anonymous = np.where(frame[SESSION] == "", "\0\0" + frame[REQUEST_ID], "\0" + frame[SESSION])
    return np.where(frame[USER] == "", anonymous, frame[USER])  # no user's id starts so


def _counted(frame: pd.DataFrame, steps: RolloutSteps) -> np.ndarray:
    """Which requests' rows count in a rollout, bool [rows]: a request is of one user, moment and arm."""
    first = frame.drop_duplicates(REQUEST_ID)
    who = np.where(first[USER] == "", first[SESSION], first[USER])
    rows = zip(first[REQUEST_ID], who, first[TIME], first[VARIANT] == TRIAL, strict=True)
    kept = {request for request, user, time_ms, on_trial in rows if steps.counts(user, int(time_ms), bool(on_trial))}
    return frame[REQUEST_ID].isin(kept).to_numpy()


def evidence(
    file: Path, plan: Plan, by: str = VARIANT, control: str = "", top_k: int = 10, steps: RolloutSteps | None = None
) -> Evidence:
    """Reads a file of ``vivace.impressions.joined``, from when all arms were there. ``control``: an arm ("": the first
    by name). With several arms beside it each is judged at a part of the error. ``steps``: of the rollout that made the
    arms. Raises ValueError for an arm that is not there."""
    parts, items, places = list[pd.DataFrame](), dict[str, set[str]](), dict[str, pd.DataFrame]()
    unseen = shadows(file)
    since_ms = max(last_arm_began(file, by, unseen), steps.began_ms if steps else 0)
    for frame in _requests(file, by, top_k, unseen, since_ms):
        if steps is not None:
            frame = frame[_counted(frame, steps)]
        parts.append(_of_requests(frame, by))
        for name, of_arm in frame.groupby(by):
            items.setdefault(str(name), set()).update(of_arm[ITEM].unique())
            counted = of_arm.groupby(POSITION)[CLICKED].agg(["size", "sum"])
            before = places.get(str(name))
            places[str(name)] = counted if before is None else before.add(counted, fill_value=0)
    requests = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    if not len(requests):
        raise ValueError(f"{file}: nothing was shown in it; join again when requests were answered")
    arms_of = requests.groupby(UNIT)[ARM].nunique()
    crossed = set(arms_of.index[arms_of > 1])
    requests = requests[~requests[UNIT].isin(crossed)]
    names = sorted(items)
    control = control or names[0]
    if control not in names:
        there = ", ".join(name or "(unnamed: leave --control out)" for name in names)
        raise ValueError(f"--control: expected one of {there}, got {control!r}")
    shared = Plan(plan.effect, plan.alpha / max(len(names) - 1, 1), plan.power)
    of = {name: requests[requests[ARM] == name] for name in names}
    arms = [_arm(name, of[name], len(items[name]), places[name]) for name in names]
    rates = {arm.name: arm.rates for arm in arms}
    for arm in arms:
        if arm.name != control:
            arm.beside = {m: compare(rates[control][m], rate, shared) for m, rate in arm.rates.items()}
            arm.looks = looks(of[control], of[arm.name], shared)
    return Evidence(
        arms, control, shared, top_k, len(crossed), len(set().union(*items.values())),
        int(requests[TIME].min()) if len(requests) else 0, int(requests[TIME].max()) if len(requests) else 0,
        examined_in(file, top_k, unseen).tolist(),
    )  # fmt: skip


def _arm(name: str, requests: pd.DataFrame, items: int, places: pd.DataFrame) -> Arm:
    of_units = requests.groupby(UNIT)[SUMS].sum()
    column = {s: of_units[s].to_numpy(float) for s in SUMS}
    rates = {CTR: Rate.of(column[CLICKS], column[SHOWN]), NDCG: Rate.of(column[GAIN], column[CLICKED_REQUESTS])}
    latency = requests[LATENCY].to_numpy(float)
    latency = latency[np.isfinite(latency)]
    p50, p99 = np.percentile(latency, [50, 99]) if len(latency) else (np.nan, np.nan)
    by_place = [(int(row["size"]), int(row["sum"])) for _, row in places.sort_index().iterrows()]
    return Arm(name, len(of_units), len(requests), rates, items, float(p50), float(p99), by_place)


def looks(control: pd.DataFrame, treatment: pd.DataFrame, plan: Plan, count: int = LOOKS) -> list[Look]:
    """The comparison of CTR at ``count`` moments, evenly spaced from the first request to the last."""
    both = pd.concat([control.assign(_arm=0), treatment.assign(_arm=1)])
    if not len(both):
        return []
    codes, _ = pd.factorize(both[UNIT])
    edges = np.linspace(both[TIME].min(), both[TIME].max(), count + 1)[1:]
    order = np.argsort(both[TIME].to_numpy(), kind="stable")
    ends = np.searchsorted(both[TIME].to_numpy()[order], edges, side="right")
    arm_of = np.zeros(codes.max() + 1, int)
    arm_of[codes] = both["_arm"].to_numpy()
    clicks, shown = np.zeros(len(arm_of)), np.zeros(len(arm_of))
    out, start = [], 0
    for edge, end in zip(edges, ends, strict=True):
        rows = order[start:end]
        np.add.at(clicks, codes[rows], both[CLICKS].to_numpy(float)[rows])
        np.add.at(shown, codes[rows], both[SHOWN].to_numpy(float)[rows])
        rates = [Rate.of(clicks[arm_of == arm], shown[arm_of == arm]) for arm in (0, 1)]
        out.append(Look(int(edge), compare(rates[0], rates[1], plan)))
        start = end
    return out


def shown_rows(file: Path, by: str, arm: str) -> pd.DataFrame:
    """The rows of one arm as ``counterfactual`` reads them. Raises ValueError where there are none."""
    columns = [REQUEST_ID, USER, SESSION, ITEM, POSITION, CLICKED, PROPENSITY, by]
    frame = pq.read_table(file, columns=columns, filters=[(by, "=", arm)]).to_pandas()
    if not len(frame):
        raise ValueError(f"{file}: expected rows of {by} {arm!r}, got none")
    return frame.assign(**{UNIT: units_of(frame)})
