"""Histories that grow, encoded from where they were left, answer as encoded whole."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from serving.runtime import by_length, state_cache
from serving.runtime.cache_settings import StateSettings
from serving.runtime.grown import GROWN, HIT, MISSED, GrownRetrieval
from serving.runtime.state_cache import BLOCK, MOST_NEW, StateMemory, keys_of
from training.compile import onnx_export
from training.compile.onnx_export import check_steps, export, export_steps, names_of
from training.models.encoders import BUCKETS, EncoderConfig, RelativeBias
from training.models.long.attention import distance_buckets
from training.models.retrieval import EncoderStep, RetrievalGraph, RetrievalModel, states_of_event
from training.presets import recorded_fields
from vivace import contract, windows
from vivace.context import ContextColumns
from vivace.onnx_session import open_session

ITEMS, LENGTH, CANDIDATES, TYPES = 203, 40, 100, 5
ENCODINGS, SCORES = 1e-5, 1e-5  # absolute, float32: sums in another order
USERS, ROUNDS, MOST = 12, 25, 5


def _model(config: EncoderConfig, columns: ContextColumns) -> RetrievalModel:
    torch.manual_seed(7)
    model = RetrievalModel(config, ITEMS, torch.rand(ITEMS) * 50, columns=columns).eval()
    with torch.no_grad():  # what is zero before training would hide a mistake
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.05
    return model


CASES = {
    "sasrec": (EncoderConfig(position_bias="relative"), {}),
    "sasrec, times, types and context": (EncoderConfig(position_bias="relative", time_bias=True), {"context": 1}),
    "hstu": (EncoderConfig(family="hstu"), {}),
    "hstu, times and types, part handed on": (EncoderConfig(family="hstu", time_bias=True), {"memory": 16}),
}


@pytest.fixture(scope="module", params=list(CASES))
def compiled(request, tmp_path_factory) -> tuple[contract.StageTensors, Path]:
    """(shapes, folder) of both forms of a retriever with random weights."""
    given, more = CASES[request.param]
    config = EncoderConfig(
        width=16, heads=2, history=LENGTH, positions="none", slide=6, family=given.family,
        position_bias=given.position_bias, time_bias=given.time_bias, types=given.time_bias,
    )  # fmt: skip
    reads = ("device",) if more.get("context") else ()
    columns = ContextColumns(
        types=TYPES if config.types else 0, categoricals=reads, sizes=(9,) * len(reads)
    )  # fmt: skip
    s = contract.StageTensors(
        LENGTH, CANDIDATES, ITEMS, 16, config.time_bias, more.get("memory", 0), types=bool(columns.types),
        context=len(reads),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("grown")
    model = _model(config, columns)
    example = tuple(torch.from_numpy(x) for x in _inputs(s, _users(2), np.random.default_rng(0)))
    inputs, outputs = contract.retrieval_inputs(s), contract.retrieval_outputs(s)
    graph = RetrievalGraph(model, CANDIDATES, s.memory)
    export(graph, example, names_of(inputs), names_of(outputs), folder / "retrieval.onnx")
    export_steps(model, s, example, folder)
    return s, folder


def _users(count: int) -> list[np.ndarray]:
    """Events (id, time, type) int64 [n, 3] of users with longer and shorter histories than are read."""
    rng = np.random.default_rng(3)
    return [_events(rng, int(n)) for n in rng.integers(0, 2 * LENGTH, count)]


def _events(rng: np.random.Generator, count: int) -> np.ndarray:
    unknown = rng.random(count) < 0.05
    ids = np.where(unknown, contract.OOV_ID, rng.integers(contract.FIRST_ID, ITEMS, count))
    times = np.where(rng.random(count) < 0.1, 0, rng.integers(10**12, 2 * 10**12, count))
    return np.stack([ids, times, rng.integers(1, TYPES, count)], 1)


def _inputs(s: contract.StageTensors, users: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """Inputs of retrieval, cut as a server cuts them."""
    events_BTE = np.zeros((len(users), LENGTH, 3), np.int64)
    for row, events in zip(events_BTE, users, strict=True):
        n = windows.newest(events[:, 0], LENGTH, 6)
        row[LENGTH - n :] = events[len(events) - n :]
    ids, times, types = (np.ascontiguousarray(events_BTE[:, :, i]) for i in range(3))
    exclude = rng.random((len(users), ITEMS)) < 0.1
    context = [rng.integers(1, 9, (len(users), 1))] if s.context else []
    return [ids, exclude, *([times] if s.timed else []), *([types] if s.types else []), *context]


def test_long_histories_are_recorded_by_a_part_compared_whole_and_read_a_few_at_a_time(tmp_path, monkeypatch):
    """So that 4,096 events fit the memory: what is recorded keeps every tensor, and attention's go with the square."""
    model, recorded, rows = _model(EncoderConfig(width=16, heads=2, history=LENGTH), ContextColumns()), [], []
    s = contract.StageTensors(LENGTH, CANDIDATES, ITEMS, 16)
    given = _inputs(s, _users(9), np.random.default_rng(2))
    inputs, outputs, file = contract.retrieval_inputs(s), contract.retrieval_outputs(s), tmp_path / "retrieval.onnx"
    monkeypatch.setattr(onnx_export, "TRACED_EVENTS", 12)
    monkeypatch.setattr(by_length, "PAIRS", 2 * LENGTH**2)  # rows of all events: two

    def write(graph, example, *more) -> None:
        recorded.append(tuple(example[0].shape))
        export(graph, example, *more)

    def run(feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        rows.append(len(feed[names[0]]))
        return session.run(None, feed)

    graph, example = RetrievalGraph(model, CANDIDATES), tuple(map(torch.from_numpy, given))
    onnx_export.export_checked(contract.RETRIEVAL, graph, inputs, outputs, example, file, None, write)
    assert recorded == [(2, 12)]
    session, names = open_session(file), names_of(inputs)
    answer = by_length.retrieved(run, s, names, given)
    assert sum(rows) == 9 and len(rows) > 1
    ids, scores, encoded = session.run(None, dict(zip(names, given, strict=True)))
    assert (answer[0] == ids).mean() > 0.99  # items of nearly equal score change places
    np.testing.assert_allclose(answer[1], scores, atol=SCORES)
    np.testing.assert_allclose(answer[2], encoded, atol=ENCODINGS)


@pytest.mark.parametrize("family", ["sasrec", "hstu"])
def test_a_step_runs_where_its_model_is_and_in_its_number_format(family):
    config = EncoderConfig(
        width=16, heads=2, history=LENGTH, positions="none", family=family, position_bias="relative", time_bias=True
    )
    model = _model(config, ContextColumns()).to("meta", torch.bfloat16)  # "meta" works with no other device's tensors
    states = torch.empty(2, 7, states_of_event(config), device="meta", dtype=torch.bfloat16)
    times = [torch.empty(2, n, dtype=torch.long, device="meta") for n in (3, 7)]
    known = torch.ones(2, 7, dtype=torch.bool, device="meta")
    encoded, new = EncoderStep(model)(torch.empty(2, 3, 16, device="meta", dtype=torch.bfloat16), known, states, *times)
    assert (encoded.dtype, encoded.shape) == (torch.bfloat16, (2, 3, 16))
    assert (new.dtype, new.shape) == (torch.bfloat16, (2, 3, states.shape[2]))


def _kept(folder: Path, room: int) -> StateSettings:
    return StateSettings(room, path=str(folder / "states"))


ROOMY, NARROW = 1 << 24, 1 << 19


@pytest.mark.parametrize("room", [ROOMY, NARROW])
def test_grown_histories_answer_as_whole_ones(compiled, room, tmp_path, monkeypatch):
    s, folder = compiled
    monkeypatch.setattr(state_cache, "BLOCK", 8)  # of which there are some
    whole, grown = open_session(folder / "retrieval.onnx"), GrownRetrieval(folder, s, _kept(tmp_path, room))
    names = names_of(contract.retrieval_inputs(s))
    rng, users = np.random.default_rng(room), _users(USERS)
    for _ in range(ROUNDS):
        asking = rng.choice(USERS, rng.integers(1, USERS + 4))  # some twice in a batch
        inputs = _inputs(s, [users[u] for u in asking], rng)
        expected = whole.run(None, dict(zip(names, inputs, strict=True)))
        ids, scores, encoded = grown(inputs)
        np.testing.assert_allclose(encoded, expected[2], atol=ENCODINGS, rtol=0)
        np.testing.assert_allclose(scores, expected[1], atol=SCORES, rtol=SCORES)
        for i, j in np.argwhere(ids != expected[0]):  # only items of equal scores change places
            assert np.abs(np.diff(expected[1][i, max(0, j - 1) : j + 2])).min() < SCORES
        for u in rng.choice(USERS, 5, replace=False):
            users[u] = np.concatenate([users[u], _events(rng, int(rng.integers(1, MOST + 1)))])
    rows, cache = grown.histories.rows, grown.histories.cache
    assert cache.size() <= room and min(rows[HIT], rows[GROWN], rows[MISSED]) > 0
    if room == NARROW:
        assert cache.evicted > 20
    else:  # each user once, and where a window has moved
        assert not cache.evicted and rows[GROWN] > rows[MISSED] - USERS


def test_retrieval_and_ranking_read_the_entry_of_the_cache(compiled, tmp_path):
    s, folder = compiled
    grown, (user, *_) = GrownRetrieval(folder, s, _kept(tmp_path, ROOMY)), [u for u in _users(9) if len(u) > s.memory]
    inputs = _inputs(s, [user], np.random.default_rng(2))
    _, scores, encoded = grown(inputs)
    events = np.stack([inputs[0][0], *(x[0] for x in inputs[2 : 2 + s.timed + s.types])], 1)
    events = events[inputs[0][0] != contract.PADDING_ID]
    cache, keys = grown.histories.cache, keys_of(events, grown.histories.model)
    entry = cache.find(keys, events)
    assert entry is not None and entry.count == len(events)
    count = min(entry.count, encoded.shape[1])
    assert np.array_equal(encoded[0, encoded.shape[1] - count :], entry.encoded[entry.count - count :])
    entry.encoded[-1] += 1  # another state: what scores the items and what the ranker is given follow
    states = np.zeros((len(events), 1), np.float32)
    cache.put([(keys, events, states, entry.encoded, None)])
    _, other_scores, other = grown(inputs)
    assert grown.histories.rows == {MISSED: 1, HIT: 1}
    assert not np.allclose(other_scores, scores) and np.array_equal(other[0, -1], entry.encoded[-1])


def _ask(folder: Path, s: contract.StageTensors, kept: StateSettings, inputs: list[np.ndarray], pipe) -> None:
    grown = GrownRetrieval(folder, s, kept)
    pipe.send((grown(inputs)[2], dict(grown.histories.rows)))


@pytest.mark.parametrize("compiled", ["sasrec"], indirect=True)
def test_another_process_goes_on_where_one_has_left_a_history_and_another_model_does_not(compiled, tmp_path):
    s, folder = compiled
    kept, (user, *_) = _kept(tmp_path, ROOMY), [u for u in _users(9) if len(u) > 3]
    before, now = (_inputs(s, [u], np.random.default_rng(2)) for u in (user[:-1], user))
    fork, answers = multiprocessing.get_context("fork"), []
    copy = tmp_path / "other"
    shutil.copytree(folder, copy)
    (copy / "encoder_step.onnx.data").touch()  # something of its own: not the same model
    for of, inputs in ((folder, before), (folder, now), (folder, now), (copy, now)):
        here, there = fork.Pipe()
        process = fork.Process(target=_ask, args=(of, s, kept, inputs, there))
        process.start()
        answers.append(here.recv())
        process.join()
    assert [rows for _, rows in answers] == [{MISSED: 1}, {GROWN: 1}, {HIT: 1}, {MISSED: 1}]
    assert np.array_equal(answers[1][0], answers[2][0])
    np.testing.assert_allclose(answers[1][0], answers[3][0], atol=ENCODINGS, rtol=0)


def test_the_compilers_check_tells_another_models_graphs(compiled):
    s, folder = compiled
    inputs = _inputs(s, _users(USERS), np.random.default_rng(1))
    names = names_of(contract.retrieval_inputs(s))
    expected = open_session(folder / "retrieval.onnx").run(None, dict(zip(names, inputs, strict=True)))
    example, answer = ([torch.from_numpy(x) for x in part] for part in (inputs, expected))
    assert check_steps(folder, s, example, answer)["encodings"] <= ENCODINGS
    with pytest.raises(ValueError, match="not published"):
        check_steps(folder, s, example, [*answer[:2], answer[2] + 1e-3])


def _row(*ids: int) -> np.ndarray:
    return np.array(ids, np.int64)[:, None]


def _put(cache: StateMemory, events: np.ndarray, grown: bool = False, width: int = 1) -> None:
    """Keeps a history whose states are its events, all at once or the newest behind the others."""
    before = cache.find(keys_of(events), events) if grown else None
    assert (before is not None) == grown
    new = events[0 if before is None else before.count :].astype(np.float32)
    cache.put([(keys_of(events), events, new, new.repeat(width, 1), before)])


def test_the_cache_tells_histories_apart(tmp_path):
    cache = StateMemory(tmp_path / "states", 1 << 20)
    first, longer = _row(3, 4, 5), _row(3, 4, 5, 6, 7)
    _put(cache, first)
    entry = cache.find(keys_of(longer), longer)
    assert entry is not None and entry.states is not None and entry.states[:, 0].tolist() == [3, 4, 5]
    assert cache.find(keys_of(first), _row(3, 4, 9)) is None  # a hash that another history happens to have
    assert cache.find(keys_of(longer, b"another model"), longer) is None
    _put(cache, longer, grown=True)
    assert cache.find(keys_of(first), first) is None  # it has become the longer one
    grown = cache.find(keys_of(longer), longer)
    assert grown is not None and grown.count == 5 and grown.states is None
    far = _row(*range(3, 9 + MOST_NEW))
    assert cache.find(keys_of(far), far) is None


def test_a_history_grows_over_its_blocks(tmp_path):
    cache, rng = StateMemory(tmp_path / "states", 1 << 20), np.random.default_rng(1)
    ids, n = rng.integers(3, 10**6, 4 * BLOCK)[:, None], BLOCK - 3
    _put(cache, ids[:n])
    while n < len(ids) - MOST_NEW:  # by one, by some, onto a block's end and over it
        n += int(rng.integers(1, MOST_NEW + 1))
        _put(cache, ids[:n], grown=True)
        for more in (0, 1):
            entry = cache.find(keys_of(ids[: n + more]), ids[: n + more])
            assert entry is not None and entry.count == n and np.array_equal(entry.encoded, ids[:n])
            assert entry.states is None if not more else np.array_equal(entry.states, ids[:n])
    other = np.concatenate([ids[:BLOCK], _row(5)])  # shares the first block, and has no end there
    assert cache.find(keys_of(other), other) is None


def test_the_cache_keeps_its_bound_and_what_is_read_again(tmp_path):
    cache = StateMemory(tmp_path / "states", 1 << 20)
    long, grows = _row(*range(3, 3 + 3 * BLOCK)), [*range(500, 500 + BLOCK)]
    _put(cache, long)
    _put(cache, _row(*grows))
    for start in range(300):
        _put(cache, _row(*range(start + 10, start + 20)), width=100)
        assert cache.find(keys_of(long), long) is not None
        if start % 5 == 0:
            grows.append(start)
            _put(cache, _row(*grows), grown=True)
    old = _row(*range(10, 20))
    assert cache.size() <= 1 << 20 and cache.evicted > 100 and cache.find(keys_of(old), old) is None
    _put(cache, _row(*range(9_000, 9_100)), width=2_000)  # larger than there is room for
    assert cache.find(keys_of(long), long) is not None


def test_a_sliding_window_stays_while_a_history_grows():
    rng = np.random.default_rng(5)
    ids = rng.integers(3, 500, 4_000)
    starts = [n - windows.newest(ids[:n], 200, 25) for n in range(1, len(ids))]
    assert all(n - 200 <= start <= max(0, n - 200 + 24) for n, start in enumerate(starts, 1))
    moves = np.count_nonzero(np.diff(starts)) / len(starts)
    assert 1 / 20 < moves < 1 / 9  # 2 / (25 + 1)
    for n in range(3_000, 3_050):  # a store that has forgotten the older ones cuts at the same event
        read = windows.newest(ids[:n], 200, 25)
        assert windows.newest(ids[n - 1_000 : n], 200, 25) == windows.newest(ids[n - 200 : n], 200, 25) == read
    assert windows.newest(ids[:150], 200, 25) == 150 and windows.newest(ids, 200) == 200


@pytest.mark.parametrize("causal", [True, False])
def test_the_bias_of_two_events_is_that_of_their_distance(causal):
    bias = RelativeBias(2, 40, causal)
    torch.nn.init.normal_(bias.bias_RA)
    bucket_of = distance_buckets(40, BUCKETS).tolist()
    assert bucket_of[:17] == [*range(17)] and bucket_of[-1] == 31 and sorted(bucket_of) == bucket_of
    for t in (1, 2, 17, 40):
        got = bias(t)
        for i in range(t):
            for j in range(i + 1 if causal else t):
                assert torch.equal(got[:, i, j], bias.bias_RA[bucket_of[abs(i - j)]])


def test_no_table_of_all_pairs_of_events_is_in_a_graph(compiled):
    _, folder = compiled
    for name in ("retrieval.onnx", "encoder_step.onnx"):
        sizes = {i.name: list(i.dims) for i in onnx.load(folder / name).graph.initializer}
        assert not [name for name, dims in sizes.items() if dims[-2:] == [LENGTH, LENGTH]], sizes


def test_what_was_trained_before_there_were_windows_is_known_by_the_same_key():
    assert not {"positions", "slide"} & set(recorded_fields(EncoderConfig()))
    grows = EncoderConfig(family="hstu", positions="none", slide=8)
    assert recorded_fields(grows)["positions"] == "none" and recorded_fields(grows)["slide"] == 8
