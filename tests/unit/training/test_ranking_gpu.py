"""The ranker in its form for GPUs answers what the trained one answers."""

from __future__ import annotations

import pytest
import torch

from training.models.blocks import with_merged_heads
from training.models.encoders import MASKED, EncoderConfig, mask_value
from training.models.item_table import ItemTables
from training.models.ranking import RankerConfig, RankingGraph, RankingModel
from training.models.ranking_gpu import GpuRanking, gpu_graph
from training.models.retrieval import EXCLUDED, RetrievalModel
from vivace.contract import FIRST_ID, PADDING_ID

ITEMS, T, N = 60, 12, 20  # few items, so that candidates are among the followers


def ranker(attributes: bool = True, mixture: str = "mmoe") -> RankingModel:
    torch.manual_seed(3)
    config = RankerConfig(candidates=N, heads=2, experts=3, expert_width=16, lags=4, followers=8, mixture=mixture,
                          category_counts=True)  # fmt: skip
    retriever = RetrievalModel(EncoderConfig(width=16, layers=1, heads=2, history=T), ITEMS, torch.ones(ITEMS))
    followers = torch.stack([torch.randperm(ITEMS - FIRST_ID)[:8] + FIRST_ID for _ in range(ITEMS)])
    sizes = (5, 3) if attributes else ()
    categories = (
        torch.stack([torch.randint(0, n, (ITEMS,)) for n in sizes], 1) if sizes else torch.zeros(ITEMS, 0).long()
    )
    numbers = torch.randn(ITEMS, 2 if attributes else 0)
    tables = ItemTables(torch.rand(ITEMS) * 50, followers, torch.rand(ITEMS, 8), categories, sizes, numbers)
    model = RankingModel(config, tables, retriever, ("click", "buy")).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1 or parameter.abs().sum() == 0:
            parameter.normal_(std=0.2)
    return model


def requests() -> tuple[torch.Tensor, ...]:
    """Four requests: whole, padded, with three places left empty, and without a history."""
    torch.manual_seed(4)
    history = torch.randint(FIRST_ID, ITEMS, (4, T))
    candidates = torch.stack([torch.randperm(ITEMS - FIRST_ID)[:N] + FIRST_ID for _ in range(4)])
    scores = torch.randn(4, N).sort(1, descending=True).values
    history[1, :-2] = PADDING_ID
    candidates[2, -3:], scores[2, -3:] = PADDING_ID, EXCLUDED
    history[3] = PADDING_ID
    return history, candidates, scores, torch.randn(4, T, 16)


@pytest.mark.parametrize("attributes", [True, False])
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("lookup", ["sum", "sorted"])
def test_it_answers_what_the_trained_one_answers(attributes, folded, lookup):
    model, given = ranker(attributes), requests()
    ids, values = RankingGraph(model)(*given)
    other_ids, other = gpu_graph(model, torch.float32, folded, lookup)(*given)
    live = ids != PADDING_ID
    assert torch.equal(ids[live], other_ids[live])
    for head in range(values.shape[1]):
        torch.testing.assert_close(values[:, head][live], other[:, head][live], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_sixteen_bits_move_logits_a_little_and_make_no_infinities(dtype, bound):
    model, given = ranker(), requests()
    expected = model(*given)
    graph = gpu_graph(model, dtype)
    assert graph.model.heads.mixture.weight.dtype == dtype and graph.model.follower_weights.dtype == torch.float32
    logits = graph.model(*given)
    live = given[1] != PADDING_ID
    assert torch.isfinite(logits).all()
    assert (logits - expected)[live].abs().max() < bound


def test_ties_and_equal_scores_have_the_same_rank():
    model, (history, candidates, scores, encoded) = ranker(), requests()
    scores = scores.round()
    for lookup in ("sum", "sorted"):
        logits = GpuRanking(model, torch.float32, lookup=lookup)(history, candidates, scores, encoded)
        live = candidates != PADDING_ID
        torch.testing.assert_close(
            logits[live], model(history, candidates, scores, encoded)[live], atol=2e-5, rtol=1e-4
        )


def test_another_mixture_is_refused_by_name():
    with pytest.raises(ValueError, match="expected the mixture 'mmoe', got 'shared'"):
        GpuRanking(ranker(mixture="shared"), torch.bfloat16)


def test_the_trained_model_is_left_as_it_is():
    model = ranker()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gpu_graph(model, torch.bfloat16)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.key.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mask_that_is_added_twice_stays_a_number(dtype):
    value = torch.full((), mask_value(dtype), dtype=dtype)
    assert torch.isfinite(value + value) and value + value < -1e4
    assert dtype == torch.float16 or mask_value(dtype) == MASKED


def test_a_retriever_in_half_precision_answers_an_empty_history():
    from benchmarks.gpu.subjects import cast
    from training.models.retrieval import RetrievalGraph

    torch.manual_seed(5)
    config = EncoderConfig(width=16, layers=2, heads=2, history=T, position_bias="relative")
    graph = RetrievalGraph(RetrievalModel(config, ITEMS, torch.rand(ITEMS)).eval().requires_grad_(False), 10)
    history = torch.randint(FIRST_ID, ITEMS, (3, T))
    history[1], history[2, :-2] = PADDING_ID, PADDING_ID
    given = history, torch.zeros(3, ITEMS, dtype=torch.bool)
    _, scores, _ = graph(*given)
    for dtype in (torch.float16, torch.bfloat16):
        _, other, encoded = cast(RetrievalGraph(graph.model, 10), dtype)(*given)
        assert torch.isfinite(encoded[:, -1]).all() and other.dtype == torch.float32
        assert (scores - other).abs().max() < 0.02
        graph.model.float()


@pytest.mark.parametrize("folded", [True, False])
def test_merged_heads_answer_what_the_trained_ones_answer_and_leave_them_alone(folded):
    model, given = ranker(), requests()
    ids, values = RankingGraph(model)(*given)
    other_ids, other = RankingGraph(with_merged_heads(model), folded=folded)(*given)
    assert model.merged is None and with_merged_heads(model).experts is model.experts
    assert torch.equal(ids, other_ids)
    torch.testing.assert_close(values, other, atol=2e-5, rtol=1e-4)
    shared = ranker(mixture="shared")
    assert with_merged_heads(shared) is shared
