"""What only a CUDA device can show; skipped by name where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.models.retrieval import EncoderConfig, RetrievalGraph, RetrievalModel

pytestmark = pytest.mark.gpu


def _model() -> RetrievalModel:
    torch.manual_seed(0)
    return RetrievalModel(EncoderConfig(width=16, layers=1, history=12), 60, torch.arange(60).float()).eval()


def test_retrieval_on_cuda_equals_cpu():
    model = _model()
    history, exclude = torch.randint(3, 60, (8, 12)), torch.zeros(8, 60, dtype=torch.bool)
    on_cpu = RetrievalGraph(model, 10)(history, exclude)
    on_gpu = RetrievalGraph(model.cuda(), 10)(history.cuda(), exclude.cuda())
    torch.testing.assert_close(on_gpu[1].cpu(), on_cpu[1], atol=1e-3, rtol=1e-3)


def test_retrieval_graph_under_onnx_runtime_cuda(tmp_path):
    import onnxruntime as ort

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
