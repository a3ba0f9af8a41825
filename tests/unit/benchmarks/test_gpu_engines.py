"""The measurements of the GPU kit: eight-bit arithmetic, the work counted, the steps rehearsed on the CPU."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import engines, grid, machine, peaks, subjects
from benchmarks.gpu.linears import EightBitLinear, fits, quantise, replace_linears, sparsify, two_of_four
from benchmarks.gpu.record import Figures
from benchmarks.gpu.steps import Asked
from training.models.ranking import RankingGraph

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind, bound", [("fp8", 0.05), ("fp8-rows", 0.05), ("int8", 0.015)])
def test_an_eight_bit_layer_is_close_to_the_trained_one(kind, bound):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 64), nn.Linear(64, 1))
    x = torch.randn(3, 20, 128)
    with torch.no_grad():
        expected = model(x)
        layer = model[0](x)
        assert quantise(model, kind, lambda: model(x)) == 2  # the last has too few channels
        assert isinstance(model[0], EightBitLinear) and isinstance(model[3], nn.Linear)
        assert model[0].weight_OI.element_size() == 1
        apart = (model[0](x) - layer).norm() / layer.norm()
        assert 0 < apart < bound
        assert (model(x) - expected).abs().max() < 0.1


def test_one_scale_a_row_keeps_a_small_row_beside_a_large_one():
    layer = nn.Linear(64, 64, bias=False)
    x = torch.cat([torch.randn(1, 64) * 1e-4, torch.randn(1, 64) * 1e4])
    expected = layer(x)
    for kind in ("fp8-rows", "int8"):
        got = EightBitLinear(layer, kind)(x)
        assert ((got - expected).norm(dim=1) / expected.norm(dim=1) < 0.05).all()


def test_calibrated_values_beyond_the_example_are_cut_and_not_infinite():
    model = nn.Sequential(nn.Linear(64, 64))
    quantise(model, "fp8", lambda: model(torch.ones(2, 64)))
    with torch.no_grad():
        assert torch.isfinite(model(torch.full((2, 64), 1e6))).all()


def test_a_layer_that_the_example_does_not_reach_stays():
    model = nn.ModuleDict({"used": nn.Linear(64, 64), "idle": nn.Linear(64, 64)})
    assert quantise(model, "fp8", lambda: model["used"](torch.ones(1, 64))) == 1
    assert isinstance(model["idle"], nn.Linear)


def test_layers_of_sizes_that_the_kernels_refuse_are_not_replaced():
    assert not fits(nn.Linear(25, 64)) and not fits(nn.Linear(64, 72)) and fits(nn.Linear(416, 528))
    model = nn.Sequential(nn.Linear(25, 64), nn.Sequential(nn.Linear(64, 64)))
    assert replace_linears(model, lambda layer: nn.Identity()) == 1
    assert isinstance(model[1][0], nn.Identity)


def test_two_of_every_four_weights_stay_and_they_are_the_largest():
    sparse = two_of_four(torch.tensor([[1.0, -4.0, 2.0, 3.0, 0.5, 0.1, -0.2, 0.4]]))
    assert sparse.tolist() == [[0.0, -4.0, 0.0, 3.0, 0.5, 0.0, 0.0, pytest.approx(0.4)]]
    model = nn.Sequential(nn.Linear(64, 64))
    assert sparsify(model, semi_structured=False) == 1
    assert (model[0].weight == 0).float().mean() == 0.5


@pytest.mark.parametrize("name", ["tiny", "base"])
def test_the_work_counted_by_hand_is_pytorchs(name):
    shape = subjects.shape_of(name, 300, candidates=40, history=30)
    model = subjects.ranking_model(name, shape)
    retriever = subjects.retrieval_graph(name, shape)
    for graph, given, expected in (
        (RankingGraph(model), subjects.ranking_inputs(2, shape), subjects.ranker_flops(name, shape)),
        (retriever, subjects.retrieval_inputs(2, shape), subjects.retriever_flops(name, shape)),
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            graph(*given)
        of = model.config
        lookups = 2 * 2 * of.lags * of.followers * shape.candidates if graph is not retriever else 0  # not useful work
        assert (counter.get_total_flops() - lookups) / 2 == pytest.approx(expected, rel=0.01)


def test_candidates_of_a_request_are_different():
    for items in (103, 500, 50_000):
        ids = subjects.ranking_inputs(3, subjects.shape_of("tiny", items, candidates=100))[1]
        assert all(len(set(row)) == 100 for row in ids.tolist()) and int(ids.min()) >= 3 and int(ids.max()) < items


def test_parity_compares_by_item():
    ids = torch.tensor([[5, 6, 7]])
    scores = torch.tensor([[3.0, 2.0, 1.0]])
    other = (torch.tensor([[6, 5, 7]]), torch.tensor([[2.5, 2.25, 1.0]]))
    apart = engines.parity([ids, scores[:, None]], [other[0], other[1][:, None]], "ranker")
    assert apart == {"largest_difference": 0.75, "same_top10": 1.0}
    broken = engines.parity([ids, scores], [ids, scores * float("nan")], "retriever")
    assert broken["largest_difference"] != broken["largest_difference"]


def test_a_way_that_does_not_run_costs_its_own_row(tmp_path):
    figures = Figures(tmp_path, "engines", 60)
    of = engines.subject("tiny", "ranker", 300, CPU)
    rates = {"bf16": 1e9, "copy": 1e9}
    assert engines.attempt(figures, of, engines.Variant("ranker", "tensorrt", "fp32"), 2, rates) is None
    assert engines.attempt(figures, of, engines.Variant("ranker", "eager", "fp32", "gpu"), 2, rates)
    written = json.loads((tmp_path / "engines.json").read_text())
    assert [r["engine"] for r in written["rows"]] == ["eager"] and len(written["not_run"]) == 1
    assert written["rows"][0]["largest_difference"] < 1e-5 and written["rows"][0]["same_top10"] == 1.0


def test_what_takes_long_to_build_is_not_begun_late(tmp_path):
    figures, of = Figures(tmp_path, "engines", 5), engines.subject("tiny", "ranker", 300, CPU)
    rates = {"bf16": 1e9, "copy": 1e9}
    assert engines.attempt(figures, of, engines.Variant("ranker", "compile", "bf16", "gpu"), 2, rates) is None
    assert engines.attempt(figures, of, engines.Variant("ranker", "eager", "bf16", "gpu"), 2, rates)


def test_the_plan_names_every_way_once_and_the_claims_first():
    steps = engines.plan(cpu=False)
    ways = [(name, v) for name, _, _, variants in steps for v in variants]
    assert len(set(ways)) == len(ways)
    assert set(v for name, v in ways if name == "large" and v.stage == "ranker") == {
        v for group in engines.RANKERS.values() for v in group if group is not engines.RANKERS["others"]
    }
    assert [(v.engine, v.format) for v in steps[0][3]][:3] == [
        ("eager", "bf16"),
        ("compile", "bf16"),
        ("compile", "fp8"),
    ]


def test_the_grid_has_every_point_once():
    points = [(*point, b) for *point, batches in grid.points(cpu=False) for b in batches]
    assert len(set(points)) == len(points) == 3 * 6 * (4 * 3 + 4)
    assert points[0][:4] == ("base", "ranker", 200, 500)


def test_a_point_beyond_memory_or_time_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "MEMORY", 1.0)
    figures = Figures(tmp_path, "grid", 60)
    shape = subjects.shape_of("tiny", 300, 20, 10)
    grid.line(figures, "tiny", "ranker", shape, [1, 4], CPU, {"bf16": 1e9}, {})
    assert not figures.values["rows"] and "intermediates" in next(iter(figures.values["not_run"].values()))


@pytest.mark.parametrize("step", [grid, machine])
def test_a_step_is_rehearsed_on_the_cpu(step, tmp_path, monkeypatch):
    monkeypatch.setattr(peaks, "copy_rate", lambda *a: 1e9)
    figures = Figures(tmp_path, "step", 20)
    with torch.no_grad():
        step.measure(figures, CPU, Asked(tmp_path, tmp_path, cpu=True))
    written = json.loads((tmp_path / "step.json").read_text())
    assert written["rows"] and written["peaks"]["bf16"] > 0 and not written["not_run"]
