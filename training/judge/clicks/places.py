"""How much more often a place is looked at than another, from what was shown there and elsewhere.

Intervention harvesting (Agarwal et al. 2019, "Estimating position bias without intrusive interventions"): of what the
same user was shown at the first place and at another, the clicks at both are compared. So no taste has to be
estimated; the EM of ``search.propensity`` estimates one for every pair of user and item, and is off by a fifth where a
pair was shown three times. What is wanted changes with the moment, and a ranker that reads the moment puts first what
is wanted then: only the same context, query and part of the day are compared (``benchmarks.population``: without that,
places from the seventh on come out a tenth too low).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from vivace.columns import CLICKED, ITEM, POSITION, TIME, USER
from vivace.contract import TRIAL
from vivace.impressions.files import CONTEXT, QUERY, REQUEST_ID, VARIANT
from vivace.store.retention import DAY_MS

LEAST_CLICKS = 30  # at each of the two places
DAY_PART_MS = 6 * 3_600_000  # a taste is taken to be one for so long, by the clock


def examined(pair: np.ndarray, place: np.ndarray, clicked: np.ndarray, places: int) -> np.ndarray:
    """Chance that each place is looked at, relative to the first, float64 [places]; NaN where too little was shown at
    both. ``pair``: number of the user, item and moment, int64 [rows]; ``place`` from 0; ``clicked`` bool."""
    frame = pd.DataFrame({"pair": pair, "place": place, "clicked": clicked.astype(float)})
    both = frame.groupby(["pair", "place"])["clicked"].agg(["mean", "sum"]).reset_index()
    first = both[both["place"] == 0].set_index("pair")
    out = np.full(places, np.nan)
    out[0] = 1.0
    for number in range(1, places):
        there = both[both["place"] == number].set_index("pair")
        shared = there.join(first, how="inner", rsuffix=" first")
        if min(shared["sum"].sum(), shared["sum first"].sum()) >= LEAST_CLICKS:
            out[number] = shared["mean"].sum() / shared["mean first"].sum()
    return out


def examined_in(file: Path, top_k: int, unseen: Collection[str] = ()) -> np.ndarray:
    """The same of a file of ``vivace.impressions.joined``, float64 [top_k]; of users who are known.
    ``unseen``: requests whose answers by the version on trial nobody saw."""
    columns = [REQUEST_ID, VARIANT, USER, TIME, CONTEXT, QUERY, ITEM, POSITION, CLICKED]
    seen = [(USER, "!=", ""), (POSITION, "<=", top_k)]
    frame = pq.read_table(file, columns=columns, filters=seen).to_pandas()
    frame = frame[(frame[VARIANT] != TRIAL) | ~frame[REQUEST_ID].isin(list(unseen))]
    day_part = frame[TIME] % DAY_MS // DAY_PART_MS
    pair = frame.groupby([USER, ITEM, CONTEXT, QUERY, day_part], sort=False).ngroup().to_numpy()
    return examined(pair, frame[POSITION].to_numpy() - 1, frame[CLICKED].to_numpy(), top_k)
