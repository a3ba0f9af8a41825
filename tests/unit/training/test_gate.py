"""The quality gate by hand, and what it says when it refuses."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training.judge.gate import HELD_OUT_USERS, GateError, graph_ranks, judge
from training.metrics import MISS, Collected
from vivace import contract
from vivace.manifest import Step, write_json

BEFORE = np.array([0, 1, 5, MISS] * 500)
SECOND = 1 / math.log2(3)  # gain of a second place


def test_what_is_lost_by_hand():
    same = judge(BEFORE, BEFORE.copy())
    assert same.change == 0 and same.passed and not same.few
    worse = BEFORE.copy()
    worse[0] = 1  # one of 500 first places becomes a second
    lost = (1 - SECOND) / (500 * (1 + SECOND + 1 / math.log2(7)))
    verdict = judge(BEFORE, worse)
    assert verdict.change == pytest.approx(-lost) and verdict.passed and verdict.interval[0] < -lost


def test_a_loss_beyond_noise_is_refused_with_the_options():
    worse = BEFORE.copy()
    worse[::8] = MISS
    with pytest.raises(GateError, match="not published: NDCG@10") as error:
        judge(BEFORE, worse)
    text = str(error.value)
    assert "on 2,000 validation requests" in text and "at most 1.0% may be lost" in text
    assert "beyond noise: the whole interval" in text and "--bound" in text and "--force" in text
    forced = judge(BEFORE, worse, forced=True)
    assert not forced.passed and forced.record()["forced"] and forced.record()["split"] == "validation requests"


def test_a_loss_within_noise_on_few_requests_says_so():
    before, after = np.array([0] * 10 + [MISS] * 30), np.array([0] * 9 + [1] + [MISS] * 29 + [4])
    after[8] = 1
    with pytest.raises(GateError) as error:
        judge(before, after, split=HELD_OUT_USERS)
    text = str(error.value)
    assert "within noise: the interval holds 0" in text
    assert "on 40 validation requests of users held out of the ranker's training: few" in text


def test_a_loss_that_may_be_smaller_than_the_bound_says_so():
    worse = BEFORE.copy()
    worse[:120:4] = 1  # 30 of 500 first places become second ones: 1.14 %
    verdict = judge(BEFORE, worse, forced=True)
    assert verdict.change == pytest.approx(-30 * (1 - SECOND) / (500 * (1 + SECOND + 1 / math.log2(7))))
    assert verdict.change < -0.01 < verdict.interval[1] < 0 and "not that it is above 1.0%" in verdict.refusal()


def test_nothing_to_compare_is_no_pass():
    with pytest.raises(ValueError, match="held_out above 0"):
        judge(np.empty(0), np.empty(0))
    with pytest.raises(ValueError, match="the same requests"):
        judge(BEFORE, BEFORE[1:])
    nothing = np.full(50, MISS)
    with pytest.raises(GateError, match="the reference itself ranks no target"):
        judge(nothing, nothing)
    assert not judge(nothing, nothing, forced=True).passed


def test_records_hold_no_nan(tmp_path):
    """JSON knows no NaN: what was not measured is null."""
    write_json(tmp_path / "a.json", {"a": [math.nan, 1.0, math.inf], "b": np.float32(0.5).item()})
    strict = lambda text: json.loads(text, parse_constant=pytest.fail)  # noqa: E731
    assert strict((tmp_path / "a.json").read_text()) == {"a": [None, 1.0, None], "b": 0.5}
    step = Step(tmp_path / "step", "s", {}, 0)
    step.reset()
    nothing = np.full(5, MISS)
    verdict = judge(nothing, nothing, forced=True)
    collected = Collected()
    collected.auc["buy"] = [np.empty(0)]
    manifest = step.finish(1.0, gate=verdict.record(), gauc=collected.gauc())
    assert manifest["results"]["gauc"] == {"buy": {"GAUC": None, "lists": 0}}
    assert manifest["results"]["gate"]["change"] is None
    assert strict((tmp_path / "step" / "manifest.json").read_text()) == manifest


def test_graphs_of_one_score_gain_nothing_from_the_order_of_their_answer(tmp_path):
    """Forty items; the target always comes first among ten of one score, or is not there, or has the best score."""
    ids, requests = pa.array([[3, 4]] * 900, pa.list_(pa.int64())), 900
    users = [f"user {i}" for i in range(requests)]
    targets = pa.array([5, 39, 6] * 300)
    columns = {contract.USER: users, contract.ITEM: ids, contract.TIME: ids, contract.TARGET: targets}
    pq.write_table(pa.table(columns), tmp_path / "part.parquet")
    features = SimpleNamespace(
        files=lambda part: [tmp_path / "part.parquet"], schema=SimpleNamespace(heads=(), exclude_seen=True)
    )
    tensors = contract.StageTensors(2, 10, 43, 8, False, 0)

    def answer(inputs):
        rows = len(inputs[0])
        scores = np.ones((rows, 1, 10), np.float32)
        scores[:, :, 1] = 2.0
        return [np.tile(np.arange(5, 15), (rows, 1)), scores]

    rank = graph_ranks(features, tensors, answer)
    assert len(rank) == requests and (rank[1::3] == MISS).all() and (rank[2::3] == 0).all()
    tied = rank[::3]  # places 1 to 9 come alike
    assert set(tied) == set(range(1, 10)) and tied.mean() == pytest.approx(5, abs=4 * np.sqrt(60 / 9 / 300))
