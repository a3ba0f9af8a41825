"""Compression: what does nothing is what goes; losses by hand; a damaged engine is refused; a variant is served."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
import tritonclient.grpc as grpcclient
from onnx import numpy_helper

from loadtest.reports.compress import report
from serving.service import service
from tests.support import on_free_ports, quiet
from training.checkpoints import load_retrieval
from training.compile.compiler import CompileConfig, compile_models
from training.compile.compress import Compression, SmallerRanker, compress, prune_retriever
from training.compile.engine import Engine
from training.compile.prune import Target, measure, prune
from training.judge.gate import HELD_OUT_USERS, GateError, graph_ranks, held_out_requests, reference_ranks
from training.learn.constraints import Constraint, largest
from training.learn.distill import Distillation, divergence, list_mle, relations
from training.learn.retriever import train_retrieval
from training.metrics import MISS
from training.models.retrieval import EncoderConfig, RetrievalModel
from training.presets import from_json, shapes, tiny, with_values
from vivace import contract
from vivace.run import Run

ITEMS = 40
SHAPE = EncoderConfig(width=16, layers=3, heads=4, history=12, dropout=0.0, position_bias="relative")


def _model() -> RetrievalModel:
    torch.manual_seed(0)
    model = RetrievalModel(SHAPE, ITEMS, torch.ones(ITEMS))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        first, dead, last = model.encoder.blocks
        for layer in (dead.out, dead.down):  # a layer that adds nothing
            layer.weight.zero_()
            layer.bias.zero_()
        for block in (first, last):
            block.out.weight[:, 4:8] = 0  # head 1
            block.qkv.weight[[*range(4, 8), *range(20, 24), *range(36, 40)]] = 0
            block.qkv.bias[[*range(4, 8), *range(20, 24), *range(36, 40)]] = 0
            block.down.weight[:, 10:40] = 0  # 30 of 64 channels
    return model.eval()


def _loss(model: RetrievalModel, batch: torch.Tensor) -> torch.Tensor:
    logits = model.logits(model.encode(batch[:, :-1]))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def test_what_does_nothing_goes_and_the_answers_stay():
    model = _model()
    batches = [torch.randint(3, ITEMS, (8, 13)) for _ in range(3)]
    found = measure(model, batches, _loss)
    assert int(found.layers.abs().argmin()) == 1 and float(found.layers[1]) == pytest.approx(0, abs=1e-5)
    assert all(float(found.heads[i, 1]) == 0 for i in (0, 2)) and (found.ffn[0, 10:40] == 0).all()
    kept = replace(found, layers=torch.tensor([1.0, 0.0, 1.0]))
    small = prune(model, kept, Target(layers=2, heads=3, ffn=34)).eval()
    assert small.config.of_head == 4 and small.encoder.blocks[0].qkv.weight.shape == (36, 16)
    history = torch.cat([batches[0][:, :12], torch.zeros(1, 12, dtype=torch.long)])
    history[0, :5] = 0
    torch.testing.assert_close(small.encode(history), model.encode(history), atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < 0.75 * sum(p.numel() for p in model.parameters())


def test_dimensions_that_carry_least_go():
    model = _model()
    found = measure(model, [torch.randint(3, ITEMS, (8, 13))], _loss)
    small = prune(model, found, Target(width=12))
    kept = found.width.topk(12).indices.sort().values
    torch.testing.assert_close(small.items.id.weight, model.items.id.weight[:, kept])
    assert small.encode(torch.tensor([[5, 6]])).shape == (1, 2, 12)
    with pytest.raises(ValueError, match="heads: expected 1 to 4"):
        prune(model, found, Target(heads=9))


def test_distillation_losses_by_hand():
    scores = torch.tensor([[2.0, 1.0, 0.0]])
    e = math.e
    first, second = -math.log(e**2 / (e**2 + e + 1)), -math.log(e / (e + 1))
    assert float(list_mle(scores)) == pytest.approx((first + second) / 3, rel=1e-6)
    assert float(divergence(scores, scores + 5, 2.0)) == pytest.approx(0, abs=1e-6)
    p, q = torch.softmax(torch.tensor([0.5, 0.0]), 0), torch.tensor([0.5, 0.5])
    by_hand = 4 * float((p * (p / q).log()).sum())
    assert float(divergence(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), 2.0)) == pytest.approx(by_hand, rel=1e-5)
    states = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert float(relations(states, torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 1.0]]))) == 0
    assert float(relations(states, torch.tensor([[1.0], [2.0]]))) == pytest.approx(2 / 4)  # two of four pairs differ


@pytest.fixture(scope="module")
def variant(features, root):
    """The small shop's run, pruned to a third of its channels and taught for one epoch, in int8."""
    config = Compression(
        target=Target(ffn=24), ranker=SmallerRanker(memory=10, heads=1, followers=4, mixture="shared"), epochs=1,
        precision="int8", distillation=Distillation(logits=1.0, order=0.1, hidden=0.1, positions=64),
        bound=0.5,
    )  # fmt: skip
    manifest = compress(features, tiny(), root, "small", config, 3, quiet, quiet=True)
    return root / "compressed" / "small", manifest


def test_the_variant_is_smaller_and_judged(features, root, variant):
    folder, manifest = variant
    preset = from_json(json.loads((folder / "preset.json").read_text()))
    assert preset.encoder.of_ffn == 24 and preset.ranker.memory == 10 and preset.ranker.mixture == "shared"
    gate = manifest["results"]["gate"]
    held_out = held_out_requests(features, (Run(folder), Run(root)))
    assert gate["passed"] and gate["split"] == HELD_OUT_USERS
    assert gate["requests"] == held_out.sum() and 0.03 < held_out.mean() < 0.25
    kinds = {t.data_type for t in onnx.load(folder / "compiled" / "retrieval.onnx").graph.initializer}
    assert onnx.TensorProto.INT8 in kinds
    assert manifest["results"]["parity"]["int8"]["top-10 overlap"] > 0.8


def test_a_preset_is_taught_by_the_whole_run(features, root):
    small = with_values(tiny(), {"encoder.width": 8, "encoder.heads": 1, "encoder.history": 10, "retrieval.epochs": 1})
    config = Compression(student=small, distillation=Distillation(positions=64), bound=0.9)
    manifest = compress(features, tiny(), root, "student", config, 3, quiet, quiet=True)
    variant = Run(root / "compressed" / "student")
    assert from_json(json.loads(variant.preset.read_text())) == small and not (variant.root / "pruned").exists()
    assert variant.manifest("retrieval")["inputs"]["teacher"] == Run(root).key("retrieval")
    assert manifest["results"]["gate"]["passed"] and variant.shapes().width == 8
    longer = with_values(small, {"encoder.history": tiny().encoder.history + 1})
    with pytest.raises(ValueError, match="history of at most"):
        compress(features, tiny(), root, "longer", Compression(student=longer), 3, quiet)
    with pytest.raises(ValueError, match="--to"):
        Compression(student=small, target=Target(layers=1))


def test_graph_ranks_are_the_evaluated_ones(features, root):
    """The gate's own ranking of the uncompressed graphs agrees with PyTorch's of the validation requests."""
    s = shapes(tiny(), features)
    engine = Engine(root / "compiled", s)
    found = graph_ranks(features, s, engine)
    expected = reference_ranks(Run(root))
    among = expected < s.candidates
    assert (found[among] == expected[among]).mean() > 0.99 and (found[~among] == MISS).mean() > 0.99


def test_a_damaged_engine_is_refused_and_a_forced_one_says_so(features, root, variant, monkeypatch):
    folder, _ = variant
    preset = from_json(json.loads((folder / "preset.json").read_text()))
    before = sorted(p.name for p in (folder / "model_repository" / contract.RETRIEVAL).iterdir())

    def damage(source, target, precision, feeds, keep=(), only=None):
        graph = onnx.load(source)
        for tensor in graph.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
                values = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(np.roll(values, 1, axis=0).copy(), tensor.name))
        onnx.save(graph, target)

    monkeypatch.setattr("training.compile.quantize.convert", damage)
    how = CompileConfig(precision="int8", reference=root)
    with pytest.raises(GateError, match="not published"):
        compile_models(features, preset, folder, 3, quiet, how)
    assert sorted(p.name for p in (folder / "model_repository" / contract.RETRIEVAL).iterdir()) == before
    compile_models(features, preset, folder, 3, quiet, replace(how, force=True))
    card = json.loads((folder / "compiled" / "model_card.json").read_text())
    assert card["gate"]["forced"] and not card["gate"]["passed"]
    options = on_free_ports(folder / "model_repository")
    with (
        service(options, quiet) as (server, _),
        grpcclient.InferenceServerClient(f"{server.host}:{server.grpc_port}") as client,
    ):
        served = client.get_model_config(contract.ENSEMBLE, as_json=True)["config"]["parameters"]
    assert json.loads(served["gate"]["string_value"])["forced"] and served["precision"]["string_value"] == "int8"


def test_two_of_four_stay_by_hand():
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5, 0.0, 1.0, 1.5, -9.0]])
    assert largest(weight, "2:4").tolist() == [[False, True, True, False, False, False, True, True]]
    assert largest(weight, "0.75").tolist() == [[False, True, False, False, False, False, False, True]]
    with pytest.raises(ValueError, match="multiple of 4"):
        largest(torch.ones(2, 6), "2:4")
    with pytest.raises(ValueError, match="2:4"):
        Constraint(sparsity="half")


@pytest.mark.parametrize("constraint", [Constraint(sparsity="2:4"), Constraint(sparsity="0.8"), Constraint(int8=True)])
def test_weights_keep_the_constraint_they_trained_under(features, root, tmp_path, constraint):
    start = tmp_path / "start"
    prune_retriever(features, tiny(), root, start, Target(), 3, quiet)
    train_retrieval(features, tiny(), tmp_path, 3, quiet, True, start_from=start / "pruned", constraint=constraint)
    before = {n: m.weight for n, m in load_retrieval(features, tiny(), root).encoder.named_modules() if "up" in n}
    for name, layer in load_retrieval(features, tiny(), tmp_path).encoder.named_modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        weight = layer.weight.detach()
        if constraint.sparsity == "2:4":
            assert ((weight.view(len(weight), -1, 4) != 0).sum(2) <= 2).all()
        elif constraint.sparsity:
            assert (weight == 0).float().mean() >= 0.79
        else:  # every row lies on the grid that the quantizer takes
            steps = weight / (weight.abs().amax(1, keepdim=True) / 127)
            assert (steps - steps.round()).abs().max() < 1e-3
        if name in before:
            assert not torch.equal(weight, before[name])


def test_the_report_shows_every_variant(root, variant, tmp_path):
    speeds = report(root, tmp_path, seconds=0.05)
    page = (tmp_path / "compress.html").read_text()
    gate = json.loads((variant[0] / "compiled" / "model_card.json").read_text())["gate"]
    assert "whole model" in page and "small" in page and f"{gate['engine']:.4f}" in page and "Sensitivity" in page
    assert {s.run.split(" ")[0] for s in speeds if " " in s.run} >= {"PyTorch", "OpenVINO"}
    assert (tmp_path / "compress.png").stat().st_size > 10_000
