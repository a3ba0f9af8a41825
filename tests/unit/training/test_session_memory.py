"""The session memory, worked out by hand; in the retriever, in its ONNX graph, and in a short training."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
import torch

from preprocessing.features import Features
from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers import open_source
from preprocessing.splits import SplitConfig
from training.checkpoints import load_retrieval
from training.compile.onnx_export import export
from training.learn.memory import remember, session_sets
from training.learn.retriever import train_retrieval
from training.models.encoders import EncoderConfig
from training.models.retrieval import EXCLUDED, RetrievalGraph, RetrievalModel
from training.models.session_memory import LONGEST, LinearMemory, SessionMemory, linear_weights, neighbour_shares
from training.presets import tiny, with_values
from vivace.contract import FIRST_ID, ITEM, PADDING_ID
from vivace.onnx_session import open_session

A, B, C, D = range(FIRST_ID, FIRST_ID + 4)
ITEMS = FIRST_ID + 4
SESSIONS = [[A, B, A], [A, B, C], [B, C], [D]]


def sets_file(folder, sessions=SESSIONS):
    pq.write_table(pa.table({ITEM: pa.array(sessions, pa.list_(pa.int64()))}), folder / "part.parquet")
    return folder / "part.parquet"


def sets(folder, sessions=SESSIONS):
    return session_sets([sets_file(folder, sessions)], ITEMS)


def test_the_table_holds_shares_of_the_sessions_with_an_item(tmp_path):
    ids, shares = neighbour_shares(sets(tmp_path), 2)
    assert ids[[A, B, C, D]].tolist() == [[B, C], [A, C], [B, A], [PADDING_ID, PADDING_ID]]
    # A is in two sessions, B in both, C in one; B in three, A and C in two each; C in two, B in both, A in one
    np.testing.assert_allclose(shares[[A, B, C, D]], [[1, 1 / 2], [2 / 3, 2 / 3], [1, 1 / 2], [0, 0]])
    assert not ids[:FIRST_ID].any() and not shares[:FIRST_ID].any()


def test_only_the_newest_events_of_a_long_session_count(tmp_path):
    found = sets(tmp_path, [[D, *[A] * LONGEST], [A, B]])
    assert found.toarray()[:, [A, B, D]].tolist() == [[1, 0, 0], [1, 1, 0]]


def memory_of(folder) -> SessionMemory:
    memory = SessionMemory(ITEMS, 2, 3)
    memory.remember(*neighbour_shares(sets(folder), 2))
    values = {"own": 0.5, "weight": 2.0, "floor": math.log(0.1), "decay": 0.0}  # a weight of 1/2 a lag
    values |= {"seen": 3.0, "seen_weight": 1.0, "seen_length": -1.0}
    for name, value in values.items():
        getattr(memory, name).data.fill_(value)
    memory.again_T.data.copy_(torch.tensor([0.25, 0.5, 1.0]))
    return memory


def test_the_score_of_each_item(tmp_path):
    # history B, A: B weighs 1/2, A 1. Near: A 1/2 x 2/3, B 1 x 1, C 1/2 x 2/3 + 1 x 1/2
    near = {A: 1 / 3, B: 1.0, C: 1 / 3 + 1 / 2, D: 0.0}
    log = {item: math.log(value + 0.1) for item, value in near.items()}
    expected = {item: 0.5 * item + 2 * log[item] for item in near}
    for item, again in ((B, 0.5), (A, 1.0)):
        expected[item] += again + 3 + log[item] - math.log(2)
    scores_BV = torch.arange(ITEMS).float()[None]
    out = memory_of(tmp_path)(scores_BV, torch.tensor([[PADDING_ID, B, A]]))[0]
    np.testing.assert_allclose(out[FIRST_ID:], [expected[i] for i in (A, B, C, D)], rtol=1e-5)


def test_an_item_that_came_twice_counts_by_place_and_is_seen_once(tmp_path):
    # history A, B, A: weights 1/4, 1/2, 1
    near = {A: 1 / 2 * 2 / 3, B: 1 / 4 + 1, C: 1 / 4 * 1 / 2 + 1 / 2 * 2 / 3 + 1 / 2, D: 0.0}
    log = {item: math.log(value + 0.1) for item, value in near.items()}
    expected = {item: 2 * log[item] for item in near}
    for item, again in ((A, 0.25 + 1.0), (B, 0.5)):
        expected[item] += again + 3 + log[item] - math.log(3)
    out = memory_of(tmp_path)(torch.zeros(1, ITEMS), torch.tensor([[A, B, A]]))[0]
    np.testing.assert_allclose(out[FIRST_ID:], [expected[i] for i in (A, B, C, D)], rtol=1e-5)


def test_padding_changes_nothing_and_a_batch_answers_as_each_alone(tmp_path):
    memory = memory_of(tmp_path)
    scores_BV = torch.randn(3, ITEMS)
    rows = torch.tensor([[PADDING_ID, PADDING_ID, C], [PADDING_ID, A, A], [1, 2, D]])
    whole = memory(scores_BV, rows)[:, FIRST_ID:]
    torch.testing.assert_close(memory(scores_BV[:1], rows[:1, 2:])[:, FIRST_ID:], whole[:1])
    for i in range(3):
        torch.testing.assert_close(memory(scores_BV[i : i + 1], rows[i : i + 1])[:, FIRST_ID:], whole[i : i + 1])


@pytest.mark.parametrize("by", ["sessions", "linear"])
def test_the_graph_answers_as_the_model_for_any_length_of_history(tmp_path, by):
    config = EncoderConfig(width=8, layers=1, heads=2, history=5, neighbours=2, neighbours_by=by)
    torch.manual_seed(0)
    model = RetrievalModel(config, ITEMS, torch.ones(ITEMS)).eval()
    remember(model, [sets_file(tmp_path)])
    graph, exclude = RetrievalGraph(model, 4), torch.zeros(2, ITEMS, dtype=torch.bool)
    history = torch.tensor([[0, 0, A, B, A], [0, 0, 0, 0, D]])
    names = ["HISTORY_IDS", "EXCLUDE"], ["IDS", "SCORES", "ENCODED"]
    export(graph, (history, exclude), *names, tmp_path / "g.onnx", {"HISTORY_IDS": (1, "t"), "ENCODED": (1, "e")})
    for length in (5, 3):
        part = history[:, -length:]
        ids, scores, _ = open_session(tmp_path / "g.onnx").run(
            names[1], {"HISTORY_IDS": part.numpy(), "EXCLUDE": exclude.numpy()}
        )
        expected_ids, expected_scores, _ = graph(part, exclude)
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_allclose(scores, expected_scores.detach(), rtol=1e-5, atol=1e-5)


def ease(x_SV: np.ndarray, ridge: float) -> np.ndarray:
    """The weights by the book (Steck 2019, algorithm 1), with one inverse of all items."""
    p = np.linalg.inv(x_SV.T @ x_SV + ridge * np.eye(x_SV.shape[1]))
    b = -p / np.diag(p)
    np.fill_diagonal(b, 0.0)
    return b


@pytest.mark.parametrize("sessions", [3, 60], ids=["fewer sessions than items", "fewer items than sessions"])
def test_linear_weights_are_those_of_the_closed_form(sessions):
    rng = np.random.default_rng(2)
    x_SV = (rng.random((sessions, 12)) < 0.4).astype(np.float32)
    x_SV[:, 5] = 0  # an item that nobody had
    x_SV[:, :FIRST_ID] = 0
    ids, weights = linear_weights(sp.csr_matrix(x_SV), 4, 2.0)
    expected = ease(x_SV.astype(np.float64), 2.0)
    for item in range(FIRST_ID, 12):
        best = np.sort(expected[item])[::-1][:4].clip(0)
        np.testing.assert_allclose(weights[item], best, atol=1e-6)
        kept = ids[item] != PADDING_ID
        np.testing.assert_allclose(expected[item][ids[item][kept]], weights[item][kept], atol=1e-6)
    assert not weights[5].any() and not (ids == 5).any()


def test_a_linear_memory_reads_how_often_and_how_long_ago(tmp_path):
    memory = LinearMemory(ITEMS, 2, 4)
    memory.remember(*linear_weights(sets(tmp_path), 2, 1.0))
    values = {"own": 0.5, "weight": 0.0, "seen": 3.0, "seen_length": -1.0, "seen_weight": 0.0}
    for name, value in (values | {"seen_lag": 0.25, "seen_count": 2.0}).items():
        getattr(memory, name).data.fill_(value)
    scores_BV = torch.arange(ITEMS).float()[None]
    out = memory(scores_BV, torch.tensor([[PADDING_ID, A, B, A]]))[0] - 0.5 * scores_BV[0]
    # three events: A twice, its newest is the last one; B once, one event ago
    expected = [3 - math.log(3) + 2 * math.log(2), 3 - math.log(3) + 0.25 * math.log(2), 0.0, 0.0]
    np.testing.assert_allclose(out[[A, B, C, D]], expected, atol=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Sessions of pairs that follow one another, where each second event is the first one again."""
    folder = tmp_path_factory.mktemp("sessions")
    rng = np.random.default_rng(5)
    lines = [f"i{a} i{a} i{a ^ 1}" for a in rng.integers(0, 40, 900)]
    (folder / "train_sessions.txt").write_text("\n".join(lines) + "\n")
    source = open_source("sessions", folder)
    config = PrepareConfig(split=SplitConfig("sessions"), partitions=2)
    prepare(source, config, folder / "run", 0, lambda _: None)
    preset = with_values(tiny(), {"encoder.neighbours": 4})
    features = Features(folder / "run" / "features")
    return features, preset, folder / "run", train_retrieval(features, preset, folder / "run", 3, lambda _: None, True)


def test_training_fits_the_memory_on_validation_requests_and_saves_it(trained):
    features, preset, root, manifest = trained
    fitted = manifest["results"]["memory"]
    assert fitted["last"] < 0.9 * fitted["first"]
    model = load_retrieval(features, preset, root)
    assert model.memory is not None and model.remembers and model.memory.neighbour_shares_VK.any()
    assert not any(p.requires_grad for p in model.memory.parameters())


def test_items_of_the_session_and_its_neighbours_come_first(trained):
    features, preset, root, _ = trained
    model, names = load_retrieval(features, preset, root), features.items()[ITEM].tolist()
    one, two = names.index("i6") + FIRST_ID, names.index("i7") + FIRST_ID
    history, none = torch.tensor([[one]]), torch.zeros(1, len(model.bias), dtype=torch.bool)
    with torch.no_grad():
        scores = model.scores(history, model.encode(history), none)[0]
    assert set(scores.topk(2).indices.tolist()) == {one, two}
    assert (scores[:FIRST_ID] == EXCLUDED).all()
