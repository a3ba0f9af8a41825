"""Properties of the models: padding changes nothing, batch equals single, the future is not seen, candidate order is
irrelevant, an untrained ranker keeps the retriever's order."""

from __future__ import annotations

import pytest
import torch

from preprocessing.contract import FIRST_ID, PADDING_ID
from training.losses import full_softmax, sampled_softmax
from training.ranking_model import ItemTables, RankerConfig, RankingGraph, RankingModel
from training.retrieval_model import EXCLUDED, EncoderConfig, RetrievalGraph, RetrievalModel

ITEMS = 60


@pytest.fixture(scope="module")
def retriever() -> RetrievalModel:
    torch.manual_seed(0)
    model = RetrievalModel(EncoderConfig(width=16, layers=2, heads=2, history=12), ITEMS, torch.arange(ITEMS).float())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        model.item.weight[PADDING_ID].zero_()
    return model.eval()


@pytest.fixture(scope="module")
def ranker(retriever: RetrievalModel) -> RankingModel:
    torch.manual_seed(1)
    g = torch.Generator().manual_seed(2)
    tables = ItemTables(
        popularity=torch.rand(ITEMS, generator=g) * 50,
        follower_ids=torch.randint(FIRST_ID, ITEMS, (ITEMS, 8), generator=g),
        follower_weights=torch.rand(ITEMS, 8, generator=g),
        categories=torch.randint(0, 5, (ITEMS, 2), generator=g),
        category_sizes=(5, 5),
        numbers=torch.randn(ITEMS, 1, generator=g),
    )
    config = RankerConfig(candidates=10, heads=2, experts=2, expert_width=8, lags=4, followers=8)
    model = RankingModel(config, tables, retriever, ("watched", "liked"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def _history(*ids: int, length: int = 12) -> torch.Tensor:
    return torch.tensor([[PADDING_ID] * (length - len(ids)) + list(ids)])


def test_padding_changes_nothing(retriever):
    short = retriever.encode(torch.tensor([[7, 9, 11]]))
    padded = retriever.encode(_history(7, 9, 11))
    torch.testing.assert_close(short, padded[:, -3:], atol=1e-5, rtol=1e-5)
    assert (padded[:, :-3] == 0).all()


def test_the_future_is_not_seen(retriever):
    one, two = retriever.encode(_history(7, 9, 11, 13)), retriever.encode(_history(7, 9, 11, 50))
    torch.testing.assert_close(one[:, :-1], two[:, :-1])
    assert not torch.allclose(one[:, -1], two[:, -1])


def test_batch_equals_single(retriever, ranker):
    history = torch.cat([_history(7, 9, 11), _history(*range(10, 22)), _history()])
    exclude = torch.zeros(3, ITEMS, dtype=torch.bool)
    graph, rank = RetrievalGraph(retriever, 10), RankingGraph(ranker)
    ids, scores, encoded = graph(history, exclude)
    together = rank(history, ids, scores, encoded)
    for i in range(3):
        alone = graph(history[i : i + 1], exclude[i : i + 1])
        torch.testing.assert_close(alone[1][0], scores[i], atol=1e-5, rtol=1e-5)
        for a, b in zip(rank(history[i : i + 1], *alone), together, strict=True):
            torch.testing.assert_close(a[0], b[i], atol=1e-5, rtol=1e-5)


def test_empty_history_gives_popular_items_in_order(retriever, ranker):
    exclude = torch.zeros(1, ITEMS, dtype=torch.bool)
    ids, scores, encoded = RetrievalGraph(retriever, 10)(_history(), exclude)
    assert ids[0].tolist() == list(range(ITEMS - 1, ITEMS - 11, -1))
    assert RankingGraph(ranker)(_history(), ids, scores, encoded)[0][0].tolist() == ids[0].tolist()


def test_excluded_items_are_not_answered(retriever, ranker):
    exclude = torch.ones(1, ITEMS, dtype=torch.bool)
    exclude[0, 20:24] = False  # fewer items than candidates
    ids, scores, encoded = RetrievalGraph(retriever, 10)(_history(7, 9), exclude)
    assert sorted(ids[0, :4].tolist()) == [20, 21, 22, 23] and (ids[0, 4:] == PADDING_ID).all()
    ranked, values = RankingGraph(ranker)(_history(7, 9), ids, scores, encoded)
    assert sorted(ranked[0, :4].tolist()) == [20, 21, 22, 23] and (values[0, 0, 4:] <= EXCLUDED / 2).all()


def test_candidate_order_is_irrelevant(retriever, ranker):
    history = _history(7, 9, 11)
    ids, scores, encoded = RetrievalGraph(retriever, 10)(history, torch.zeros(1, ITEMS, dtype=torch.bool))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        plain = ranker(history, ids, scores, encoded)
        mixed = ranker(history, ids[:, order], scores[:, order], encoded)
    torch.testing.assert_close(mixed, plain[:, order], atol=1e-5, rtol=1e-5)


def test_an_untrained_ranker_keeps_the_retrievers_order(retriever):
    tables = ItemTables(
        torch.ones(ITEMS), torch.zeros(ITEMS, 4, dtype=torch.long), torch.zeros(ITEMS, 4),
        torch.zeros(ITEMS, 0, dtype=torch.long), (), torch.zeros(ITEMS, 0),
    )  # fmt: skip
    fresh = RankingModel(RankerConfig(candidates=10, heads=2), tables, retriever, ("click",)).eval()
    history = _history(7, 9, 11)
    ids, scores, encoded = RetrievalGraph(retriever, 10)(history, torch.zeros(1, ITEMS, dtype=torch.bool))
    assert RankingGraph(fresh)(history, ids, scores, encoded)[0][0].tolist() == ids[0].tolist()


def test_full_softmax_equals_cross_entropy_with_its_gradients():
    torch.manual_seed(0)
    h, w, b = (torch.randn(*s, dtype=torch.double, requires_grad=True) for s in ((4500, 6), (30, 6), (30,)))
    target = torch.randint(FIRST_ID, 30, (4500,))
    ours = full_softmax(h, w, b, target, FIRST_ID)
    plain = torch.nn.functional.cross_entropy((h @ w.t() + b)[:, FIRST_ID:], target - FIRST_ID)
    torch.testing.assert_close(ours, plain)
    for mine, reference in zip(
        torch.autograd.grad(ours, (h, w, b)), torch.autograd.grad(plain, (h, w, b)), strict=True
    ):
        torch.testing.assert_close(mine, reference)


def test_sampled_softmax_approaches_full_softmax():
    """With logQ correction and many negatives the sampled loss estimates the full one."""
    torch.manual_seed(0)
    h, w, b = torch.randn(200, 6), torch.randn(30, 6), torch.randn(30)
    target = torch.randint(FIRST_ID, 30, (200,))
    p = torch.full((30,), 1.0)
    p[:FIRST_ID] = 1e-9
    p = p / p.sum()
    count = 60_000
    sample = torch.multinomial(p, count, replacement=True)
    # the sum over S samples of exp(s - log(S p)) estimates the partition; the positive gets no correction then
    estimate = sampled_softmax(h, w, b, target, sample, (count * p).log())
    logits = (h @ w.t() + b)[:, FIRST_ID:]
    assert torch.isfinite(estimate)
    corrected = logits.gather(1, (target - FIRST_ID)[:, None])[:, 0] - (count * p)[target].log()
    others = logits.exp().sum(1) - logits.gather(1, (target - FIRST_ID)[:, None])[:, 0].exp()
    expected = -(corrected - torch.log(corrected.exp() + others)).mean()
    assert float(estimate) == pytest.approx(float(expected), rel=0.02)
