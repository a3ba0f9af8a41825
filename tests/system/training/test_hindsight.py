"""A list of the log whose click the recommender has learned: it must neither teach nor judge what is recommended."""

from __future__ import annotations

import pandas as pd

from training.search.recommender import in_hindsight
from vivace import contract


def test_a_click_is_hindsight_where_it_is_a_training_event_of_its_user_from_the_search_on(features):
    row = pd.concat(map(pd.read_parquet, features.files("train"))).iloc[0]
    user, item, when = row[contract.USER], int(row[contract.ITEM][-1]), int(row[contract.TIME][-1])
    other = next(i for i in range(contract.FIRST_ID, features.item_count()) if i not in row[contract.ITEM])
    cases = {
        "its own click": (user, when, [other, item], True),
        "clicked before the search": (user, when + 1, [item], False),
        "another item": (user, when, [other], False),
        "someone anonymous": ("", when, [item], False),
        "someone else": ("no such user", when, [item], False),
    }
    users, times, clicked, expected = zip(*cases.values(), strict=True)
    assert dict(zip(cases, in_hindsight(features, users, times, clicked), strict=True)) == dict(
        zip(cases, expected, strict=True)
    )
