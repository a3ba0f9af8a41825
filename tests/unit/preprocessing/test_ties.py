"""Held-out events that a tie of times decided are counted and said, with the rule."""

from __future__ import annotations

import pandas as pd
import pytest

from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers.tables import Tables
from preprocessing.splits import SplitConfig, Ties
from tests.unit.preprocessing.tables import HEAD, write
from vivace.contract import FIRST_ID, TARGET, TIME, USER

DECIDED = "which of them came last is decided by their order in the file"


def test_ties_by_hand():
    times = {
        "none": [1, 2, 3], "of the test": [1, 2, 2], "of the validation": [1, 1, 2], "all equal": [5, 5, 5],
        "too short": [1, 1], "long before": [1, 1, 2, 3], "next user's": [3, 4, 5], "begins so": [5, 6, 7],
    }  # fmt: skip
    rows = [(user, time) for user, of_user in times.items() for time in of_user]
    ties = Ties()
    ties.add(pd.DataFrame(rows, columns=[USER, TIME]))
    assert (ties.held_out, ties.tied, ties.equal) == (7, 3, 1)
    (note,) = ties.notes()
    assert "of 7 users with held-out events 3 have" in note and DECIDED in note and "all events of 1 of them" in note
    assert Ties(5, 0, 0).notes() == [] and "equal, so" not in Ties(5, 2, 0).notes()[0]


@pytest.mark.parametrize("items", ["abcd", "dcba"])
def test_the_order_in_the_file_decides(items, tmp_path):
    """Of two users; the log of one has one time alone."""
    rows = [f"tied,{item},1700000000\n" for item in items] + [f"other,{i},170000000{n}\n" for n, i in enumerate("abcd")]
    write(tmp_path, "e.csv", "user,item,ts\n" + "".join(rows))
    write(tmp_path, "mapping.toml", HEAD.format(events="e.csv"))
    source = Tables(tmp_path / "mapping.toml")
    notes = {}
    for kind in ("leave-one-out", "time"):
        root = tmp_path / kind
        config = PrepareConfig(partitions=1, split=SplitConfig(kind=kind))
        notes[kind] = [n for n in prepare(source, config, root, 0, lambda _: None)["results"]["notes"] if "equal" in n]
    names = pd.read_parquet(tmp_path / "leave-one-out" / "features" / "items.parquet")["item_id"].tolist()
    (file,) = (tmp_path / "leave-one-out" / "features" / "test").glob("*.parquet")
    held_out = pd.read_parquet(file).set_index(USER)[TARGET]
    assert names[held_out["tied"] - FIRST_ID] == items[-1] and names[held_out["other"] - FIRST_ID] == "d"
    assert len(notes["leave-one-out"]) == 1 and "of 2 users with held-out events 1 have" in notes["leave-one-out"][0]
    assert DECIDED in notes["leave-one-out"][0] and notes["time"] == []
