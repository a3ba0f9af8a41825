"""Metrics with their arithmetic in sight."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from training.metrics import MISS, bootstrap, list_auc, metrics, ranks, ranks_after
from training.models.retrieval import EXCLUDED
from vivace.contract import FIRST_ID


def test_metrics_by_hand():
    found = metrics(np.array([0, 2, 9, 10, MISS]))
    assert found["HR@1"] == 1 / 5
    assert found["HR@10"] == 3 / 5
    assert found["NDCG@10"] == pytest.approx((1 / math.log2(2) + 1 / math.log2(4) + 1 / math.log2(11)) / 5)
    assert found["MRR@10"] == pytest.approx((1 + 1 / 3 + 1 / 10) / 5)
    assert found["NDCG@50"] == pytest.approx(found["NDCG@10"] + 1 / math.log2(12) / 5)
    with pytest.raises(ValueError, match="no"):
        metrics(np.array([]))


def test_bootstrap_covers_the_mean_as_theory_says():
    values = np.random.default_rng(1).normal(3.0, 2.0, 4000)
    low, high = bootstrap(values, seed=2)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=half * 0.1)
    assert high == pytest.approx(values.mean() + half, abs=half * 0.1)


def test_ranks_are_stable_and_exclusions_are_misses():
    f = FIRST_ID
    scores = torch.tensor([[9.0, 9, 9, 1, 5, 5, 0], [9.0, 9, 9, 1, 5, 5, EXCLUDED]])
    scores[:, :f] = EXCLUDED
    assert ranks(scores, torch.tensor([f + 2, f + 3])).tolist() == [1, MISS]  # the tie goes to the smaller id
    assert ranks(scores, torch.tensor([f + 1, 2])).tolist() == [0, MISS]  # out of vocabulary


def test_ranks_after_re_ordering():
    candidates = torch.tensor([[5, 6, 7], [5, 6, 7]])
    logits = torch.tensor([[0.1, 0.9, 0.9], [0.1, 0.9, 0.9]])
    after = ranks_after(logits, candidates, torch.tensor([7, 9]), torch.tensor([2, 40]))
    assert after.tolist() == [1, 40]  # a target that is no candidate keeps the retriever's rank


def test_gauc_by_hand():
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.8], [0.5, 0.4, 0.3, 0.2]])
    positive = torch.tensor([[False, True, False, False], [False, False, False, False]])
    # of three pairs one is lost (0.9), one is a tie (0.8), one is won (0.1); the second list has one class only
    assert list_auc(scores, positive).tolist() == pytest.approx([(0 + 0.5 + 1) / 3])
