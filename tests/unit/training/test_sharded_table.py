"""A sharded item table in a group of one: what it fetches, learns and scores is what plain tensors say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("torchrec", reason="pip install --no-deps -r requirements-sharded.txt")

from training.distributed import ALONE
from training.losses import sampled_softmax
from training.metrics import ALL_ITEMS, MISS, place, ranks
from training.models.retrieval import EXCLUDED, MASKED
from training.presets import beauty, session, shop, tiny, with_values
from training.sharded.config import TableSharding
from training.sharded.objective import Negatives, sharded_loss, sharded_scores
from training.sharded.retriever import dense_retriever, for_sharding, process_group, whole_retriever
from training.sharded.table import ROWS, ShardedItems, read_whole
from vivace.contract import FIRST_ID

ITEMS, WIDTH, RATE, EPS = 90, 16, 0.1, 1e-8
SAMPLED = with_values(tiny(), {"encoder.dropout": 0.0, "retrieval.loss": "sampled", "retrieval.negatives": 12})


@pytest.fixture(scope="module", autouse=True)
def group():
    with process_group():
        yield


@pytest.fixture
def items() -> ShardedItems:
    items = ShardedItems(ITEMS, WIDTH, TableSharding(learning_rate=RATE, processes=1), ALONE)
    items.start(5, biases=torch.linspace(-1, 1, ITEMS))
    return items


def _table(items: ShardedItems) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        rows, biases = items(torch.arange(ITEMS))
    return rows.clone(), biases.clone()


def test_a_step_is_row_wise_adagrad_of_the_whole_tables_gradient(items):
    counts = np.r_[np.zeros(FIRST_ID), np.arange(ITEMS - FIRST_ID) % 4].astype(float)
    negatives, model = Negatives(counts, SAMPLED.retrieval, seed=1), dense_retriever(SAMPLED)
    loss = sharded_loss(model, items, SAMPLED.retrieval, negatives)
    tables = [t.requires_grad_() for t in _table(items)]
    sums = [torch.zeros(ITEMS), torch.zeros(ITEMS)]
    unseen = torch.where(torch.from_numpy(counts) > 0, 0.0, MASKED).float()
    unseen[:FIRST_ID] = 0
    for step in range(3):
        negatives.step = step
        window = torch.randint(FIRST_ID, ITEMS, (6, 9), generator=torch.Generator().manual_seed(step))
        window[0, :4] = 0
        value, count = loss(window)
        inputs, targets = window[:, :-1], window[:, 1:]
        keep = inputs != 0
        states = model.encode(inputs, tables[0])[keep]
        arguments = states, tables[0], tables[1] + unseen, targets[keep], negatives.draw(), negatives.log_V
        reference = sampled_softmax(*arguments)
        assert int(count) == int(keep.sum())
        torch.testing.assert_close(value, reference)
        gradients = torch.autograd.grad(reference, tables)
        value.backward()
        for table, total, gradient in zip(tables, sums, gradients, strict=True):
            # FBGEMM's rows of a bias have four numbers, of which three get no gradient
            total += gradient.square().mean(1) if gradient.dim() == 2 else gradient.square() / 4
            scale = (total.sqrt() + EPS).unsqueeze(-1) if gradient.dim() == 2 else total.sqrt() + EPS
            table.data -= RATE * gradient / scale
        for held, table in zip(_table(items), tables, strict=True):
            torch.testing.assert_close(held, table.detach(), atol=2e-5, rtol=1e-4)


def test_no_more_than_the_rows_of_a_step_change(items):
    before = _table(items)[0]
    items.rate(0.5)
    rows, _ = items(torch.tensor([4, 7, 80]))
    torch.testing.assert_close(rows, before[[4, 7, 80]])
    rows.sum().backward()
    moved = (before - _table(items)[0]).amax(1)
    assert moved.nonzero()[:, 0].tolist() == [4, 7, 80]
    torch.testing.assert_close(moved[4], torch.tensor(0.5 * RATE))  # Adagrad's first step is the rate


def test_scores_are_those_of_the_whole_table(items):
    table, biases = _table(items)
    for _, rows in items.local(ROWS):
        rows[30:60] = rows[30].clone()  # ties
    table[30:60] = table[30].clone()
    states = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(3))
    target = torch.arange(2, 22) * 4
    target[3] = 1  # out of the vocabulary
    excluded = [np.array([5, 9, 70]), *[np.array([], np.int64)] * 18, np.array([84, 2])]  # the last one's target too
    score, log, above, equal = sharded_scores(items, states, target, excluded)
    scores = states @ table.t() + biases
    scores[:, :FIRST_ID] = EXCLUDED
    for row, ids in enumerate(excluded):
        scores[row, ids] = EXCLUDED
    dead = score <= EXCLUDED / 2
    assert dead.nonzero()[:, 0].tolist() == [3, 19]
    losses = F.cross_entropy(scores, target, reduction="none")
    torch.testing.assert_close((log - score)[~dead], losses[~dead], atol=1e-5, rtol=1e-5)
    number = torch.arange(20)
    ours = torch.where(dead, MISS, place(above, equal, number, ALL_ITEMS))
    assert ours.tolist() == ranks(scores, target, number).tolist()


def test_a_saved_table_comes_back_with_its_optimizer_and_is_a_whole_models(items, tmp_path):
    for _ in range(2):
        items(torch.arange(ITEMS))[0].square().sum().backward()
    items.save(tmp_path / "saved")
    before = _table(items)
    items(torch.arange(ITEMS))[0].square().sum().backward()
    after = _table(items)[0]
    other = ShardedItems(ITEMS, WIDTH, TableSharding(learning_rate=RATE, processes=1), ALONE)
    other.load(tmp_path / "saved")
    torch.testing.assert_close(_table(other), before, atol=0, rtol=0)
    other(torch.arange(ITEMS))[0].square().sum().backward()
    torch.testing.assert_close(_table(other)[0], after, atol=0, rtol=0)
    rows, biases = read_whole(tmp_path / "saved", ITEMS, WIDTH, tmp_path / "whole")
    whole = whole_retriever(dense_retriever(SAMPLED), rows, biases[:, 0].clone(), np.ones(ITEMS)).eval()
    history = torch.tensor([[0, 4, 9], [7, 8, 60]])
    logits = whole.logits(whole.encode(history)[:, -1])
    torch.testing.assert_close(logits, whole.encode(history, before[0])[:, -1] @ before[0].t() + before[1])


def test_negatives_follow_popularity_and_the_step_alone():
    counts = np.r_[np.zeros(FIRST_ID), 1.0 + np.arange(ITEMS - FIRST_ID)]
    config = replace(SAMPLED.retrieval, negatives=60_000, negative_power=1.0)
    drawn = Negatives(counts, config, seed=2)
    first = drawn.draw()
    assert torch.equal(first, Negatives(counts, config, seed=2).draw())
    drawn.step = 1
    assert not torch.equal(first, drawn.draw())
    assert int(first.min()) >= FIRST_ID
    expected = drawn.log_V.exp()[FIRST_ID:]
    observed = torch.bincount(first, minlength=ITEMS)[FIRST_ID:]
    assert ((observed - expected).abs() < 5 * expected.sqrt() + 1).all()


@pytest.mark.parametrize(
    ("preset", "reason"),
    [
        (shop(), "--loss sampled"),
        (with_values(beauty(), {"retrieval.loss": "gbce", "retrieval.label_smoothing": 0.0}), "encoder.text_tokens"),
        (session(), "encoder.neighbours"),
        (with_values(SAMPLED, {"encoder.width": 18}), "multiple of 4"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_what_to_set(preset, reason):
    with pytest.raises(ValueError, match=reason):
        for_sharding(preset)
