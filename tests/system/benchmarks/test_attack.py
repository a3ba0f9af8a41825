"""Adversarial training and the measured attack."""

from __future__ import annotations

import pytest
import torch

from benchmarks.attack import under_attack
from training.checkpoints import load_retrieval
from training.learn.objectives import adversarial, direction
from training.presets import tiny


def test_the_adversarial_loss_by_hand():
    """Loss 3 x on one row of length 2: the gradient is 3, its direction 1, so the row moves by 0.5 x 2."""
    table = torch.tensor([[0.0], [0.0], [0.0], [2.0]], requires_grad=True)
    loss = adversarial(lambda t: 3 * t[3, 0], table, epsilon=0.5, weight=2.0)
    assert float(loss.detach()) == pytest.approx(6 + 2 * 9)
    assert direction(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist() == [
        [pytest.approx(0.6), pytest.approx(0.8)],
        [0, 0],
    ]


def test_an_attack_costs_more_than_noise(features, root):
    model = load_retrieval(features, tiny(), root).cpu()
    found = under_attack(model, features, tiny(), [1.0])
    assert found["1"]["attacked"] < found["1"]["random"] and found["1"]["attacked"] < found["0"]["attacked"]
