"""Other number formats: what they answer, which products stay in float32, and that TensorRT takes every graph."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import pytest
import torch

from benchmarks.tables import Scoring
from preprocessing.features import Features
from serving.runtime.tensorrt_plan import library
from tests.support import quiet
from training.compile.compiler import CompileConfig, compile_models
from training.compile.engine import Engine
from training.compile.onnx_export import example_requests, export
from training.compile.quantize import PRECISIONS, convert, overlap, prepare, products, reduce_precision, sensitivities
from training.compile.tensorrt_engine import build
from training.models.int8_table import Int8Table, quantize_rows
from training.presets import shapes, tiny
from vivace import contract
from vivace.onnx_session import open_session


@pytest.fixture(scope="module")
def s(features):
    return shapes(tiny(), features)


@pytest.fixture(scope="module", params=PRECISIONS)
def engine(request, features, root, s, tmp_path_factory):
    """(precision, folder of both graphs)."""
    if request.param == "fp32":
        return request.param, root / "compiled"
    folder = tmp_path_factory.mktemp(request.param)
    reduce_precision(features, s, root / "compiled", folder, request.param)
    return request.param, folder


def test_the_answers_stay(engine, features, root, s):
    precision, folder = engine
    feed = [x.numpy() for x in example_requests(features, tiny())]
    exact, other = Engine(root / "compiled", s)(feed), Engine(folder, s)(feed)
    assert overlap(exact[0], other[0]) > 0.9
    if precision != "fp32":
        assert not np.array_equal(exact[1], other[1])
        kinds = {"fp16": onnx.TensorProto.FLOAT16, "fp8": onnx.TensorProto.FLOAT8E4M3FN}
        graph = onnx.load(folder / "ranking.onnx").graph
        assert kinds.get(precision, onnx.TensorProto.INT8) in {t.data_type for t in graph.initializer}


def test_tensorrt_builds_every_graph_without_a_gpu(engine, s, tmp_path):
    precision, folder = engine
    if precision == "int8":
        pytest.skip("dynamic int8 is for ONNX Runtime on CPUs; TensorRT takes int8-qdq")
    t, n = (1, s.history, s.history), (1, s.candidates, s.candidates)
    axes = {"HISTORY_IDS": t, "HISTORY_TYPES": t, "ENCODED_HISTORY": t, "CANDIDATE_IDS": n, "CANDIDATE_SCORES": n}
    for stage in (contract.RETRIEVAL, contract.RANKING):
        assert build(folder / f"{stage}.onnx", tmp_path / "model.plan", name="tensorrt_rtx", axes=axes) > 10_000
    if precision == "fp32":
        path, timings = tmp_path / "sparse.plan", tmp_path / "timings"
        assert (
            build(folder / "ranking.onnx", path, name="tensorrt_rtx", sparse=True, timings=timings, axes=axes) > 10_000
        )


def test_what_tensorrt_does_not_take_is_said(tmp_path):
    node = onnx.helper.make_node("StringConcat", ["A", "A"], ["B"])
    value = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.STRING, ["batch", 4]) for n in "AB"]
    graph = onnx.helper.make_graph([node], "strings", value[:1], value[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), tmp_path / "s.onnx")
    with pytest.raises(ValueError, match=r"TensorRT does not take s\.onnx"):
        build(tmp_path / "s.onnx", tmp_path / "s.plan", name="tensorrt_rtx")
    with pytest.raises(ValueError, match="found none; pip install"):
        library("tensorrt_of_another_planet")


def test_the_product_that_hurts_is_found(root, features, s, tmp_path):
    """One product whose weights are all nearly equal but for huge ones: eight bits swallow what tells items apart."""
    ready = tmp_path / "ready.onnx"
    prepare(root / "compiled" / "retrieval.onnx", ready)
    names, model = products(ready), onnx.load(ready)
    constants = {t.name: t for t in model.graph.initializer}
    of_items = {name for name, t in constants.items() if len(t.dims) == 2 and s.items in t.dims}
    products_of_items = [n for n in model.graph.node if n.name in names and n.op_type == "Gemm"]
    victim = next(n for n in products_of_items if of_items & set(n.input))  # states against items
    (table,) = [constants[i] for i in victim.input if i in of_items]
    values = onnx.numpy_helper.to_array(table).copy()
    values[:3] = 3000 * np.abs(values).max()  # the special ids, which are never answered
    table.CopyFrom(onnx.numpy_helper.from_array(values, table.name))
    onnx.save(model, ready)
    feed = dict(
        zip(Engine(root / "compiled", s).names[0], (x.numpy() for x in example_requests(features, tiny())), strict=True)
    )
    alone = sensitivities(
        ready, "int8-qdq", [feed], lambda p, f: open_session(p).run(None, dict(f))[0], tmp_path / "x.onnx"
    )
    assert set(alone) == set(names) and min(alone, key=alone.__getitem__) == victim.name and alone[victim.name] < 0.9
    convert(ready, tmp_path / "kept.onnx", "int8-qdq", [feed], keep=[victim.name])
    assert overlap(*(open_session(p).run(None, feed)[0] for p in (ready, tmp_path / "kept.onnx"))) > 0.9


def test_an_int8_table_by_hand():
    table = torch.tensor([[127.0, -64.0], [0.0, 0.0], [0.5, 0.25]])
    rows, scale = quantize_rows(table)
    assert rows.tolist() == [[127, -64], [0, 0], [127, 64]]  # half of 127 is rounded to even
    assert scale.tolist() == pytest.approx([1.0, 0.0, 0.5 / 127], abs=1e-9)
    small = Int8Table(table)
    torch.testing.assert_close(small(torch.tensor([[2, 0]])), torch.tensor([[[0.5, 32 / 127], [127.0, -64.0]]]))
    states = torch.tensor([[63.0, 1.0], [0.0, 0.0]])  # whole numbers of the state's own scale: exact
    torch.testing.assert_close(small.scores(states)[:, 0], torch.tensor([63 * 127.0 - 64, 0.0]))


def test_int8_products_in_onnx_are_those_of_torch(tmp_path):
    """Extreme rows and states: sums of pairs must not overflow on a CPU without VNNI, and no row of a batch matters to
    another."""
    torch.manual_seed(0)
    table = torch.where(torch.rand(50, 64) < 0.5, 1.0, -1.0) * torch.rand(50, 1)
    scoring = Scoring(torch.cat([table, torch.randn(150, 64)]), int8=True)
    states = torch.cat([torch.where(torch.rand(3, 64) < 0.5, 5.0, -5.0), table[:1], torch.randn(4, 64) * 1e-3])
    export(scoring, (states,), ["STATES"], ["IDS", "SCORES"], tmp_path / "x.onnx")
    graph = open_session(tmp_path / "x.onnx")
    _, scores = graph.run(None, {"STATES": states.numpy()})
    expected = scoring(states)
    np.testing.assert_allclose(scores, expected[1].numpy(), rtol=1e-5, atol=1e-6)
    for i in range(len(states)):
        np.testing.assert_array_equal(graph.run(None, {"STATES": states[i : i + 1].numpy()})[1][0], scores[i])


def test_int8_tables_are_compiled_judged_and_smaller(features, root, tmp_path):
    own = tmp_path / "shop"
    shutil.copytree(root, own, ignore=shutil.ignore_patterns("compiled", "model_repository", "compressed", "*.log"))
    mine = Features(own / "features")
    found = compile_models(mine, tiny(), own, 3, quiet, CompileConfig(tables="int8"))
    assert found["results"]["gate"]["passed"] and found["results"]["parity"]["int8 tables"]["top-10 overlap"] > 0.95
    kinds = {}
    for tensor in onnx.load(own / "compiled" / "retrieval.onnx").graph.initializer:
        kinds[tensor.data_type] = max(kinds.get(tensor.data_type, 0), int(np.prod(tensor.dims)))
    v, d = mine.item_count(), tiny().encoder.width
    assert kinds[onnx.TensorProto.INT8] == v * d and kinds[onnx.TensorProto.FLOAT] < v * d  # no second copy
