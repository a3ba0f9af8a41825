"""Types of events, context and user attributes: what the live ensemble reads of them is what training read."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from loadtest.tune.offline import rows_of
from serving.runtime.pipeline import Pipeline
from serving.runtime.stages import FeatureTransform, Row, parse_row
from serving.service import service
from tests.support import PatientClient, on_free_ports, quiet
from training.checkpoints import load_ranker, load_retrieval
from training.compile.compiler import compile_models
from training.data import batches
from training.learn.ranker import train_ranker
from training.learn.retriever import train_retrieval
from training.models.ranking import RankingGraph
from training.models.retrieval import RetrievalGraph
from training.presets import shapes, tiny
from vivace.client import VivaceError
from vivace.context import clock
from vivace.contract import EVENT, FIRST_ID, TARGET_TIME, USER
from vivace.store.lmdb_store import LmdbStore

REQUESTS = 24


@pytest.fixture(scope="module")
def run(features, root, tmp_path_factory):
    """A run of the small shop whose models were made to listen to types and context: two epochs teach them little."""
    own = tmp_path_factory.mktemp("context") / "run"
    for folder in ("features", "feature_store"):
        shutil.copytree(root / folder, own / folder)
    train_retrieval(features, tiny(), own, 3, quiet, quiet=True)
    train_ranker(features, tiny(), own, 3, quiet, quiet=True)
    torch.manual_seed(5)
    for name, loud in (("retrieval", ("of_context.weight",)), ("ranking", ("of_context.weight", "score.click.weight"))):
        path = own / name / "weights.pt"
        weights = torch.load(path, weights_only=True)
        for key in (*loud, "type_embedding.weight"):
            weights[key] = torch.randn_like(weights[key])
        torch.save(weights, path)
    compile_models(features, tiny(), own, 3, quiet)
    return own


def raw_rows(root) -> pd.DataFrame:
    """Test requests with the context of their moment as the log had it, from the encoded ids and the vocabularies."""
    files = sorted((root / "features" / "test").glob("*.parquet"))
    frame = pd.concat([pq.read_table(f).to_pandas() for f in files], ignore_index=True).head(REQUESTS)
    workflow = root / "features" / "workflow" / "categories"
    out = frame[[USER, "item_id", "timestamp_ms", TARGET_TIME, EVENT]].copy()
    for column in (EVENT, "device", "price_sensitivity"):
        words = pd.read_parquet(workflow / f"unique.{column}.parquet")[column]
        name = lambda i, words=words: words.get(i, "")  # noqa: E731
        encoded = frame[column if column == EVENT else f"{column}-target"]
        out[column] = encoded.map(lambda v, name=name: [name(i) for i in v] if np.ndim(v) else name(v))
    return out


def offline(features, run, count=10):
    """(item names, scores) that the trained models answer to the same requests, without a server."""
    preset, names = tiny(), features.items()["item_id"].tolist()
    request = next(batches.requests(features.files("test"), ["click", "buy"], preset.encoder.history, REQUESTS))
    s = shapes(preset, features)
    assert (s.types, s.context, s.amounts) == (True, 4, 0)  # device, price_sensitivity, hour, weekday
    retrieval = RetrievalGraph(load_retrieval(features, preset, run), s.candidates)
    ranking = RankingGraph(load_ranker(features, preset, run))

    def answer(inputs):
        with torch.no_grad():
            ranked, values = ranking(inputs[0], *retrieval(*inputs), *inputs[s.passed_on :])
        return [[names[i - FIRST_ID] for i in row[:count]] for row in ranked.tolist()], values[:, 0, :count].numpy()

    inputs = [torch.from_numpy(x) for x in request.inputs(s, True)]
    return inputs, answer


@pytest.mark.parametrize("profile", ["", "fused"])
def test_served_equals_offline(features, run, profile):
    inputs, answer = offline(features, run)
    items, scores = answer(inputs)
    _, blind = answer([*inputs[:2], *(torch.full_like(x, 1) for x in inputs[2:])])  # all null
    assert (np.abs(blind - scores).max(1) > 1e-2).mean() > 0.9  # context and types do matter here
    rows, names = raw_rows(run), features.items()["item_id"].tolist()
    options = on_free_ports(run / "model_repository", profile=profile, log=run / f"{profile}.log")
    with service(options, quiet) as (server, _), PatientClient(f"{server.host}:{server.grpc_port}") as client:
        same = 0
        for place, row in enumerate(rows.itertuples(index=False)):
            of_clock = {k: v[0] for k, v in clock(np.array([getattr(row, TARGET_TIME)]), "UTC").items()}
            history = [
                (names[i - FIRST_ID], kind, int(t))
                for i, kind, t in zip(row.item_id, row.event_type, row.timestamp_ms, strict=True)
            ]
            # the user's own attributes come from the store
            got = client.recommend(getattr(row, USER), history, 10, context={"device": row.device, **of_clock})
            assert got.status == "ok"
            assert got.scores == pytest.approx(scores[place].tolist(), abs=1e-4)
            same += list(got.items) == items[place]
        assert same >= REQUESTS - 2  # items of equal score may change places
        # another device, another answer; names that are no columns are left out and said
        user, history = rows[USER][0], [names[i - FIRST_ID] for i in rows["item_id"][0]]
        answers = [client.recommend(user, history, 10, context={"device": d}).scores for d in ("phone", "desktop")]
        assert np.abs(answers[0] - answers[1]).max() > 1e-3
        odd = client.recommend(user, history, 10, context={"colour": "red", "device": None})
        assert "no column 'colour'" in odd.status and "device" in odd.status and len(odd.items) == 10
        for bad in ({"device": ["phone"]}, {"device": {"a": 1}}, {"device": "x" * 2000}):
            with pytest.raises(VivaceError, match="CONTEXT: device"):
                client.recommend(user, history, 10, context=bad)
        with pytest.raises(VivaceError, match=r"HISTORY\[0\].*U\+001F"):
            client.recommend(user, [("sku-00001", "view", "yesterday")[0] + "\x1fview\x1fyesterday"], 10)


def test_recorded_requests_are_those_that_are_evaluated(features, run):
    """Load tests and the tuner's quality go by them: types and context, as the log had them, are in them."""
    s, part = shapes(tiny(), features), "test"
    store = LmdbStore(run / "feature_store", readonly=True)
    version = run / "model_repository" / "feature_transform" / "1"
    transform = FeatureTransform(version / "transform.onnx", store, s)
    request = next(batches.requests(features.files(part), ["click", "buy"], s.history, 10_000))
    columns = (request.history_BT, request.type_BT, request.context_BC)
    evaluated = {json.dumps([x[i].tolist() for x in columns]) for i in range(len(request.history_BT))}
    (history, _, types, context), _ = transform(rows_of(run, transform.moment.columns, part))
    for row in zip(history.tolist(), types.tolist(), context.tolist(), strict=True):
        assert json.dumps(row) in evaluated
    assert len({tuple(row) for row in context.tolist()}) > 20 and len(np.unique(types)) > 3


def test_each_raw_value_gives_the_same_tensor_offline_and_live(features, run):
    """Every row of the log, through NVTabular at prepare time and through the transform of the request path."""
    s = shapes(tiny(), features)
    store = LmdbStore(run / "feature_store", readonly=True)
    version = run / "model_repository" / "feature_transform" / "1"
    transform = FeatureTransform(version / "transform.onnx", store, s)
    request = next(batches.requests(features.files("test"), ["click", "buy"], s.history, 512))
    rows = raw_rows(run)
    names, live = features.items()["item_id"].tolist(), []
    for row in itertools.islice(rows.itertuples(index=False), REQUESTS):
        of_clock = {k: v[0] for k, v in clock(np.array([getattr(row, TARGET_TIME)]), "UTC").items()}
        events = [
            f"{names[i - FIRST_ID]}\x1f{kind}\x1f{t}".encode()
            for i, kind, t in zip(row.item_id, row.event_type, row.timestamp_ms, strict=True)
        ]
        sent = json.dumps({"device": row.device, **of_clock}).encode()
        user = getattr(row, USER).encode()
        live.append(parse_row(user, b"", np.array(events, object), 5, sent, transform.moment.columns))
    (history, _, types, context), status = transform(live)
    assert set(status) == {"ok"}
    for got, expected in ((history, request.history_BT), (types, request.type_BT), (context, request.context_BC)):
        assert got.tolist() == expected[:REQUESTS].tolist()
    sent_events = [b"x\x1fstare", names[0].encode() + b"\x1fstare", names[0].encode() + b"\x1fview\x1f5"]
    stares = [parse_row(b"", b"", np.array([e], object), 5) for e in sent_events]
    reason = "the data has no EVENT_TYPE in HISTORY 'stare'; it has buy, cart, view"
    statuses = transform(stares)[1]
    assert statuses[0].endswith(f"; {reason}") and statuses[1:] == [f"degraded: {reason}", "ok"]
    # absent, null, empty and unseen values are NVTabular's null and out-of-vocabulary ids, never an error
    odd = [b"{}", b'{"device": null}', b'{"device": ""}', b'{"device": "toaster"}', b""]
    rows_of_nobody = [parse_row(b"", b"", np.array([b"x"], object), 5, c, transform.moment.columns) for c in odd]
    context = transform.moment.context([r.user_id for r in rows_of_nobody], [r.context for r in rows_of_nobody], 0)[0]
    assert context[:, 0].tolist() == [1, 1, 1, 2, 1] and context[:, 1].tolist() == [1] * 5
    store.close()


def test_fresh_items_are_scored_in_the_same_context(features, run):
    """The state that fresh items are scored against gives trained items the scores that retrieval gave them."""
    store = LmdbStore(run / "feature_store", readonly=True)
    pipeline = Pipeline.published(run, store)
    names = features.items()["item_id"].tolist()
    devices = ("phone", "desktop", "tablet", None)
    rows = [Row("", names[n : n + 4], 5, context={"device": d or ""}) for n, d in enumerate(devices)]
    inputs, _ = pipeline.transform(rows)
    ids, scores, encoded, *passed_on = pipeline.retrieve(inputs)
    states_BD = pipeline._fresh._states(encoded[:, -1], passed_on[: len(pipeline.shapes.moment)])
    retriever = load_retrieval(features, tiny(), run)
    with torch.no_grad():
        expected = states_BD @ retriever.table().numpy().T + retriever.bias.numpy()
    known = ids >= FIRST_ID
    np.testing.assert_allclose(np.take_along_axis(expected, ids, 1)[known], scores[known], atol=1e-4)
    assert np.abs(states_BD - encoded[:, -1]).max() > 0.1  # the context does matter here
    store.close()
