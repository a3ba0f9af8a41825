"""Event types and context in the models: Merlin's blocks and ours, packing, and a planted effect that must be found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from preprocessing.features import Features
from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers import open_source
from tests.support import quiet
from training.checkpoints import load_ranker, load_retrieval
from training.data import batches
from training.data.columns import ITEMS_ALONE, EventColumns
from training.learn.ranker import train_ranker
from training.learn.retriever import train_retrieval
from training.models.context import ContextTower, moment_of
from training.presets import preset
from training.scoring import scored
from vivace.context import ContextColumns

USERS = 300
MANY = ContextColumns(tuple("abcdefghijklm"), tuple(range(4, 17)), ("x", "y"))


@pytest.mark.parametrize("columns", [MANY, ContextColumns(("a",), (5,)), ContextColumns((), (), ("x",))])
def test_merlins_tower_and_the_plain_one_are_the_same(columns):
    torch.manual_seed(1)
    merlin, plain = ContextTower(columns, 32).eval(), ContextTower(columns, 32, plain=True).eval()
    assert list(merlin.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(merlin.state_dict())
    ids = torch.stack([torch.randint(0, s, (7, 3)) for s in columns.sizes], -1) if columns.sizes else None
    amounts = torch.randn(7, 3, len(columns.continuous)) * 9 if columns.continuous else None
    like = torch.zeros(7, 3, 1)
    torch.testing.assert_close(merlin((ids, amounts), like), plain((ids, amounts), like), rtol=0, atol=1e-5)
    alone = merlin(tuple(None if x is None else x[2:3, 1:2] for x in (ids, amounts)), like[2:3, 1:2])
    torch.testing.assert_close(alone[0, 0], merlin((ids, amounts), like)[2, 1], rtol=0, atol=1e-5)


def test_training_leaves_some_contexts_out_whole():
    """So that a request without a context is answered by a model that has met such."""
    torch.manual_seed(2)
    ids, amounts = torch.randint(3, 5, (4000, 3)), torch.ones(4000, 2)
    some_ids, some_amounts = ContextTower(MANY, 8, plain=True)._some_left_out((ids, amounts))
    left_out = (some_ids != ids).any(1)
    assert 0.07 < left_out.float().mean() < 0.13
    assert (some_ids[left_out] == 1).all() and not some_amounts[left_out].any() and (some_amounts[~left_out] == 1).all()


def test_packed_events_come_back():
    columns = EventColumns(True, True, ("device",), ("price",))
    values = {"item_id": [5, 6], "timestamp_ms": [10**12, 2], "event_type": [3, 4], "device": [1, 9],
              "price": np.array([-1.25, np.pi], np.float32)}  # fmt: skip
    packed = columns.packed({n: np.asarray(v) for n, v in values.items()})
    assert packed.shape == (2, columns.width) and packed.dtype == np.int64
    assert {n: v.tolist() for n, v in columns.unpacked(packed).items()} == {
        n: np.asarray(v).tolist() for n, v in values.items()
    }
    events = columns.read(torch.from_numpy(packed))
    assert events.ids.tolist() == [5, 6] and events.types.tolist() == [3, 4]
    assert events.times.tolist() == [10**12, 2] and events.context[0].tolist() == [[1], [9]]
    assert events.context[1].tolist() == values["price"].reshape(2, 1).tolist()
    assert ITEMS_ALONE.read(torch.tensor([[1, 2]])).ids.tolist() == [[1, 2]]


def test_inputs_are_taken_by_what_a_model_reads():
    a, b, c, d = (torch.tensor([i]) for i in range(4))
    columns = ContextColumns(("x",), (5,), ("y",))
    assert moment_of(4, columns, (a, b, c, d)) == (a, (b, c), [d])
    assert moment_of(0, ContextColumns(), (d,)) == (None, (None, None), [d])
    assert moment_of(0, ContextColumns((), (), ("y",)), (c, d)) == (None, (None, c), [d])


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A log in which the device, the user's city and the type of the last event each decide which items come next."""
    folder = tmp_path_factory.mktemp("planted")
    rng = np.random.default_rng(4)
    rows, cities = [], rng.integers(0, 2, USERS)
    for user in range(USERS):
        kind = 0
        for step in range(12):
            device = rng.integers(0, 2)
            item = (device * 4 + cities[user] * 2 + kind) * 6 + rng.integers(0, 6)
            kind = int(rng.integers(0, 2))
            rows.append((f"u{user}", f"i{item:02d}", 1_700_000_000 + user * 10_000 + step * 60,
                         ("view", "buy")[kind], ("phone", "desktop")[device]))  # fmt: skip
    pd.DataFrame(rows, columns=["user", "item", "time", "type", "device"]).to_csv(folder / "log.csv", index=False)
    cities_of = [("Rome", "Oslo")[c] for c in cities]
    users = pd.DataFrame(
        {"user": [f"u{u}" for u in range(USERS)], "city": cities_of, "age": rng.integers(20, 60, USERS)}
    )
    users.to_csv(folder / "users.csv", index=False)
    (folder / "mapping.toml").write_text(
        'name = "planted"\nexclude_seen = false\nclock = true\ntime_zone = "Europe/Berlin"\n[interactions]\n'
        'files = "log.csv"\nuser = "user"\nitem = "item"\ntime = "time"\nevent_type = "type"\ncontext = ["device"]\n'
        '[users]\nfiles = "users.csv"\nuser = "user"\ncategorical = ["city"]\ncontinuous = ["age"]\n'
    )
    prepare(open_source("tables", folder / "mapping.toml"), PrepareConfig(partitions=2), folder / "run", 7, quiet)
    return folder / "run"


def hit_share(features: Features, chosen, root) -> float:
    """Share of validation requests whose target is among the 12 best: by chance 1/4 of the 48 items."""
    train_retrieval(features, chosen, root, 7, quiet, quiet=True)
    train_ranker(features, chosen, root, 7, quiet, quiet=True)
    model, hits = load_retrieval(features, chosen, root), []
    for request in batches.requests(features.files("test"), ["click"], chosen.encoder.history, 512):
        with torch.no_grad():
            hits.append((scored(model, request, False)[0] < 6).float())
    assert load_ranker(features, chosen, root).types == model.types
    return float(torch.cat(hits).mean())


def test_planted_effects_are_learned(planted, tmp_path):
    """Device, city and last type leave 6 of 48 items; each feature that is not read doubles that number."""
    features = Features(planted / "features")
    assert features.context.names == ("device", "city", "hour", "weekday", "age") and features.context.types == 5
    small = preset("tiny")
    small = replace(small, retrieval=replace(small.retrieval, epochs=12))
    read = {}
    for types, context in ((True, True), (True, False), (False, False)):
        chosen = replace(small, encoder=replace(small.encoder, types=types, context=context))
        read[types, context] = hit_share(features, chosen, tmp_path / f"{types}-{context}")
    # with everything 6 of 6 are known; without the device 6 of 12; without types too 6 of 24
    assert read[True, True] > 0.8
    assert 0.35 < read[True, False] < 0.65 and 0.15 < read[False, False] < 0.4
