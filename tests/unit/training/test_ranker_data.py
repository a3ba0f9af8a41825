"""Which requests teach the ranker and which watch it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from preprocessing.features import LAYOUT, SCHEMA_FILE, Features
from training.learn.ranker import RankerData
from training.models.retrieval import RetrievalModel
from training.presets import tiny
from vivace.contract import FIRST_ID, ITEM, TARGET, TIME, USER, DataSchema, label_column
from vivace.manifest import MANIFEST

USERS, EVENTS, SEED = 80, 6, 3


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Users who each go to one item that nobody else goes to, so that the target of a request says whose it is."""
    folder = tmp_path_factory.mktemp("features")
    schema = DataSchema("own-items", event_categoricals=(), event_continuous=(), exclude_seen=False)
    (folder / SCHEMA_FILE).write_text(json.dumps(schema.to_json()))
    (folder / MANIFEST).write_text(json.dumps({"key": "", "config": {"layout": LAYOUT}}))
    pq.write_table(pa.table({ITEM: [f"item{i}" for i in range(USERS)]}), folder / "items.parquet")
    items = np.repeat(np.arange(USERS) + FIRST_ID, EVENTS)
    lists = lambda flat: pa.ListArray.from_arrays(pa.array(np.arange(USERS + 1) * EVENTS, pa.int32()), pa.array(flat))  # noqa: E731
    label = label_column(schema.heads[0].name)
    train = {
        USER: [f"user {i}" for i in range(USERS)],
        ITEM: lists(items),
        TIME: lists(np.tile(np.arange(EVENTS), USERS) * 1000 + 1),
        label: lists(np.ones(USERS * EVENTS, np.int64)),
    }
    valid = {**train, label: np.ones(USERS, np.int64), TARGET: np.arange(USERS) + FIRST_ID}
    for part, columns in (("train", train), ("valid", valid)):
        (folder / part).mkdir()
        pq.write_table(pa.table(columns), folder / part / "part-000.parquet")
    return Features(folder)


def _users(source: RankerData, held_out: bool) -> list[int]:
    return torch.cat([batch.target_B for batch in source.batches(held_out, None, 16)]).tolist()


@pytest.mark.parametrize("past_events", [0, 2])
@pytest.mark.parametrize("control", [False, True])
def test_no_user_is_both_held_out_and_trained_on(features, past_events, control):
    preset = tiny()
    preset = replace(preset, ranking=replace(preset.ranking, past_events=past_events, held_out=0.3))
    retriever = RetrievalModel(preset.encoder, features.item_count(), torch.zeros(features.item_count())).eval()
    source = RankerData(features, retriever, preset, SEED, control)
    trained, held_out = _users(source, False), _users(source, True)
    assert set(trained).isdisjoint(held_out)
    assert sorted({*trained, *held_out}) == list(range(FIRST_ID, FIRST_ID + USERS))
    assert len(trained) == (past_events + 1) * len(set(trained)) and len(held_out) == len(set(held_out))
    assert 0.15 < len(held_out) / USERS < 0.45  # .3 of 80 by a hash
    assert _users(source, True) == held_out
