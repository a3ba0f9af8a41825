"""Impressions as examples of the ranker: which clicks, of what history and weight; weights undo the place."""

import contextlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import spearmanr

from preprocessing.features import LAYOUT, SCHEMA_FILE, Features
from training.checkpoints import build_ranker
from training.data.shown import JUDGED, LATER, LEARNED, NO_HISTORY, UNKNOWN, ShownLog, shown_clicks
from training.learn.ranker import RankerData, ranker_loss
from training.models.retrieval import RetrievalModel
from training.presets import shapes, tiny
from vivace.context import CONTEXT_FILE, ContextColumns
from vivace.contract import FIRST_ID, ITEM, TARGET, TARGET_TIME, TIME, USER, DataSchema, label_column
from vivace.impressions.joined import JOINED
from vivace.manifest import MANIFEST
from vivace.store.lmdb_store import LmdbStore

USERS, ITEMS, SEED = 400, 24, 6
HOUR = 3_600_000
NOW = 400_000 * HOUR
PLACES = 8
LOOKED = 1 / np.arange(1, PLACES + 1)
APPEAL = np.linspace(0.9, 0.3, PLACES)  # of the items that are shown, "i0" is liked most


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Users with three events each, at hours 1, 2 and 3: two to learn from, and one that the validation predicts."""
    folder = tmp_path_factory.mktemp("features")
    schema = DataSchema("plain", event_categoricals=(), event_continuous=(), exclude_seen=False)
    (folder / SCHEMA_FILE).write_text(json.dumps(schema.to_json()))
    (folder / MANIFEST).write_text(json.dumps({"key": "", "config": {"layout": LAYOUT}}))
    ContextColumns().save(folder / CONTEXT_FILE)
    names = pa.array([f"i{i}" for i in range(ITEMS)])
    pq.write_table(pa.table({ITEM: names}), folder / "items.parquet")
    rng, label = np.random.default_rng(SEED), label_column(schema.heads[0].name)
    item = rng.integers(PLACES, ITEMS, (USERS, 3)) + FIRST_ID

    def write(part, events, **more):
        lists = lambda x: pa.ListArray.from_arrays(np.arange(USERS + 1, dtype=np.int32) * events, x.ravel())  # noqa: E731
        times = np.tile(NOW + HOUR * np.arange(1, events + 1), USERS)
        labels = {label: lists(np.ones(USERS * events, np.int64))} if not more else {label: np.ones(USERS, np.int64)}
        columns = {ITEM: lists(item[:, :events]), TIME: lists(times), **labels}
        (folder / part).mkdir()
        users = pa.array([f"user {i}" for i in range(USERS)])
        pq.write_table(pa.table({USER: users, **columns, **more}), folder / part / "part-000.parquet")

    write("train", 2)
    write("valid", 2, **{TARGET: item[:, 2], TARGET_TIME: np.full(USERS, NOW + 3 * HOUR)})
    write("whole", 3)
    return Features(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with contextlib.closing(LmdbStore(tmp_path_factory.mktemp("store") / "feature_store")) as opened:
        yield opened


def joined(file, requests):
    """``requests``: (user, ms, items, clicked places), and the number where it is not the next."""
    rows = []
    for count, (user, ms, items, clicked, *again) in enumerate(requests):
        number = again[0] if again else count
        of_request = {"request_id": f"r{number}", "user_id": user, "session": "", "timestamp_ms": ms, "query": "",
                      "variant": "trial" if again else "", "model_version": "1", "context": "", "latency_ms": 1.0,
                      "status": "ok", "score": 0.0,
                      "propensity": 1.0, "event_ms": None, "event_type": None, "team": ""}  # fmt: skip
        for place, item in enumerate(items):
            rows.append({**of_request, ITEM: item, "position": place + 1, "clicked": place in clicked})
    table = pa.Table.from_pylist([{name: row.get(name) for name in JOINED.names} for row in rows], JOINED)
    pq.write_table(table, file)
    return file


def test_clicks_that_may_be_learned_from_with_the_history_and_the_weight_of_their_time(features, store, tmp_path):
    at = NOW + 2 * HOUR + 1
    file = joined(tmp_path / "joined.parquet", [
        ("user 0", at, ["i0", "new", "i2", "i3"], {0, 2}),
        ("user 1", at, ["i0", "i1"], set()),  # nothing was clicked
        ("user 2", NOW + HOUR + 1, ["i0", "i1"], {1}),  # its second event was learned
        ("user 3", NOW + 4 * HOUR, ["i0", "i1"], {1}),  # later than all features
        ("nobody", at, ["i0", "i1"], {1}),
        ("user 4", at, ["new", "i1"], {0}),
        ("user 0", at, ["i2", "i7"], {0}, 0),  # a copy of the first, whose answer nobody saw
    ])  # fmt: skip
    log = ShownLog(file, np.array([1.0, np.nan, 0.25]), frozenset({"r0"}))
    clicks = shown_clicks(log, features, shapes(tiny(), features), store)
    expected = {LEARNED: 1, LATER: 1, NO_HISTORY: 1, UNKNOWN: 1}
    assert {reason: count for reason, count in clicks.left_out.items() if count} == expected
    first, third, fourth = (FIRST_ID + i for i in (0, 2, 3))
    assert clicks.requests.target_B.tolist() == [first, third]
    assert clicks.among_RK.tolist() == [[first, fourth], [third, fourth]]  # without the other click, and what is new
    assert clicks.weight_R.tolist() == pytest.approx([0.4, 1.6])  # 1 and 4 by the place, of mean 1
    whole = pq.read_table(features.files("whole")[0])[ITEM][0].as_py()
    assert [h.tolist() for h in clicks.requests.histories] == [whole[:2]] * 2
    assert JUDGED not in {reason for reason, count in clicks.left_out.items() if count}
    with pytest.raises(ValueError, match=r"no click that the ranker may learn from.*vivace refresh"):
        shown_clicks(ShownLog(joined(file, [("nobody", at, ["i0"], {0})]), log.examined), features,
                     shapes(tiny(), features), store)  # fmt: skip


def learned_order(features, store, log) -> float:
    """Rank correlation of the ranker's scores with APPEAL, after some steps on the clicks of ``log``."""
    torch.manual_seed(SEED)
    preset = tiny()
    retriever = RetrievalModel(preset.encoder, features.item_count(), torch.zeros(features.item_count())).eval()
    model = build_ranker(features, preset, retriever)
    clicks = shown_clicks(log, features, shapes(preset, features), store)
    data = RankerData(features, retriever, preset, SEED, False, shown=clicks)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for epoch in range(3):
        for batch in data._click_batches(64, epoch):
            assert batch.among_BN is not None and (batch.among_BN & batch.hit_BN).any(1).all()
            optimizer.zero_grad()
            ranker_loss(model, batch).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        (batch, *_) = data._click_batches(256, 0)
        logits = model(*batch.inputs)[..., 0]
    ids = batch.candidates_BN.numpy()
    scores = [float(logits[torch.from_numpy(ids == FIRST_ID + i)].mean()) for i in range(PLACES)]
    return float(spearmanr(scores, APPEAL).statistic)


def test_weights_undo_the_place_so_that_the_ranker_learns_what_is_liked(features, store, tmp_path):
    """What is liked least is shown first mostly: without weights the ranker would learn the places."""
    rng, requests = np.random.default_rng(SEED), []
    for number in range(1_500):
        order = np.argsort(APPEAL + rng.normal(0, 0.3, PLACES))
        clicked = np.flatnonzero(rng.random(PLACES) < APPEAL[order] * LOOKED)
        requests.append((f"user {number % USERS}", NOW + 2 * HOUR + 1 + number, [f"i{i}" for i in order], set(clicked)))
    file = joined(tmp_path / "joined.parquet", requests)
    weighted = learned_order(features, store, ShownLog(file, LOOKED))
    plain = learned_order(features, store, ShownLog(file, np.ones(PLACES)))
    print(weighted, plain)
    assert weighted > 0.85 and weighted > plain + 0.5
