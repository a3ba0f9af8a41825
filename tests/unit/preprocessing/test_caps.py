"""What of a user's training events is learned from, by hand, and what stays as it was."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocessing.caps import DAY_MS, LearningCaps, learned_from
from preprocessing.features import LAYOUT, Features
from vivace.contract import ITEM, TIME, USER
from vivace.manifest import MANIFEST, write_json

HOUR = 3_600_000


@pytest.mark.parametrize(
    ("caps", "expected"),
    [
        (LearningCaps(), [1, 1, 1, 1, 1, 1, 1]),
        (LearningCaps(day_events=2), [1, 1, 0, 1, 1, 1, 0]),
        (LearningCaps(same_item_s=3600), [1, 0, 1, 1, 1, 1, 1]),
        (LearningCaps(day_events=2, same_item_s=3600), [1, 0, 1, 1, 1, 1, 0]),
    ],
)
def test_what_is_learned(caps, expected):
    owner = np.array([0, 0, 0, 0, 1, 1, 1])
    items = np.array([5, 5, 6, 5, 5, 6, 7])
    times = np.array([0, 10, HOUR, DAY_MS, 0, 1, 2])
    assert caps.learned(owner, items, times).tolist() == [bool(x) for x in expected]
    for stop in range(len(items)):  # what comes later changes nothing of what came before
        assert caps.learned(owner[:stop], items[:stop], times[:stop]).tolist() == [bool(x) for x in expected[:stop]]


def test_training_sequences_alone_are_cut(tmp_path):
    features = Features(tmp_path / "features")
    rows = pa.table({USER: ["a", "b"], ITEM: [[5, 6, 7], [8]], TIME: [[1, 2, 3], [4]], "label": [[1, 0, 1], [0]]})
    for part in ("train", "whole", "valid"):
        (features.folder / part).mkdir(parents=True)
        pq.write_table(rows, features.folder / part / "part-0.parquet")
    write_json(features.folder / MANIFEST, {"config": {"layout": LAYOUT}})
    assert learned_from(features, LearningCaps(), tmp_path / "copies") is features
    capped = learned_from(features, LearningCaps(day_events=2), tmp_path / "copies")
    (train,), (valid,) = capped.files("train"), capped.files("valid")
    assert pq.read_table(train).to_pydict() == {
        USER: ["a", "b"], ITEM: [[5, 6], [8]], TIME: [[1, 2], [4]], "label": [[1, 0], [0]]
    }  # fmt: skip
    assert pq.read_table(valid) == rows == pq.read_table(features.files("train")[0])


def test_wrong_caps_are_refused():
    with pytest.raises(ValueError, match="day_events"):
        LearningCaps(day_events=-1)
