"""Long histories: attention without masks of their square, windows cut short at random, and the ranker's choice among
older events."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training.compile.onnx_export import RANKING_AXES, export
from training.data.batches import _with_places, kept_length, shortened
from training.learn.objectives import log_expected_counts, retrieval_loss, without_places
from training.models import encoders
from training.models.encoders import BUCKETS, EncoderConfig, TimeBias, time_buckets
from training.models.item_table import ItemTables
from training.models.long import packed as packing
from training.models.long.attention import biased_attention, turned
from training.models.long.packed import SHORT, like_rows, packed
from training.models.ranking import RankerConfig, RankingGraph, RankingModel
from training.models.retrieval import EXCLUDED, RetrievalModel
from training.presets import RetrievalTraining, preset, recorded_fields, with_values
from vivace.contract import FIRST_ID, PADDING_ID
from vivace.onnx_session import open_session

ITEMS, T = 60, 12


def _histories(rows: int = 4, length: int = T) -> torch.Tensor:
    """Whole, padded, of one event, and of none."""
    torch.manual_seed(3)
    history = torch.randint(FIRST_ID, ITEMS, (rows, length))
    history[1, : length // 3] = PADDING_ID
    history[2, :-1] = PADDING_ID
    history[3:] = PADDING_ID
    return history


def test_turned_rows_begin_with_their_events():
    history = _histories()
    rows = turned(history, history != PADDING_ID)
    assert rows[1].tolist() == [*history[1, 4:].tolist(), *[PADDING_ID] * 4]
    assert torch.equal(turned(rows, history != PADDING_ID, back=True), history)


@pytest.mark.parametrize("more", [{}, {"position_bias": "relative"}, {"time_bias": True}], ids=str)
def test_attention_without_a_mask_is_that_with_one(monkeypatch, more):
    torch.manual_seed(5)
    model = RetrievalModel(EncoderConfig(width=16, history=T, dropout=0.0, **more), ITEMS, torch.ones(ITEMS))
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    history = _histories()
    times = torch.arange(T).expand(4, -1) ** 3 * 1000 + 1_700_000_000_000
    encoded = {}
    for limit in (T, 0):  # the form for short ones, then that for long ones
        monkeypatch.setattr(encoders, "LONG", limit)
        model.zero_grad()
        states = model.train().encode(history, times=times)
        (states**2).sum().backward()
        encoded[limit] = states, [p.grad.clone() for p in model.parameters() if p.grad is not None]
        newest = model.eval().encode(history, times=times, newest=3)
        torch.testing.assert_close(newest, states[:, -3:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoded[0][0], encoded[T][0], atol=1e-5, rtol=1e-4)
    for grown, masked in zip(encoded[0][1], encoded[T][1], strict=True):
        torch.testing.assert_close(grown, masked, atol=1e-3, rtol=1e-3)


def test_rows_of_like_length_go_together():
    lengths = torch.tensor([0, 90, 1000, 3, 700, 0, 800, SHORT])
    assert [lengths[rows].tolist() for rows in like_rows(lengths)] == [[1000, 800], [700], [90], [SHORT, 3]]
    assert packed(torch.ones(3, 5, dtype=torch.bool)) is None and packed(torch.zeros(3, 5, dtype=torch.bool)) is None


def test_packed_rows_learn_what_padded_ones_do(monkeypatch):
    """The loss and its gradients, of rows of every group, with and without padding in each layer."""
    torch.manual_seed(8)
    model = RetrievalModel(EncoderConfig(width=16, history=T, dropout=0.0), ITEMS, torch.ones(ITEMS))
    loss = retrieval_loss(model, RetrievalTraining(), log_expected_counts(torch.ones(ITEMS), RetrievalTraining()))
    windows = torch.randint(FIRST_ID, ITEMS, (6, T + 1))
    for row, events in enumerate((T + 1, 9, 8, 4, 2, 0)):
        windows[row, : T + 1 - events] = PADDING_ID
    monkeypatch.setattr(packing, "SHORT", 4)
    assert len(like_rows((windows[:, :-1] != PADDING_ID).sum(1))) == 3
    by_way = {}
    for way, limit, padded in (("masked", T, 0.0), ("turned", 0, 1.0), ("packed", 0, 0.0)):
        monkeypatch.setattr(encoders, "LONG", limit)
        monkeypatch.setattr(packing, "PADDED", padded)
        model.zero_grad()
        value, terms = loss(windows)
        value.backward()
        by_way[way] = value.detach(), terms, [p.grad.clone() for p in model.parameters() if p.grad is not None]
        assert torch.isfinite(value)
    for way in ("masked", "turned"):
        torch.testing.assert_close(by_way["packed"], by_way[way], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*flex_attention.*:UserWarning")
def test_biases_within_the_kernel_are_those_of_a_mask():
    """The form that a GPU takes, by PyTorch's own reference for it."""
    torch.manual_seed(6)
    q, k, v = torch.randn(3, 2, 2, T, 8)
    distance_TA, time = torch.randn(T, 2), TimeBias(2)
    time.bias_RA.data.normal_()
    times = torch.arange(T).expand(2, -1) ** 4 * 1000 + 1_700_000_000_000
    times[1, -2] = 0  # one that is not known
    place = torch.arange(T)
    back_TT = place[:, None] - place[None]
    mask = time(time_buckets(times)) + distance_TA[back_TT.clamp_min(0)].permute(2, 0, 1)
    mask = mask.masked_fill(back_TT < 0, encoders.MASKED)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    with torch.no_grad():
        answer = biased_attention(q, k, v, 0.3, distance_TA, time.bias_RA, times)
    assert len(time.bias_RA) == BUCKETS
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-4)


# -- windows of stochastic length -------------------------------------------------------------------------
def test_a_window_is_cut_to_the_newest_events_and_some_older_ones():
    rng, lengths = np.random.default_rng(0), Counter()
    for _ in range(400):
        places = shortened(np.arange(1001), 1000, 1.6, rng)
        lengths[len(places)] += 1
        assert (np.diff(places) > 0).all() and places[-1] == 1000
        assert len(places) == 1001 or (places[-127:] == np.arange(874, 1001)).all()
    assert set(lengths) == {kept_length(1000, 1.6) + 1, 1001} and kept_length(1000, 1.6) == 251
    assert 0.02 < lengths[1001] / 400 < 0.12  # 1000 ** 1.6 / 1000 ** 2 is .063
    short = np.arange(200)
    assert (shortened(short, 1000, 1.6, rng) == short).all()


def test_an_event_whose_next_one_was_left_out_predicts_nothing():
    window = np.arange(10, 19)
    rows = _with_places(window, np.array([0, 3, 4, 7, 8]))
    events, follows = without_places(torch.from_numpy(rows)[None])
    assert events.tolist() == [[10, 13, 14, 17, 18]] and follows.tolist() == [[False, True, False, True]]


def test_what_is_left_of_a_window_is_learned_as_in_the_whole():
    """With nothing left out the loss is that of the same windows without places."""
    torch.manual_seed(1)
    model = RetrievalModel(EncoderConfig(width=16, history=T, dropout=0.0), ITEMS, torch.ones(ITEMS))
    windows = _histories(3, T + 1)
    places = torch.arange(T + 1).expand(3, -1)
    expected = log_expected_counts(torch.ones(ITEMS), RetrievalTraining())
    plain, counted = retrieval_loss(model, RetrievalTraining(), expected)(windows)
    config = RetrievalTraining(stochastic_length=1.5)
    same, as_many = retrieval_loss(model, config, expected)(torch.stack([windows, places], 2))
    assert counted == as_many
    torch.testing.assert_close(plain, same)


# -- the ranker's choice among older events ---------------------------------------------------------------
def _ranker(to: str, reads: int = 4, count: int = 3) -> tuple[RetrievalModel, RankingModel]:
    torch.manual_seed(2)
    retriever = RetrievalModel(EncoderConfig(width=16, history=T, reads=reads, heads=2), ITEMS, torch.ones(ITEMS))
    tables = ItemTables(
        torch.rand(ITEMS) * 50, torch.randint(FIRST_ID, ITEMS, (ITEMS, 8)), torch.rand(ITEMS, 8),
        torch.zeros(ITEMS, 0).long(), (), torch.zeros(ITEMS, 0),
    )  # fmt: skip
    config = RankerConfig(candidates=10, heads=2, experts=2, expert_width=8, lags=4, followers=8, nearest=count,
                          nearest_to=to)  # fmt: skip
    ranker = RankingModel(config, tables, retriever, ("click", "buy"))
    for p in ranker.parameters():
        p.data += torch.randn_like(p) * 0.2
    return retriever.eval(), ranker.eval()


def _given(retriever: RetrievalModel) -> tuple[torch.Tensor, ...]:
    history = _histories()
    torch.manual_seed(4)
    candidates = torch.stack([torch.randperm(ITEMS - FIRST_ID)[:10] + FIRST_ID for _ in range(4)])
    scores = torch.randn(4, 10).sort(1, descending=True).values
    candidates[2, -3:], scores[2, -3:] = PADDING_ID, EXCLUDED
    with torch.no_grad():
        return history, candidates, scores, retriever.encode(history)


@pytest.mark.parametrize("to", ["candidate", "request"])
def test_older_events_are_chosen_by_their_items(to):
    """Attention with the chosen events alone, one by one, is what the model works out at once."""
    retriever, ranker = _ranker(to)
    history, candidates, _, encoded = _given(retriever)
    candidates[0, :2] = history[0, [3, 1]]  # two that were there
    with torch.no_grad():
        vector, query, item, _, _ = ranker.candidate_parts(candidates)
        there = candidates != PADDING_ID
        read = ranker.keys_and_values(encoded, history)
        answer, (features,) = ranker.attend(vector, query, item, candidates, history, None, *read)
        unit = F.normalize(ranker.item.weight, dim=1)
        for row, place in ((0, 0), (0, 7), (1, 2), (2, 1)):
            older = [i for i in history[row, : T - 4].tolist() if i != PADDING_ID]
            near = {j: float(unit[candidates[row, place]] @ unit[i]) for j, i in enumerate(older)}
            to_any = {j: float((unit[candidates[row][there[row]]] @ unit[i]).max()) for j, i in enumerate(older)}
            by = near if to == "candidate" else to_any
            chosen = sorted(sorted(by, key=by.get, reverse=True)[:3])
            both = ranker.nearest.key_value(ranker.item(torch.tensor([older[j] for j in chosen], dtype=torch.long)))
            age = torch.tensor([len(older) - j for j in chosen]).float()
            both = both + ranker.nearest.age(torch.log2(age).long())
            real = history[row, -4:] != PADDING_ID
            key, value = ranker.keys_and_values(encoded[row : row + 1], history[row : row + 1, -4:])
            keys, values = (torch.cat([x[0][real], y]) for x, y in ((key, both[:, :16]), (value, both[:, 16:])))
            heads = [
                torch.softmax(query[row, place, s] @ keys[:, s].T / 8**0.5, 0) @ values[:, s]
                for s in (slice(0, 8), slice(8, 16))
            ]
            expected = ranker.norm_out(vector[row, place] + ranker.out(torch.cat(heads)))
            torch.testing.assert_close(answer[row, place], expected, atol=1e-4, rtol=1e-4)
            if chosen:
                assert float(features[row, place, 0]) == pytest.approx(max(near[j] for j in chosen), abs=1e-4)
                again = sum(older[j] == int(candidates[row, place]) for j in chosen)
                assert float(features[row, place, 1]) == pytest.approx(np.log1p(again), abs=1e-6)


@pytest.mark.parametrize("to", ["candidate", "request"])
def test_exported_it_answers_the_same(to, tmp_path):
    retriever, ranker = _ranker(to)
    given = _given(retriever)
    graph = RankingGraph(ranker, folded=True)
    names = ["HISTORY_IDS", "CANDIDATE_IDS", "CANDIDATE_SCORES", "ENCODED_HISTORY"]
    export(graph, given, names, ["RANKED_IDS", "RANKED_VALUES"], tmp_path / "ranking.onnx", RANKING_AXES)
    session = open_session(tmp_path / "ranking.onnx")
    with torch.no_grad():
        ids, values = RankingGraph(ranker)(*given)
    for t in (T, 3, 5):  # a server cuts short histories; with 3 nothing is older
        short = (given[0][:, -t:], *given[1:3], given[3][:, -t:])
        with torch.no_grad():
            ids, values = RankingGraph(ranker)(*short)
        answer = session.run(None, {n: x.contiguous().numpy() for n, x in zip(names, short, strict=True)})
        there = ids.numpy() != PADDING_ID
        assert (answer[0] == ids.numpy())[there].all()
        np.testing.assert_allclose(answer[1][:, 0][there], values[:, 0].numpy()[there], atol=2e-4)
    order = torch.randperm(10)
    with torch.no_grad():
        again = ranker(given[0], given[1][:, order], given[2][:, order], given[3])
        torch.testing.assert_close(again, ranker(*given)[:, order], atol=1e-4, rtol=1e-4)


def test_the_encoder_reads_the_newest_events_alone():
    retriever, _ = _ranker("candidate")
    history = _histories()
    other = torch.where(torch.arange(T) < T - 4, FIRST_ID + 1, history)
    with torch.no_grad():
        assert torch.equal(retriever.encode(history), retriever.encode(history[:, -4:]))
        assert torch.equal(retriever.encode(history)[0], retriever.encode(other)[0])


def test_choosing_needs_older_events():
    base = preset("tiny")
    with pytest.raises(ValueError, match=r"set encoder\.reads"):
        with_values(base, {"ranker.nearest": 4})
    with pytest.raises(ValueError, match=r"at most the 8 events read"):
        with_values(base, {"encoder.reads": 8, "ranker.memory": 10})
    with pytest.raises(ValueError, match=r"leaves the older of 20 events to ranker\.nearest, which is 0"):
        with_values(base, {"encoder.reads": 8})
    assert with_values(base, {"encoder.reads": 8, "ranker.nearest": 4}).encoder.span == 8
    assert with_values(base, {"ranker.nearest": 4, "encoder.reads": 8}).ranker.nearest == 4
    with pytest.raises(ValueError, match=r"EncoderConfig\.reads"):
        EncoderConfig(history=20, reads=30)
    assert "reads" not in recorded_fields(base.encoder) and "nearest" not in recorded_fields(base.ranker)
