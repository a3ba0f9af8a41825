"""Train/serve skew: raw rows through NVTabular and through the compiled graph give the same numbers."""

from __future__ import annotations

import warnings

import numpy as np
import onnxruntime as ort
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from preprocessing.workflow import (
    VocabularyConfig,
    checksums,
    dataset,
    event_workflow,
    extend_vocabulary,
    load_workflow,
    nvt,
    training_rows,
)
from preprocessing.workflow_onnx import compile_workflow, encoded_name, event_vocabulary, graph_feed
from vivace import contract

SCHEMA = contract.DataSchema(
    "skew", event_categoricals=(contract.EVENT, "device", "country"), event_continuous=(contract.WEIGHT,),
    crosses=(("device", "country"),),
)  # fmt: skip
(CROSS,) = SCHEMA.cross_columns
COLUMNS = [contract.ITEM, contract.EVENT, "device", "country", CROSS, contract.WEIGHT]
TEXT = {contract.ITEM, contract.EVENT, "device", "country"}
RAW = [name for name in COLUMNS if name != CROSS]
WORDS = ["sku-1", "sku-2", "sku-3", "ø-été", "日本語", "🎻", "rare", " ", "0", "nan", "None", "new", "nouveauté"]


def _frame(items, events, devices, weights, countries=None) -> pd.DataFrame:
    n = len(items)
    return pd.DataFrame(
        {
            contract.USER: [f"u{i % 5}" for i in range(n)],
            contract.ITEM: pd.Series(items, dtype=object),
            contract.EVENT: pd.Series(events, dtype=object),
            "device": pd.Series(devices, dtype=object),
            "country": pd.Series(countries or [None] * n, dtype=object),
            contract.WEIGHT: np.array(weights, np.float32),
            contract.TIME: np.arange(n),
            contract.SOURCE_ROW: np.arange(n),
            contract.SPLIT: np.zeros(n, np.int8),
            contract.label_column("click"): np.ones(n, np.int64),
        }
    )


@pytest.fixture(scope="module", params=[VocabularyConfig(freq_threshold=2), VocabularyConfig(max_size=8), None])
def fitted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("skew")
    rng = np.random.default_rng(0)
    items = [*rng.choice(WORDS[:6], 60), "rare", " ", "0", "0", "nan", "nan", "None"]
    n = len(items)
    frame = _frame(
        items,
        rng.choice(["view", "buy", None], n),
        rng.choice(["phone", "", "tablé"], n),
        np.where(rng.random(n) < 0.2, np.nan, rng.normal(3, 2, n)),
        [*rng.choice(["de", "fr", "", None], n - 1), '"], ["'],
    )
    file = folder / "part-000.parquet"
    frame.to_parquet(file, row_group_size=n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        workflow = event_workflow(SCHEMA, request.param or VocabularyConfig(), folder / "scratch")
        workflow.fit(dataset(training_rows([file], folder / "fit")))
        workflow.save(str(folder / "workflow"))
        if request.param is None:  # the vocabulary with items of the catalogue that have no event
            assert extend_vocabulary(folder / "workflow", contract.ITEM, ["sku-1", "new", "nouveauté", "new"]) == 2
        workflow = load_workflow(folder / "workflow", checksums(folder / "workflow"))
    model = compile_workflow(workflow, COLUMNS)
    return workflow, ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


text = st.one_of(st.none(), st.just(""), st.sampled_from(WORDS), st.text(max_size=12).filter(lambda s: "\0" not in s))
row = st.tuples(
    text,
    st.one_of(st.none(), st.sampled_from(["view", "buy", "unseen", ""])),
    st.one_of(st.none(), st.sampled_from(["phone", "tablé", "", "watch"])),
    st.one_of(st.just(float("nan")), st.floats(-1e6, 1e6, width=32)),
    st.one_of(st.none(), st.sampled_from(["de", "fr", '"], ["', "", "tablé"])),
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(row, min_size=1, max_size=12))
def test_raw_rows_give_the_same_ids_through_nvtabular_and_the_graph(fitted, rows):
    workflow, session = fitted
    frame = _frame(*zip(*rows, strict=True))
    frame[contract.USER] = "one"  # one group: the list columns keep the order of the rows
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        offline = workflow.transform(nvt.Dataset(frame)).compute()
    names = [encoded_name(n) for n in COLUMNS]
    online = dict(zip(COLUMNS, session.run(names, graph_feed(frame, RAW, TEXT)), strict=True))
    for column in COLUMNS:
        expected = np.asarray(offline[f"{column}-list"].iloc[0])
        if column == contract.WEIGHT:
            np.testing.assert_allclose(online[column], expected, rtol=2e-6, atol=1e-6)
        else:
            assert online[column].tolist() == expected.tolist(), column


def test_special_ids(fitted):
    _, session = fitted
    frame = _frame(["sku-1", None, "", "never seen"], ["view"] * 4, ["phone"] * 4, [1.0] * 4)
    ids = session.run([encoded_name(contract.ITEM)], graph_feed(frame, RAW, TEXT))[0]
    assert ids[0] >= contract.FIRST_ID
    assert ids[1:].tolist() == [contract.NULL_ID, contract.NULL_ID, contract.OOV_ID]


def test_a_cross_is_known_where_its_pair_is_null_where_a_part_is_and_else_unknown(fitted):
    workflow, session = fitted
    pairs = [("phone", "de"), ("phone", ""), (None, "de"), ("watch", "de"), ("phone", "nowhere"), ("de", "phone")]
    devices, countries = (list(part) for part in zip(*pairs, strict=True))
    feed = graph_feed(_frame(["0"] * 6, [""] * 6, devices, [1.0] * 6, countries), RAW, TEXT)
    ids = session.run([encoded_name(CROSS)], feed)[0]
    assert event_vocabulary(workflow, CROSS)[ids[0]] == contract.cross_value(("phone", "de"))
    assert ids[1:].tolist() == [contract.NULL_ID] * 2 + [contract.OOV_ID] * 3


def test_an_operator_without_an_onnx_form_is_named(tmp_path):
    frame = pd.DataFrame({"x": np.arange(5, dtype=np.float32)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        workflow = nvt.Workflow(["x"] >> nvt.ops.Clip(min_value=0.0))
        workflow.fit(nvt.Dataset(frame))
    with pytest.raises(NotImplementedError, match="Clip"):
        compile_workflow(workflow, ["x"])
