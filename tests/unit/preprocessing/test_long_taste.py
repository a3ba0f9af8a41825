"""The made-up shop whose users come back to what they liked long ago."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from preprocessing.readers import open_source
from preprocessing.readers.shop import Shop, ShopConfig
from vivace.contract import ITEM, USER

SIZE = {"users": 4, "items": 1000, "events": 2_600, "seed": 3}


def test_what_is_loved_is_mostly_last_seen_just_now_or_long_ago():
    source = open_source("shop", None, SIZE | {"long_taste": 0.6})
    log = pd.concat([chunk.rows for chunk in source.interactions()])
    assert not source.schema.exclude_seen, "items come again"
    lags = []
    for user, events in log.groupby(USER):
        loved = set(source._loved[int(user[5:])].ravel().tolist())
        last: dict[int, int] = {}
        for place, item in enumerate(events[ITEM].str[4:].astype(int)):
            if item in loved and item in last:
                lags.append(place - last[item])
            last[item] = place
    lags = np.array(lags)
    assert len(lags) > 400
    near, between, far = (lags <= 50).mean(), ((lags > 50) & (lags <= 200)).mean(), (lags > 200).mean()
    assert near > 0.3 and far > 0.1 and between < far / 2, "what is between tells nothing"


def test_without_it_the_shop_is_what_it_was():
    plain = Shop(ShopConfig(users=200, items=500, events=5000))
    assert plain.fingerprint() == "756eadda3f29aabc", "features that were prepared before would be made anew"
    assert plain.schema.exclude_seen
    with pytest.raises(ValueError, match="long_taste"):
        ShopConfig(long_taste=1.5)
