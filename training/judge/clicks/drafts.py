"""Which of two interleaved versions the clicks on their drafts prefer, and by how much.

**By how much** their CTRs differ is estimated from what a draft could have shown. A click on an item counts for the
version that would have it looked at more often, in proportion to the difference of the chances that it is looked at in
either ranking, and against how often drafts have it looked at: inverse propensity under the item-position model, as in
``counterfactual``, with the propensities of the coins (``team_draft.chances``). An item that no draft can show is taken
to be clicked as the rest of the page, so clicks by chance prefer neither version, whatever the rankings.
**Which wins** a request is team draft's own count (Radlinski, Kurup and Joachims 2008).
Axis legend: K places.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq

from serving.runtime.team_draft import chances, winner
from training.judge.clicks.experiment import UNIT, units_of
from vivace.columns import CLICKED, ITEM, POSITION, USER
from vivace.contract import SESSION
from vivace.impressions.files import DRAFTED_FROM, MODEL_VERSION, REQUEST_ID, TEAM
from vivace.sequential import UNKNOWN, Comparison, Plan, Preference, drafted, preferred

Item = TypeVar("Item", bound=Hashable)
LEAST_LOOKED_AT = 0.01  # of the first place: an estimate may be of few clicks


@dataclass(frozen=True)
class Teams:
    """Two versions whose rankings were interleaved: ``tried``, the one on trial, beside ``served``. ``lift``: of its
    CTR. ``decided``: requests in which more of one's items were clicked than of the other's; ``preference``: of
    these."""

    served: str
    tried: str
    users: int
    requests: int
    clicked: int
    decided: int
    lift: Comparison
    preference: Preference


def looked_at(examined_K: Sequence[float]) -> np.ndarray:
    """How often each place is looked at, float64 [K]: what the log says, or NDCG's discount where it does not say so of
    all (``places.examined``: NaN)."""
    seen = np.asarray(examined_K, float)
    if not np.isfinite(seen).all():
        return 1 / np.log2(np.arange(len(seen)) + 2)
    return np.maximum(seen, LEAST_LOOKED_AT)


def credits_of(served: Sequence[Item], tried: Sequence[Item], looked_at_K: np.ndarray) -> dict[Item, float]:
    """Of each item that a draft of both rankings may show at the first K places, the clicks by which the ranking
    ``tried`` is ahead of ``served`` for a click on it. Over the coins, the sum of credits by how often each item is
    looked at is 0."""
    places = len(looked_at_K)
    count = max(len(served), len(tried))
    looked = np.zeros(max(count, places))
    looked[:places] = looked_at_K
    gain = {item: float(looked[place]) for place, item in enumerate(tried)}
    for place, item in enumerate(served):
        gain[item] = gain.get(item, 0.0) - float(looked[place])
    often = {item: float(looked[:count] @ of_places) for item, of_places in chances(served, tried, count).items()}
    often = {item: chance for item, chance in often.items() if chance > 0}
    all_looks = sum(often.values())
    by_chance = sum(gain[item] for item in often) / all_looks if all_looks else 0.0
    return {item: gain[item] / chance - by_chance for item, chance in often.items()}


def teams(file: Path, plan: Plan, examined_K: Sequence[float]) -> list[Teams]:
    """What the clicks on interleaved answers say, of each two versions in a joined log; none where nothing was
    interleaved. Only the first K places count. ``examined_K``: how often each is looked at, NaN where that is not
    known. Users are the unit."""
    if TEAM not in pq.read_schema(file).names:  # joined before there were teams
        return []
    columns = [REQUEST_ID, USER, SESSION, MODEL_VERSION, ITEM, CLICKED, TEAM]
    chosen = [(TEAM, "!=", ""), (POSITION, "<=", len(examined_K))]
    frame = pq.read_table(file, columns=columns, filters=chosen).to_pandas()
    served = frame[TEAM].where(frame[TEAM] != frame[MODEL_VERSION]).groupby(frame[REQUEST_ID]).first()
    # where all items are of the version on trial, as of a TOP_K of 1, its neighbours in the log name the served one
    frame["served"] = frame[REQUEST_ID].map(served).groupby(frame[MODEL_VERSION]).transform(lambda s: s.ffill().bfill())
    net = _net(file, len(examined_K), looked_at(examined_K))
    return [
        _teams(str(of_versions["served"].iloc[0]), str(of_versions[MODEL_VERSION].iloc[0]), of_versions, net, plan)
        for _, of_versions in frame.groupby(["served", MODEL_VERSION], sort=True)
    ]


def _net(file: Path, places: int, looked_at_K: np.ndarray) -> pd.DataFrame:
    """A row of each request with a click on a draft whose rankings were logged: its unit, version on trial, clicks and
    what they come to in ``credits_of``."""
    if DRAFTED_FROM[0] not in pq.read_schema(file).names:  # joined before they were
        return pd.DataFrame(columns=[UNIT, MODEL_VERSION, "net", "clicks"]).astype({"net": float, "clicks": float})
    first = pq.read_table(file, columns=[REQUEST_ID, *DRAFTED_FROM], filters=[(POSITION, "=", 1)])
    first = first.filter(pc.is_valid(first[DRAFTED_FROM[0]]))
    served, tried = (first[name].to_pylist() for name in DRAFTED_FROM)
    rankings = dict(zip(first[REQUEST_ID].to_pylist(), zip(served, tried, strict=True), strict=True))
    columns = [REQUEST_ID, USER, SESSION, MODEL_VERSION, ITEM]
    clicked = pq.read_table(file, columns=columns, filters=[(CLICKED, "=", True), (POSITION, "<=", places)]).to_pandas()
    clicked = clicked[clicked[REQUEST_ID].isin(rankings.keys())]
    rows = []
    for request, of_request in clicked.groupby(REQUEST_ID, sort=False):
        credit = credits_of(rankings[request][0], rankings[request][1], looked_at_K)
        rows.append((request, sum(credit.get(item, 0.0) for item in of_request[ITEM]), len(of_request)))
    sums = pd.DataFrame(rows, columns=[REQUEST_ID, "net", "clicks"]).astype({"net": float, "clicks": float})
    heads = clicked.drop_duplicates(REQUEST_ID)
    heads = heads.assign(**{UNIT: units_of(heads)})[[REQUEST_ID, UNIT, MODEL_VERSION]]
    return sums.merge(heads, on=REQUEST_ID)


def _teams(served: str, tried: str, frame: pd.DataFrame, net: pd.DataFrame, plan: Plan) -> Teams:
    frame = frame.assign(**{UNIT: units_of(frame)})
    clicked = frame[frame.groupby(REQUEST_ID)[CLICKED].transform("any")]
    winners = {request: winner(of[TEAM], of[CLICKED], served) for request, of in clicked.groupby(REQUEST_ID)}
    units = clicked.groupby(REQUEST_ID)[UNIT].first()
    won = pd.Series(winners, dtype=int).to_frame("winner").assign(**{UNIT: units})
    won = won[won["winner"] != 0]
    of_units = (won["winner"] > 0).groupby(won[UNIT]).agg(["sum", "size"])
    preference = preferred(of_units["sum"].to_numpy(float), of_units["size"].to_numpy(float), plan)
    by_unit = net[net[MODEL_VERSION] == tried].groupby(UNIT)[["net", "clicks"]].sum()
    lift = drafted(by_unit["net"].to_numpy(float), by_unit["clicks"].to_numpy(float), plan) if len(by_unit) else UNKNOWN
    users, requests = frame[UNIT].nunique(), frame[REQUEST_ID].nunique()
    return Teams(served, tried, users, requests, len(winners), len(won), lift, preference)
