"""What only a CUDA device can show; skipped by name where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.distributed import Objective
from training.learn.loop import Loop, LoopConfig
from training.learn.objectives import log_expected_counts, retrieval_loss
from training.learn.retriever import compile_blocks
from training.losses import full_softmax
from training.models.item_table import ItemTables
from training.models.ranking import RankerConfig, RankingGraph, RankingModel
from training.models.retrieval import EncoderConfig, RetrievalGraph, RetrievalModel
from training.presets import RetrievalTraining

pytestmark = pytest.mark.gpu


def _model() -> RetrievalModel:
    torch.manual_seed(0)
    return RetrievalModel(EncoderConfig(width=16, layers=1, history=12), 60, torch.arange(60).float()).eval()


def _ranker() -> RankingModel:
    followers = torch.randint(3, 60, (60, 8))
    none = torch.zeros(60, 0)
    tables = ItemTables(torch.arange(60).float(), followers, torch.rand(60, 8), none.long(), (), none)
    config = RankerConfig(candidates=20, heads=2, experts=2, expert_width=16, lags=4, followers=8)
    model = RankingModel(config, tables, _model(), ("click", "buy"))
    for layer in model.score.values():  # zero before training
        torch.nn.init.normal_(layer.weight)
    return model


def test_retrieval_on_cuda_equals_cpu():
    model = _model()
    history, exclude = torch.randint(3, 60, (8, 12)), torch.zeros(8, 60, dtype=torch.bool)
    on_cpu = RetrievalGraph(model, 10)(history, exclude)
    on_gpu = RetrievalGraph(model.cuda(), 10)(history.cuda(), exclude.cuda())
    torch.testing.assert_close(on_gpu[1].cpu(), on_cpu[1], atol=1e-3, rtol=1e-3)


def test_ranking_on_cuda_equals_cpu():
    torch.manual_seed(0)
    model = _ranker().eval()
    history, candidates = torch.randint(3, 60, (8, 12)), torch.stack([torch.randperm(57)[:20] + 3 for _ in range(8)])
    given = (history, candidates, torch.randn(8, 20).sort(1, descending=True).values, torch.randn(8, 12, 16))
    on_cpu = RankingGraph(model)(*given)
    on_gpu = RankingGraph(model.cuda())(*(x.cuda() for x in given))
    torch.testing.assert_close(on_gpu[1].cpu(), on_cpu[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_over_all_items_on_cuda_equals_cpu(smoothing):
    torch.manual_seed(0)
    results = []
    for where in ("cpu", "cuda"):
        torch.manual_seed(1)
        states, table, bias = torch.randn(300, 16), torch.randn(60, 16) * 0.3, torch.randn(60)
        states, table, bias = (x.to(where).requires_grad_() for x in (states, table, bias))
        target = torch.randint(3, 60, (300,)).to(where)
        with torch.autocast("cuda", torch.bfloat16, where == "cuda"):
            loss = full_softmax(states, table, bias, target, 3, smoothing)
        loss.backward()
        results.append([x.detach().cpu() for x in (loss, states.grad, table.grad, bias.grad)])
    for on_cpu, on_gpu in zip(*results, strict=True):  # TF32 has ten bits of mantissa
        torch.testing.assert_close(on_gpu, on_cpu, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("bias", ["none", "relative"])
@pytest.mark.parametrize("length", [7, 23, 49, 151, 200])
def test_gradients_of_padded_windows_in_bfloat16_are_those_of_the_cpu(length, bias):
    torch.manual_seed(0)
    config = EncoderConfig(width=64, layers=2, heads=2, history=200, dropout=0.0, position_bias=bias)
    windows = torch.randint(3, 60, (64, length + 1))
    for row, known in enumerate(torch.randint(2, length + 2, (64,)).tolist()):
        windows[row, : length + 1 - known] = 0
    gradients = []
    for where in ("cpu", "cuda"):
        torch.manual_seed(1)
        model = RetrievalModel(config, 60, torch.ones(60)).to(where).train()
        expected = log_expected_counts(torch.ones(60), RetrievalTraining()).to(where)
        objective = Objective(model, retrieval_loss(model, RetrievalTraining(), expected))
        loss, _ = objective(windows)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))
    on_cpu, on_gpu = gradients
    assert torch.isfinite(on_gpu).all()
    assert float((on_gpu - on_cpu).norm() / on_cpu.norm()) < 0.05


@pytest.mark.parametrize("compiled", [False, True])
def test_training_in_bfloat16_learns(compiled, tmp_path):
    torch.manual_seed(0)
    model = RetrievalModel(EncoderConfig(width=32, layers=1, history=12, dropout=0.0), 60, torch.ones(60)).cuda()
    if compiled:
        compile_blocks(model)
    training = RetrievalTraining(batch_size=16)
    expected = log_expected_counts(torch.ones(60), training).cuda()
    cycle = (torch.arange(13)[None] + torch.arange(16)[:, None]) % 57 + 3  # what comes next is certain
    config = LoopConfig(epochs=40, steps_per_epoch=1, learning_rate=1e-2, warmup_steps=2, seed=0, ema=0.9)
    objective = retrieval_loss(model, training, expected)
    loop = Loop(model, config, tmp_path, "retrieval", lambda _: iter([cycle]), objective, dict, quiet=True)
    losses = [epoch["loss"] for epoch in loop.run()["epochs"]]
    assert losses[0] > 3 and losses[-1] < 0.5, losses


def test_retrieval_graph_under_onnx_runtime_cuda(tmp_path):
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip(f"this onnxruntime has only {ort.get_available_providers()}")
    from training.compile.onnx_export import export

    path, model = tmp_path / "r.onnx", _model()
    example = (torch.randint(3, 60, (4, 12)), torch.zeros(4, 60, dtype=torch.bool))
    export(RetrievalGraph(model, 10), example, ["HISTORY_IDS", "EXCLUDE"], ["IDS", "SCORES", "ENCODED"], path)
    feed = {"HISTORY_IDS": example[0].numpy(), "EXCLUDE": example[1].numpy()}
    scores = [
        ort.InferenceSession(str(path), providers=[p]).run(["SCORES"], feed)[0]
        for p in ("CPUExecutionProvider", "CUDAExecutionProvider")
    ]
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-3)
