"""A ranker with live counters: which candidates it gets, what it reads of them, and of which moment."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from preprocessing.events import user_hash
from training.data.batches import of_sequences, together
from training.data.live import STEP_MS, LiveAt, check_live
from training.learn.ranker import without_padding
from training.metrics import MISS, list_auc, ranks, ranks_after
from training.models.context import LiveFeatures
from training.models.ranking import RankerConfig
from training.models.retrieval import EXCLUDED, propose
from training.presets import Preset
from training.scoring import behind_rising
from vivace.context import ContextColumns
from vivace.contract import (
    FIRST_ID,
    ITEM,
    LIVE_FEATURES,
    LIVE_HALF_LIVES_MS,
    PADDING_ID,
    TARGET_TIME,
    TIME,
    USER,
    target_column,
)
from vivace.limits import CountLimits
from vivace.live import VISIT_GAP_MS, LiveTable, Stream
from vivace.live_shown import ShownStream

START = 1_506_826_800_000


def test_rising_items_come_first_and_each_item_once():
    scores = torch.tensor([[EXCLUDED] * 3 + [5.0, EXCLUDED, 3.0, 4.0, 1.0]])  # ids 3..7; 4 was seen
    rising = torch.tensor([[6, 4, 7, PADDING_ID]])
    ids, values = propose(scores, 3, rising)
    assert ids.tolist() == [[6, 7, 3, 5, 0, 0, 0]]  # 4 is left out; what is missing stands at the end
    assert values[0, :4].tolist() == [4.0, 1.0, 5.0, 3.0]
    assert propose(scores, 3)[0].tolist() == [[3, 6, 5]]


def _request(target: int, rising: list[int]):
    request = of_sequences([np.array([[FIRST_ID, 1]])], 4, torch.tensor([target]), {})
    live = torch.zeros(1, len(rising), LIVE_FEATURES)
    return replace(request, rising_BM=torch.tensor([rising]), live_BMF=live)


@pytest.mark.parametrize(
    ("target", "before", "expected"), [(9, 5000, 0), (5, 1, 1), (8, 2, 2 + 2)], ids=["rising", "proposed", "neither"]
)
def test_ranks_of_targets_that_are_rising(target, before, expected):
    candidates = torch.tensor([[9, 4, 6, 5]])  # two rising, two of the retriever
    logits = torch.tensor([[4.0, 1.0, 2.0, 3.0]])
    request = _request(target, [9, 4])
    before_B = behind_rising(torch.tensor([before]), request)
    got = ranks_after(logits, candidates, request.target_B, before_B, request.number_B)
    assert got.tolist() == [expected]


def test_a_target_that_rises_but_was_seen_is_a_miss():
    """It is never answered, so its rank is that of no answer."""
    scores = torch.tensor([[*[EXCLUDED] * FIRST_ID, 5.0, 4.0, 3.0, 2.0]])
    target, other = FIRST_ID, FIRST_ID + 1
    scores[0, target] = EXCLUDED
    request = _request(target, [target, other])
    ids, _ = propose(scores, 2, request.rising_BM)
    assert target not in ids
    before_B = behind_rising(ranks(scores, request.target_B, request.number_B), request)
    logits = torch.arange(ids.shape[1], 0, -1, dtype=torch.float32)[None]
    assert ranks_after(logits, ids, request.target_B, before_B, request.number_B).tolist() == [MISS]


def test_counts_belong_to_their_candidate_wherever_it_stands():
    layer = LiveFeatures(LIVE_FEATURES)
    rising = torch.tensor([[5, 7, PADDING_ID]])
    features = torch.randn(1, 3, LIVE_FEATURES)
    candidates = torch.tensor([[7, 4, 5, PADDING_ID]])
    out = layer(candidates, rising, features)
    torch.testing.assert_close(out[0, 0], features[0, 1].clamp(-6, 6))
    torch.testing.assert_close(out[0, 2], features[0, 0].clamp(-6, 6))
    assert not out[0, 1].any() and not out[0, 3].any()
    order = torch.tensor([1, 2, 0])
    torch.testing.assert_close(layer(candidates, rising[:, order], features[:, order]), out)


def test_a_request_sees_what_lies_before_its_moment(tmp_path):
    """A planted future: the item that everybody clicks after the request is not rising at it."""
    rng = np.random.default_rng(4)
    times = START + np.sort(rng.integers(0, 3_600_000, 500))
    ids, users = rng.integers(FIRST_ID, FIRST_ID + 5, 500), rng.integers(0, 50, 500)
    moments = START + np.array([3_000_000, 1_200_000])  # of the file, not in order of time
    planted = FIRST_ID + 7
    ids[times >= moments[1]] = planted
    histories = pa.array([[FIRST_ID], [FIRST_ID + 1, FIRST_ID]])
    pq.write_table(pa.table({TARGET_TIME: moments, ITEM: histories}), tmp_path / "part.parquet")
    stream = Stream.of(users, ids, times, np.empty((500, 0), np.int64))
    features = SimpleNamespace(
        files=lambda part: [tmp_path / "part.parquet"], item_count=lambda: FIRST_ID + 10,
        stream=lambda columns, limits, until_ms: stream,
    )  # fmt: skip
    live = LiveAt.of_part(features, "valid", 6)
    assert planted in live.ids[0] and planted not in live.ids[1]
    table = LiveTable(FIRST_ID + 10, 6)

    stream.into(table)
    rows = table.rows(moments[1] // STEP_MS * STEP_MS)
    expected_ids, expected = rows.of(np.empty((1, 0), np.int64), np.array([FIRST_ID]))
    np.testing.assert_array_equal(live.ids[1], expected_ids[0])
    np.testing.assert_allclose(live.features[1], expected[0], atol=4e-3)  # kept in 16 bits
    assert expected[..., -2].any()  # what came after the newest item of the history


def test_a_request_sees_what_was_shown_before_it_and_not_its_own_page(tmp_path):
    """Planted: a flood of impressions after the moment, and the page that the click came of. Neither is counted."""
    moment, item = START + 3_000_000, FIRST_ID + 2
    table = pa.table({TARGET_TIME: [moment], ITEM: pa.array([[item]]), USER: ["ann"]})
    pq.write_table(table, tmp_path / "part.parquet")
    clicks = Stream.of(
        np.arange(9), np.full(9, item), moment - 60_000 * np.arange(9, 0, -1), np.empty((9, 0), np.int64)
    )
    before = [("bob", moment - 600_000), ("cy", moment - 300_000), ("ann", moment - VISIT_GAP_MS - STEP_MS)]
    planted = [("ann", moment - 60_000), ("ann", moment - STEP_MS), *(("dan", moment + n) for n in range(200))]

    def rows(log: list[tuple[str, int]]) -> np.ndarray:
        users, times = zip(*sorted(log, key=lambda event: event[1]), strict=True)
        shown = ShownStream(user_hash(np.array(users, object)), np.full(len(log), item), np.array(times))
        features = SimpleNamespace(
            files=lambda part: [tmp_path / "part.parquet"], item_count=lambda: FIRST_ID + 10,
            stream=lambda columns, limits, until_ms: clicks, shown=lambda limits: shown,
        )  # fmt: skip
        live = LiveAt.of_part(features, "valid", 3, shown=True)
        assert live.ids[0].tolist() == [item, PADDING_ID, PADDING_ID]
        return live.features[0, 0, -len(LIVE_HALF_LIVES_MS) * 2 : -len(LIVE_HALF_LIVES_MS)]

    without = rows(before)
    np.testing.assert_array_equal(rows([*before, *planted]), without)
    assert np.expm1(without[-1]) == pytest.approx(3, abs=0.15)
    assert (rows([*before, ("dan", moment - 60_000)]) > without).all()  # another's page is counted


def test_requests_of_one_moment_see_together_what_each_sees_alone(tmp_path, monkeypatch):
    """All bits of all features, with a context, limits and impressions: of a table that holds the past alone."""
    monkeypatch.setattr("training.data.live.FED_AT_ONCE", 50)  # so that much of the log waits in the table
    monkeypatch.setattr("training.data.live.REQUESTS", 2)
    rng, limits, count = np.random.default_rng(8), CountLimits(600_000, newcomers=2.0), 40
    times, users = START + np.sort(rng.integers(0, 3_600_000, 900)), rng.integers(0, 60, 900)
    ids, context = rng.integers(1, FIRST_ID + 30, 900), rng.integers(1, 5, (900, 2))
    names = np.array([f"u{n}" for n in range(600)], object)
    stream = Stream.of(user_hash(names[users]), ids, times, context, limits)
    shown = ShownStream(user_hash(names[rng.integers(0, 600, 900)]), rng.integers(FIRST_ID, FIRST_ID + 30, 900), times)
    moments = START + 1_200_000 + rng.integers(0, 8, count) * (STEP_MS * 40) + rng.integers(0, STEP_MS, count)
    asking, newest = rng.integers(0, 60, count), rng.integers(0, FIRST_ID + 30, count)
    of_request = rng.integers(1, 5, (count, 2))
    columns = ContextColumns(("a", "b"), sizes=(5, 5))
    table = {TARGET_TIME: moments, ITEM: [[int(n)] for n in newest], USER: names[asking]}
    table |= {target_column(name): of_request[:, n] for n, name in enumerate(columns.categoricals)}
    pq.write_table(pa.table(table), tmp_path / "part.parquet")
    features = SimpleNamespace(
        files=lambda part: [tmp_path / "part.parquet"], item_count=lambda: FIRST_ID + 30,
        stream=lambda columns, limits, until_ms: stream, shown=shown.limited,
    )  # fmt: skip
    live, kept, own_pages = LiveAt.of_part(features, "test", 12, columns, limits, shown=True), shown.limited(limits), 0
    for request, moment in enumerate(moments.tolist()):
        until = moment // STEP_MS * STEP_MS
        past, seen = stream[stream.times_ms < until], kept[kept.times_ms < until]
        alone = LiveTable(FIRST_ID + 30, 12, 2, shown=True)
        past.into(alone)
        alone.add_shown(seen.ids, seen.times_ms)
        own = seen[(seen.users == user_hash(names[asking])[request]) & (seen.times_ms >= moment - VISIT_GAP_MS)]
        own_pages += bool(len(own))
        row = alone.rows(until).of(of_request[request : request + 1], newest[request : request + 1], own)
        np.testing.assert_array_equal(live.ids[request], row[0][0])
        np.testing.assert_array_equal(live.features[request], row[1][0].astype(np.float16))
    assert count // 4 < own_pages < count and len(np.unique(moments // STEP_MS)) <= 8 < len(past) < len(stream) < 900


def test_a_log_without_times_or_validation_is_refused(tmp_path):
    def log(times: np.ndarray, files: list):
        return SimpleNamespace(folder=tmp_path, files=lambda part: files, events=lambda: {TIME: times})

    for times in (np.arange(9), np.full(9, START), np.empty(0, np.int64)):  # places in a file, all equal, none
        with pytest.raises(ValueError, match="expected events with real times"):
            check_live(log(times, [tmp_path]), 4)
        check_live(log(times, [tmp_path]), 0)
    with pytest.raises(ValueError, match="validation requests"):
        check_live(log(START + np.arange(9), []), 4)
    check_live(log(START + np.arange(9), [tmp_path]), 4)
    silent = log(START + np.arange(9), [tmp_path])
    silent.has_shown, silent.schema = lambda: False, SimpleNamespace(shown_types=("seen",))
    with pytest.raises(ValueError, match=r"shown_rates.*found none.*names seen under shown_types"):
        check_live(silent, 4, shown=True)
    with pytest.raises(ValueError, match=r"shown_rates.*rising above 0"):
        Preset(ranker=RankerConfig(shown_rates=True))
    with pytest.raises(ValueError, match="--control"):
        check_live(log(START + np.arange(9), [tmp_path]), 4, control=True)


def test_padding_is_no_candidate():
    """Of three candidates and two places of padding: the same loss and AUC as of the three alone."""
    logits = torch.tensor([[0.3, 1.0, -0.5]])
    padded = torch.cat([logits, torch.tensor([[9.0, -9.0]])], 1)
    hit = torch.tensor([[True, False, False]])
    there = torch.tensor([[True, True, True, False, False]])
    loss = F.cross_entropy(without_padding(padded, there), torch.tensor([0]))
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor([0])))
    wide = torch.cat([hit, torch.zeros(1, 2, dtype=torch.bool)], 1)
    assert list_auc(padded, wide, there).tolist() == list_auc(logits, hit).tolist() == [0.5]


def test_parts_are_put_together_with_what_was_rising():
    both = together([_request(4, [9, 4]), _request(5, [3, 8])])
    assert both.rising_BM.tolist() == [[9, 4], [3, 8]] and both.target_B.tolist() == [4, 5]
    assert both.take(np.array([1])).rising_BM.tolist() == [[3, 8]]
    assert together([of_sequences([np.array([[3, 1]])], 4, torch.tensor([4]), {})]).live == ()
