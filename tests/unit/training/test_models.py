"""Properties of the models: padding changes nothing, batch equals single, the future is not seen, candidate order is
irrelevant, an untrained ranker keeps the retriever's order."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from training.compile.onnx_export import export
from training.losses import full_softmax, gbce, sampled_softmax
from training.models.blocks import own_counts
from training.models.encoders import BUCKETS, dropout, time_buckets
from training.models.item_table import ItemAttributes, ItemTables, words_of
from training.models.ranking import MIXTURES, RankerConfig, RankingGraph, RankingModel
from training.models.retrieval import EXCLUDED, EncoderConfig, RetrievalGraph, RetrievalModel
from vivace.context import ContextColumns
from vivace.contract import FIRST_ID, PADDING_ID
from vivace.onnx_session import open_session

ITEMS = 60


ENCODERS = {
    "sasrec": EncoderConfig(),
    "sasrec, relative bias, attributes and text": EncoderConfig(
        position_bias="relative", attributes=True, text_tokens=3
    ),
    "hstu": EncoderConfig(family="hstu"),
    "bert4rec": EncoderConfig(family="bert4rec"),
    "sasrec, time bias": EncoderConfig(time_bias=True),
    "hstu, time bias": EncoderConfig(family="hstu", time_bias=True),
    "bert4rec, time bias": EncoderConfig(family="bert4rec", position_bias="relative", time_bias=True),
    "gru": EncoderConfig(family="gru"),
    "lstm": EncoderConfig(family="lstm"),
}


def _attributes() -> ItemAttributes:
    g = torch.Generator().manual_seed(3)
    categories = torch.randint(0, 5, (ITEMS, 2), generator=g)
    words = torch.randint(0, 9, (ITEMS, 3), generator=g)
    vectors = torch.randn(ITEMS, 4, generator=g)
    return ItemAttributes(categories, (5, 5), torch.randn(ITEMS, 1, generator=g), words, 9, vectors)


def _retriever(config: EncoderConfig, columns: ContextColumns | None = None) -> RetrievalModel:
    torch.manual_seed(0)
    config = replace(config, width=16, layers=2, heads=2, history=12)
    attributes = _attributes() if config.attributes else None
    model = RetrievalModel(config, ITEMS, torch.arange(ITEMS).float(), attributes, columns=columns or ContextColumns())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        model.items.id.weight[PADDING_ID].zero_()
    return model.eval()


@pytest.fixture(scope="module", params=ENCODERS, ids=str)
def retriever(request) -> RetrievalModel:
    return _retriever(ENCODERS[request.param])


@pytest.fixture(scope="module")
def ranker(retriever: RetrievalModel) -> RankingModel:
    return _ranker(retriever, "mmoe")


def _ranker(retriever: RetrievalModel, mixture: str, **more) -> RankingModel:
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
    config = RankerConfig(candidates=10, heads=2, experts=2, expert_width=8, lags=4, followers=8, mixture=mixture,
                          category_counts=True, **more)  # fmt: skip
    model = RankingModel(config, tables, retriever, ("watched", "liked"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def _history(*ids: int, length: int = 12) -> torch.Tensor:
    return torch.tensor([[PADDING_ID] * (length - len(ids)) + list(ids)])


def _times(history: torch.Tensor) -> torch.Tensor:
    """Times in ms: from a second to a month apart, the same for the same place from the right; one unknown."""
    gaps = torch.logspace(3, 9.4, history.shape[1]).flip(0).long()
    times = (1_700_000_000_000 + gaps.cumsum(0)).expand(len(history), -1) * (history != PADDING_ID)
    times[:, -2] = 0
    return times


def test_padding_changes_nothing(retriever):
    history, times = _history(7, 9, 11), _times(_history(7, 9, 11))
    short = retriever.encode(history[:, -3:], times=times[:, -3:])
    padded = retriever.encode(history, times=times)
    torch.testing.assert_close(short, padded[:, -3:], atol=1e-5, rtol=1e-5)
    assert (padded[:, :-3] == 0).all()


def test_the_newest_rows_are_those_of_the_whole(retriever):
    history = torch.cat([_history(7, 9, 11), _history(*range(10, 22)), _history()])
    whole = retriever.encode(history, times=_times(history))
    for newest in (1, 5, 12):
        part = retriever.encode(history, times=_times(history), newest=newest)
        torch.testing.assert_close(part, whole[:, -newest:], atol=1e-5, rtol=1e-5)


def test_the_future_is_not_seen(retriever):
    if retriever.masked:
        pytest.skip("bert4rec sees both sides: it is trained on hidden items")
    one, two = retriever.encode(_history(7, 9, 11, 13)), retriever.encode(_history(7, 9, 11, 50))
    torch.testing.assert_close(one[:, :-1], two[:, :-1])
    assert not torch.allclose(one[:, -1], two[:, -1])


@pytest.mark.parametrize("family", ["sasrec", "hstu", "bert4rec"])
def test_time_between_events_is_seen(family):
    """Moving all times together changes nothing; moving the newest event does, but only where it may be seen."""
    retriever = _retriever(EncoderConfig(family=family, time_bias=True))
    history = _history(7, 9, 11, 13)
    times = _times(history)
    plain = retriever.encode(history, times=times)
    torch.testing.assert_close(retriever.encode(history, times=torch.where(times > 0, times + 86_400_000, 0)), plain)
    later = times.clone()
    later[:, -1] += 86_400_000
    moved = retriever.encode(history, times=later)
    assert not torch.allclose(moved[:, -1], plain[:, -1])
    if family != "bert4rec":
        torch.testing.assert_close(moved[:, :-1], plain[:, :-1])


def test_own_counts_by_hand():
    """Of three events of a padded history two are of the first candidate's kind and none of the second's."""
    same = torch.tensor([[[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])
    counted = own_counts(same, torch.tensor([[PADDING_ID, 7, 9, 11]]))
    torch.testing.assert_close(counted, torch.tensor([[[math.log(3), 2 / 3], [0.0, 0.0]]]))
    assert not own_counts(same * 0, torch.zeros(1, 4, dtype=torch.int64)).any()  # nobody's history


def test_time_buckets_by_hand():
    times = torch.tensor([[0, 1_000, 1_900, 2_000, 5_000, 10**12]])
    found = time_buckets(times)[0]
    assert found[0].tolist() == [0] * 6 and found[:, 0].tolist() == [0] * 6  # unknown
    # 0 s: log2(1.5), 1 s: log2(2.5), 4 s: log2(5.5); 1.9 s minus 1 s is no whole second
    assert found[1, 1:].tolist() == [1, 1, 2, 3, 30] and found[4, 1] == 3 and found[2, 1] == 1
    assert time_buckets(torch.tensor([[1, 4 * 10**15]])).max() == BUCKETS - 1


@pytest.mark.parametrize("memory", [0, 5])
def test_batch_equals_single(retriever, ranker, memory):
    history = torch.cat([_history(7, 9, 11), _history(*range(10, 22)), _history()])
    exclude = torch.zeros(3, ITEMS, dtype=torch.bool)
    graph, rank = RetrievalGraph(retriever, 10, memory), RankingGraph(ranker)
    ids, scores, encoded = graph(history, exclude)
    together = rank(history, ids, scores, encoded)
    for i in range(3):
        alone = graph(history[i : i + 1], exclude[i : i + 1])
        torch.testing.assert_close(alone[1][0], scores[i], atol=1e-5, rtol=1e-5)
        for a, b in zip(rank(history[i : i + 1], *alone), together, strict=True):
            torch.testing.assert_close(a[0], b[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_every_mixture_exports_to_onnx(mixture, tmp_path):
    retriever = _retriever(ENCODERS["sasrec"])
    history = torch.cat([_history(7, 9, 11), _history(*range(10, 22)), _history()])
    with torch.no_grad():
        ids, scores, encoded = RetrievalGraph(retriever, 10)(history, torch.zeros(3, ITEMS, dtype=torch.bool))
        graph = RankingGraph(_ranker(retriever, mixture)).eval()
        expected = graph(history, ids, scores, encoded)
    rows = (history, ids, scores, encoded)
    names = ["HISTORY_IDS", "CANDIDATE_IDS", "CANDIDATE_SCORES", "ENCODED_HISTORY"]
    export(graph, tuple(x[:2] for x in rows), names, ["IDS", "VALUES"], tmp_path / "model.onnx")
    feed = {n: x.numpy() for n, x in zip(names, rows, strict=True)}
    got = open_session(tmp_path / "model.onnx").run(None, feed)
    assert (got[0] == expected[0].numpy()).all()
    np.testing.assert_allclose(got[1], expected[1].numpy(), atol=2e-5)


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


def test_every_family_exports_to_onnx(retriever, tmp_path):
    graph = RetrievalGraph(retriever, 10, memory=4)
    history = torch.cat([_history(7, 9, 11), _history(*range(10, 22)), _history(), _history(5)])
    exclude = torch.zeros(4, ITEMS, dtype=torch.bool)
    inputs = {"HISTORY_IDS": history, "EXCLUDE": exclude}
    if retriever.config.time_bias:
        inputs["HISTORY_TIMES"] = _times(history)
    rows = tuple(inputs.values())
    export(graph, tuple(x[:2] for x in rows), list(inputs), ["IDS", "SCORES", "ENCODED"], tmp_path / "model.onnx")
    got = open_session(tmp_path / "model.onnx").run(None, {n: x.numpy() for n, x in inputs.items()})
    with torch.no_grad():
        expected = graph(*rows)
    assert (got[0] == expected[0].numpy()).all()
    for mine, reference in zip(got[1:], expected[1:], strict=True):
        np.testing.assert_allclose(mine, reference.numpy(), atol=2e-5)


def test_an_item_without_events_is_described_by_its_attributes():
    model = _retriever(ENCODERS["sasrec, relative bias, attributes and text"])
    with torch.no_grad():
        model.items.id.weight.zero_()
        table = model.table()
        assert (table[:FIRST_ID] == 0).all() and (table[FIRST_ID:].abs().sum(1) > 0).all()
        twin = _attributes()
        for name in ("categories", "numbers", "words", "vectors"):
            getattr(twin, name)[9] = getattr(twin, name)[7]
            setattr(model.items, name, getattr(twin, name))
        torch.testing.assert_close(model.table()[9], model.table()[7])


def test_dropout_keeps_the_mean_and_drops_its_share():
    torch.manual_seed(0)
    out = dropout(torch.ones(1001, 99), 0.25, training=True)
    assert float((out == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(out.mean()) == pytest.approx(1.0, abs=0.01) and len(out.unique()) == 2
    assert dropout(out, 0.25, training=False) is out


def test_words_of_titles():
    words, count = words_of(["red dress", "Red shoes", "dress", ""], 1)
    assert count == 3 and words.shape == (4 + FIRST_ID, 1)
    of = words[FIRST_ID:, 0].tolist()
    assert of[0] == of[2] and of[0] != of[1] and of[1] > 0 and of[3] == 0  # "dress" and "red" are as rare; a tie by id


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_full_softmax_equals_cross_entropy_with_its_gradients(smoothing):
    torch.manual_seed(0)
    h, w, b = (torch.randn(*s, dtype=torch.double, requires_grad=True) for s in ((4500, 6), (30, 6), (30,)))
    target = torch.randint(FIRST_ID, 30, (4500,))
    ours = full_softmax(h, w, b, target, FIRST_ID, smoothing)
    plain = torch.nn.functional.cross_entropy(
        (h @ w.t() + b)[:, FIRST_ID:], target - FIRST_ID, label_smoothing=smoothing
    )
    torch.testing.assert_close(ours, plain)
    for mine, reference in zip(
        torch.autograd.grad(ours, (h, w, b)), torch.autograd.grad(plain, (h, w, b)), strict=True
    ):
        torch.testing.assert_close(mine, reference)


def test_full_softmax_leaves_out_what_is_masked():
    """An id with a masked bias gets no gradient, not even from label smoothing; the others as if it were not there."""
    torch.manual_seed(0)
    h, w, b = (torch.randn(*s, dtype=torch.double, requires_grad=True) for s in ((50, 6), (10, 6), (10,)))
    penalty = torch.zeros(10, dtype=torch.double)
    penalty[9] = -1e9
    target = torch.randint(FIRST_ID, 9, (50,))
    ours = full_softmax(h, w, b + penalty, target, FIRST_ID, 0.1)
    plain = full_softmax(h, w[:9], b[:9], target, FIRST_ID, 0.1)
    torch.testing.assert_close(ours, plain)
    grads = [torch.autograd.grad(x, (h, w, b)) for x in (ours, plain)]
    for mine, reference in zip(*grads, strict=True):
        torch.testing.assert_close(mine, reference)
    assert (grads[0][1][9] == 0).all()


def test_sampled_softmax_equals_cross_entropy_with_its_gradients():
    torch.manual_seed(0)
    h, w, b = (torch.randn(*s, dtype=torch.double, requires_grad=True) for s in ((2500, 6), (30, 6), (30,)))
    target, sample = torch.randint(FIRST_ID, 30, (2500,)), torch.randint(FIRST_ID, 30, (12,))
    log_expected = torch.randn(30, dtype=torch.double)
    ours = sampled_softmax(h, w, b, target, sample, log_expected)
    logits = h @ w.t() + b - log_expected
    negative = logits[:, sample].masked_fill(target[:, None] == sample, float("-inf"))
    both = torch.cat([logits.gather(1, target[:, None]), negative], 1)
    plain = torch.nn.functional.cross_entropy(both, torch.zeros(2500, dtype=torch.long))
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


def test_gbce_by_hand():
    """One position, two negatives of five items: rate 2/4; calibration 1 gives beta = rate."""
    h, w, b = torch.ones(1, 1), torch.tensor([[0.0], [0.0], [0.0], [1.0], [2.0], [-1.0], [0.5], [0.0]]), torch.zeros(8)
    got = gbce(h, w, b, torch.tensor([3]), torch.tensor([4, 5]), 5, calibration=1.0)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    expected = -0.5 * np.log(sigmoid(1.0)) - np.log(1 - sigmoid(2.0)) - np.log(1 - sigmoid(-1.0))
    assert float(got) == pytest.approx(expected, rel=1e-6)
    plain = gbce(h, w, b, torch.tensor([3]), torch.tensor([4, 3]), 5, calibration=0.0)  # an accidental hit is left out
    assert float(plain) == pytest.approx(-np.log(sigmoid(1.0)) - np.log(1 - sigmoid(2.0)), rel=1e-6)
