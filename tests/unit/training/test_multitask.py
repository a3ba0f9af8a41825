"""Task weights and calibration, with their arithmetic in sight; every mixture ranks and exports."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.learn.ranker import fit_platt
from training.metrics import expected_calibration_error, reliability
from training.models.task_heads import TaskWeights


def test_static_and_uncertainty_weights_by_hand():
    losses, shared = [torch.tensor(2.0), torch.tensor(4.0)], torch.zeros(1)
    assert float(TaskWeights(2)(losses, shared)) == pytest.approx(2 + 4 / 2)
    learned = TaskWeights(2, "uncertainty")
    with torch.no_grad():
        learned.log_variance.copy_(torch.tensor([0.0, 1.0]))
    assert float(learned(losses, shared).detach()) == pytest.approx(2 + 4 * np.exp(-1.0) + 1)
    assert float(TaskWeights(2, "only-1")(losses, shared)) == 4
    with pytest.raises(ValueError, match="weighting"):
        TaskWeights(2, "sum")


def test_gradnorm_takes_weight_from_the_task_with_the_larger_gradient():
    w = torch.nn.Parameter(torch.ones(3))
    weights = TaskWeights(2, "gradnorm", alpha=0.0).train()
    weights([(10 * w).sum(), (0 * w).sum()], w)  # a head that has not begun to learn changes nothing
    assert weights.weight_H.tolist() == [1.0, 1.0]
    weights.start_H.zero_()
    for _ in range(200):
        weights([(10 * w).sum(), w.sum()], w)
    assert float(weights.weight_H.sum()) == pytest.approx(2.0, rel=1e-5)
    assert float(weights.weight_H[1] / weights.weight_H[0]) == pytest.approx(10.0, rel=0.05)  # equal weighted norms


def test_expected_calibration_error_by_hand():
    probability = np.array([0.1, 0.1, 0.8, 0.8])
    label = np.array([0, 0, 1, 0])
    assert reliability(probability, label, 2).tolist() == [[0.1, 0.0, 2.0], [0.8, 0.5, 2.0]]
    assert expected_calibration_error(probability, label, 2) == pytest.approx((0.1 * 2 + 0.3 * 2) / 4)


def test_calibration_is_fitted_and_never_turns_the_order_round():
    x = torch.linspace(-4, 4, 4001, dtype=torch.double)
    expected = torch.sigmoid(2 * x - 1)
    slope, offset = fit_platt(x, (torch.rand(4001, generator=torch.Generator().manual_seed(3)) < expected).double())
    assert slope == pytest.approx(2, abs=0.2) and offset == pytest.approx(-1, abs=0.2)
    for y in (torch.zeros(4001), torch.ones(4001), (x < -3.9).double()):  # one class alone, and the wrong way round
        slope, offset = fit_platt(x, y.double())
        share = (float(y.sum()) + 0.5) / 4002
        assert slope == 1 and float(torch.sigmoid(x + offset).mean()) == pytest.approx(share, abs=1e-5)
