"""Candidates from a FAISS index: what it finds on odd catalogues, what it may not answer, and when it is refused."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from serving.runtime.item_index import DISTANCES, FACTORY, GROUPS, INDEX, PRODUCTS, Groups, ItemIndex
from training.compile.compiler import CompileConfig
from training.compile.index import ITEM_RECALL, RECALL, Exact, Probe, item_states, tune, tuned_index
from training.judge.gate import GateError
from vivace import contract
from vivace.contract import FIRST_ID
from vivace.masks import seen_ids
from vivace.store.retention import MAX_STORED_EVENTS

WIDTH, COUNT = 32, 50


def catalogue(items: int, seed: int = 0) -> np.ndarray:
    """float32 [FIRST_ID + items, WIDTH]."""
    return np.random.default_rng(seed).normal(size=(FIRST_ID + items, WIDTH)).astype(np.float32)


def no_bias(table: np.ndarray) -> np.ndarray:
    return np.zeros(len(table), np.float32)


def states(count: int = 100, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


def probes(table: np.ndarray) -> list[Probe]:
    asked = states()
    return [Probe("states", asked, RECALL), Probe("items", item_states(table, asked, 100), ITEM_RECALL)]


def test_inner_product_and_bias_by_hand():
    table = np.array([[9, 9], [9, 9], [9, 9], [1, 0], [0, 1], [1, 1], [-1, 0]], np.float32)  # ids 0 to 2 are special
    index = ItemIndex.build(table, np.array([9, 9, 9, 0, 0.5, 0, 3], np.float32))
    ids, scores = index.search(np.array([[2, 1]], np.float32), 4)
    assert ids.tolist() == [[5, 3, 4, 6]] and scores.tolist() == [[3, 2, 1.5, 1]]
    ids, scores = index.search(np.array([[2, 1], [2, 1]], np.float32), 4, [np.array([5, 4]), np.array([], np.int64)])
    assert ids.tolist() == [[3, 6, 0, 0], [5, 3, 4, 6]] and scores[0, 2] < -1e29


def test_recall_by_hand_counts_ties_as_equal():
    table = np.array([[0], [0], [0], [4], [3], [3], [1]], np.float32)
    exact, asked = Exact(table, no_bias(table)), np.ones((1, 1), np.float32)
    least = exact.least(asked, 2)
    assert least.tolist() == [3]
    got = {(3, 4): 1.0, (3, 5): 1.0, (4, 5): 1.0, (3, 6): 0.5, (3, 3): 0.5, (3, 0): 0.5, (0, 0): 0.0}
    for ids, share in got.items():
        assert exact.recall(asked, least, np.array([ids])) == share


def test_groups_by_hand():
    rows = np.array([[1, 0], [2, 0], [1, 0], [3, 0], [2, 0], [1, 0]], np.float32)
    groups, first = Groups.of(rows)
    assert groups.ids.tolist() == [3, 5, 8, 4, 7, 6] and groups.starts.tolist() == [0, 3, 5, 6]
    assert first.tolist() == [0, 1, 3] and not groups.all_single and Groups.single(4).all_single
    ids, scores = groups.expand(np.array([2, 0, 1]), np.array([9.0, 8.0, 7.0]), 5)
    assert ids.tolist() == [6, 3, 5, 8, 4] and scores.tolist() == [9, 8, 8, 8, 7]
    assert groups.expand(np.array([0]), np.array([1.0]), 2)[0].tolist() == [3, 5]
    assert groups.expand(np.array([], np.int64), np.array([]), 2)[0].tolist() == []


def same_vector(table: np.ndarray) -> None:
    table[FIRST_ID : FIRST_ID + 4000] = table[FIRST_ID]


def same_vectors_of_five_kinds(table: np.ndarray) -> None:
    table[FIRST_ID : FIRST_ID + 4000] = np.repeat(table[FIRST_ID : FIRST_ID + 5], 800, 0)


def zero_vectors(table: np.ndarray) -> None:
    table[FIRST_ID + 1000 :] = 0
    table[FIRST_ID + 1000 :: 2] = -0.0


def short_vectors(table: np.ndarray) -> None:
    table[FIRST_ID : FIRST_ID + 2500] *= 1e-4


def pairs(table: np.ndarray) -> None:
    table[FIRST_ID + 2500 :] = table[FIRST_ID : FIRST_ID + 2500]


def rows_of_all_lengths(table: np.ndarray) -> None:
    """As trained models have them: popular items are long, and most of a graph's edges would lead to them."""
    table *= np.geomspace(5.0, 0.5, len(table), dtype=np.float32)[:, None]


@pytest.mark.parametrize(
    "spoil", [rows_of_all_lengths, same_vector, same_vectors_of_five_kinds, zero_vectors, short_vectors, pairs]
)
def test_an_odd_catalogue_loses_nothing(spoil):
    """Of 5,000 items most share vectors or have none worth the name."""
    table = catalogue(5000)
    spoil(table)
    exact = Exact(table, no_bias(table))
    index, _ = tuned_index(table, no_bias(table), FACTORY, exact, probes(table), COUNT)
    for probe in probes(table):
        ids, scores = index.search(probe.states_BD, COUNT)
        assert (ids >= FIRST_ID).all() and all(len(set(row)) == COUNT for row in ids.tolist())
        assert exact.recall(probe.states_BD, exact.least(probe.states_BD, COUNT), ids) >= probe.recall
        by_hand = np.einsum("bd,bnd->bn", probe.states_BD, table[ids])
        np.testing.assert_allclose(scores, by_hand, rtol=1e-4, atol=1e-4)


def test_almost_equal_vectors_are_found_or_the_index_is_refused():
    table = catalogue(5000)
    noise = np.random.default_rng(3).normal(size=(4000, WIDTH)).astype(np.float32) * 1e-3
    table[FIRST_ID : FIRST_ID + 4000] = table[FIRST_ID] + noise
    exact = Exact(table, no_bias(table))
    try:
        index, _ = tuned_index(table, no_bias(table), FACTORY, exact, probes(table), COUNT)
    except GateError as error:
        assert "not published: for " in str(error)
        return
    for probe in probes(table):
        ids = index.search(probe.states_BD, COUNT)[0]
        assert exact.recall(probe.states_BD, exact.least(probe.states_BD, COUNT), ids) >= probe.recall


@pytest.mark.parametrize("by", [PRODUCTS, DISTANCES])
def test_both_graphs_answer_the_same_scores(by):
    table, asked = catalogue(500), states(20)
    table *= np.geomspace(5.0, 0.5, len(table), dtype=np.float32)[:, None]
    bias = np.random.default_rng(2).normal(size=len(table)).astype(np.float32)
    index, exact = ItemIndex.build(table, bias, by=by), Exact(table, bias)
    index.effort = 500
    ids, scores = index.search(asked, COUNT)
    assert exact.recall(asked, exact.least(asked, COUNT), ids) > 0.99 and (np.diff(scores, axis=1) <= 0).all()
    np.testing.assert_allclose(scores, np.einsum("bd,bnd->bn", asked, table[ids]) + bias[ids], rtol=1e-4, atol=1e-4)


def test_a_graph_of_distances_takes_over_where_products_lead_to_long_rows_alone(monkeypatch):
    table = catalogue(3000)
    exact = Exact(table, no_bias(table))
    build = ItemIndex.build

    def crippled(*given, by: str, **named) -> ItemIndex:
        other = catalogue(3000, seed=9)
        return build(*((other, *given[1:]) if by == PRODUCTS else given), by=by, **named)

    monkeypatch.setattr(ItemIndex, "build", crippled)
    index, tuned = tuned_index(table, no_bias(table), FACTORY, exact, probes(table), 20)
    assert index.index.metric_type == faiss.METRIC_L2 and tuned.recall >= ITEM_RECALL


def test_an_index_that_finds_too_little_is_refused():
    table, other = catalogue(4000), catalogue(4000, seed=9)
    index = ItemIndex.build(table, no_bias(table))
    tuned = tune(index, Exact(table, no_bias(table)), probes(table), 20)
    assert tuned.recall >= ITEM_RECALL and tuned.effort == index.effort == max(tuned.tried)
    with pytest.raises(GateError, match=r"not published: for (states|items) it finds 0\.\d+ of the exact"):
        tune(index, Exact(other, no_bias(other)), probes(table), 20)


@pytest.mark.parametrize("seen_count", [3_000, 4_096, 4_900])
@pytest.mark.parametrize("spoil", [lambda table: None, same_vector])
def test_of_thousands_of_seen_items_none_comes_back(seen_count, spoil):
    """The seen ones are the best: those that a search finds first."""
    table = catalogue(5000)
    spoil(table)
    asked = states(4)
    order = FIRST_ID + np.argsort(-asked @ table[FIRST_ID:].T, axis=1, kind="stable")
    seen = [order[0, :seen_count], order[1, :7], np.array([], np.int64), order[3, :seen_count]]
    index = ItemIndex.build(table, no_bias(table))
    index.effort = 400
    ids, _ = index.search(asked, COUNT, seen)
    for row, unwanted in zip(ids, seen, strict=True):
        assert (row >= FIRST_ID).all() and not np.isin(row, unwanted).any() and len(set(row.tolist())) == COUNT


def test_an_index_is_saved_whole_and_an_old_one_is_read(tmp_path):
    table = catalogue(300)
    table[FIRST_ID + 100 : FIRST_ID + 200] = table[FIRST_ID]
    index = ItemIndex.build(table, no_bias(table))
    index.effort = 77
    index.save(tmp_path)
    again, asked = ItemIndex.load(tmp_path), states(5)
    assert again.effort == 77 and again.search(asked, 30)[0].tolist() == index.search(asked, 30)[0].tolist()
    plain = catalogue(300)
    ItemIndex.build(plain, no_bias(plain)).save(tmp_path)
    expected = ItemIndex.load(tmp_path).search(asked, 30)[0]
    (tmp_path / GROUPS).unlink()
    assert ItemIndex.load(tmp_path).search(asked, 30)[0].tolist() == expected.tolist()
    (tmp_path / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match="vivace compile --index"):
        ItemIndex.load(tmp_path)


def test_seen_ids_by_hand():
    by_row = seen_ids([np.array([5, 7, 5, 9]), np.arange(3, 6003)], contract.MAX_SEEN)
    assert by_row[0, -3:].tolist() == [7, 5, 9] and not by_row[0, :-3].any()
    assert by_row[1].tolist() == list(range(6003 - contract.MAX_SEEN, 6003))


def test_an_index_leaves_out_as_many_items_as_a_store_keeps():
    assert contract.MAX_SEEN >= MAX_STORED_EVENTS


def test_shards_go_with_exact_graphs_alone():
    assert CompileConfig(shards=2).exact
    for more in ({"index": "HNSW32"}, {"precision": "int8"}, {"tables": "int8"}, {"targets": ("tensorrt",)}):
        with pytest.raises(ValueError, match="--shards"):
            CompileConfig(shards=2, **more)
    with pytest.raises(ValueError, match="--shards"):
        CompileConfig(shards=-1)
