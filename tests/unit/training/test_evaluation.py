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


def test_ranks_and_exclusions_by_hand():
    f = FIRST_ID
    scores = torch.tensor([[9.0, 9, 9, 1, 5, 7, 0], [9.0, 9, 9, 1, 5, 7, EXCLUDED], [9.0, 9, 9, 1, 5, math.nan, 3]])
    scores[:, :f] = EXCLUDED
    number = torch.arange(3)
    assert ranks(scores, torch.tensor([f + 2, f + 3, f + 1]), number).tolist() == [0, MISS, 1]  # NaN is above
    assert ranks(scores, torch.tensor([f + 1, 2, f + 2]), number).tolist() == [1, MISS, MISS]  # 2: out of vocabulary


def test_ranks_after_re_ordering():
    candidates = torch.tensor([[5, 6, 7]] * 4)
    logits = torch.tensor([[0.1, 0.9, 0.8], [0.1, 0.9, 0.8], [0.1, 0.9, 0.8], [0.1, math.nan, 0.8]])
    after = ranks_after(logits, candidates, torch.tensor([7, 9, 6, 6]), torch.tensor([2, 40, 3, 1]), torch.arange(4))
    # a target that is no candidate keeps the retriever's rank, also one that only its id put before its equals
    assert after.tolist() == [1, 40, 3, MISS]


def test_a_target_is_at_each_place_among_its_equals_alike_and_always_at_the_same():
    """Nine items of one score, one above: ranks 1 to 9 come 1,000 times each, give or take what chance allows."""
    number, f = torch.arange(9000), FIRST_ID
    scores = torch.full((9000, f + 10), EXCLUDED)
    scores[:, f:] = 1.0
    scores[:, f + 4] = 2.0
    target = torch.full((9000,), f)
    rank = ranks(scores, target, number)
    counts = torch.bincount(rank, minlength=10)
    assert counts[0] == 0 and len(counts) == 10
    assert (counts[1:] - 1000).abs().max() < 4 * math.sqrt(9000 * 1 / 9 * 8 / 9)
    assert torch.equal(rank[100:200], ranks(scores[100:200], target[100:200], number[100:200]))  # batches do not matter
    other = torch.randperm(9000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rank[other], ranks(scores[other], target[other], number[other]))


def _constant_model(targets: torch.Tensor, items: int, candidates: int) -> np.ndarray:
    """Ranks that a retriever and a ranker of one score for all give, candidates taken by the smaller id."""
    number = torch.arange(len(targets))
    scores = torch.ones(len(targets), items)
    scores[:, :FIRST_ID] = EXCLUDED
    before = ranks(scores, targets, number)
    chosen = torch.arange(FIRST_ID, FIRST_ID + candidates).expand(len(targets), -1)
    return ranks_after(torch.ones(len(targets), candidates), chosen, targets, before, number).numpy()


def test_a_constant_model_is_as_good_as_chance_however_popular_the_small_ids():
    items, requests = 200, 20_000
    rng = np.random.default_rng(0)
    popular = torch.from_numpy(rng.geometric(0.1, requests).clip(1, items) - 1 + FIRST_ID)  # most targets: first ids
    found = metrics(_constant_model(popular, items + FIRST_ID, 50))["NDCG@10"]
    gains = np.array([1 / math.log2(r + 2) if r < 10 else 0.0 for r in range(items)])  # each rank has chance 1 / 200
    noise = gains.std() / math.sqrt(requests)
    assert abs(found - gains.mean()) < 4 * noise
    assert metrics((popular - FIRST_ID).numpy())["NDCG@10"] > 10 * gains.mean()  # what ids as a rule of ties would give


def test_renaming_items_moves_no_metric_beyond_noise():
    """Scores rounded to few values, so that ties are many; the items get other ids in a random order."""
    items, requests, f = 300, 4000, FIRST_ID
    generator = torch.Generator().manual_seed(1)
    scores = torch.cat([torch.full((requests, f), EXCLUDED), torch.randn(requests, items, generator=generator)], 1)
    scores[:, f:] += torch.linspace(1, 0, items)
    targets = torch.multinomial(scores[:, f:].mul(2).softmax(1), 1, generator=generator)[:, 0] + f
    scores[:, f:] = scores[:, f:].mul(2).round()
    renamed = torch.cat([torch.arange(f), torch.randperm(items, generator=generator) + f])
    moved = torch.empty_like(scores)
    moved[:, renamed] = scores
    number = torch.arange(requests)
    before, after = ranks(scores, targets, number), ranks(moved, renamed[targets], number)
    assert torch.equal(before, after)  # places among equals hang on the request alone


def test_gauc_by_hand():
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.8], [0.5, 0.4, 0.3, 0.2]])
    positive = torch.tensor([[False, True, False, False], [False, False, False, False]])
    # of three pairs one is lost (0.9), one is a tie (0.8), one is won (0.1); the second list has one class only
    assert list_auc(scores, positive).tolist() == pytest.approx([(0 + 0.5 + 1) / 3])
