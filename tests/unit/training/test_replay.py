"""The replay: counters know the past alone, and join the retriever's candidates."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from training.data.batches import of_sequences
from training.judge import replay
from training.judge.replay_figures import DEBIASED, Answers, figures, plot_by_hour, render, render_days
from training.metrics import MISS
from training.models.retrieval import EXCLUDED
from vivace.contract import FIRST_ID, ITEM, OOV_ID, TIME, USER

ITEMS = 12
START = 1_506_826_800_000


def _stream(events: int = 600, seed: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    times = START + np.sort(rng.integers(0, 3 * replay.HOUR, events))
    return {ITEM: rng.integers(OOV_ID, ITEMS, events), USER: np.zeros(events, np.int64), TIME: times}


def test_present_is_what_lies_strictly_before_each_moment():
    stream = _stream()
    moments = stream[TIME][[5, 5, 100, 300, 599]]  # of events: those at the moment itself are not known yet
    present = replay.Present(stream, ITEMS)
    decayed = {name: [] for name in replay.HALF_LIVES}
    counted = {name: [] for name in replay.WINDOWS}
    for part in (moments[:2], moments[2:]):
        for name, values in present.decayed(part).items():
            decayed[name].extend(values.numpy())
        for name, values in present.counted(part).items():
            counted[name].extend(values.numpy())
    for row, now in enumerate(moments):
        past = stream[TIME] < now
        ids, age = stream[ITEM][past], now - stream[TIME][past]
        known = ids >= FIRST_ID
        for name, half_life in replay.HALF_LIVES.items():
            exact = np.bincount(ids[known], np.exp2(-age[known] / half_life), ITEMS)
            np.testing.assert_allclose(decayed[name][row], exact, rtol=3e-5, atol=1e-4)
        for name, width in replay.WINDOWS.items():
            exact = np.bincount(ids[known & (age <= width)], minlength=ITEMS)
            np.testing.assert_array_equal(counted[name][row], exact)


def test_planted_future_events_change_nothing():
    stream, now = _stream(), START + replay.HOUR
    planted = {name: values.copy() for name, values in stream.items()}
    future = planted[TIME] >= now
    planted[ITEM][future] = FIRST_ID
    planted[TIME][future] = now
    results = []
    for known in (stream, planted):
        present = replay.Present(known, ITEMS)
        results.append({**present.decayed(np.array([now])), **present.counted(np.array([now]))})
    assert future.sum() > 100
    for name, values in results[0].items():
        assert values.any() and torch.equal(values, results[1][name])


def _blend(weight: float, taken_off: float = 0.0, model: float = 1.0) -> replay.Blend:
    return replay.Blend("30 min", weight, taken_off, model)


@pytest.fixture
def static(monkeypatch):
    """Three candidates of nine items; the history holds item 3; logits fall with the id."""
    request = of_sequences([np.array([[3, START]])] * 4, 2, torch.tensor([5, 9, 10, OOV_ID]), {})
    scores = torch.tensor([[EXCLUDED] * 4 + [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0]]).expand(4, -1)
    rank = torch.tensor([1, 5, 6, MISS])
    monkeypatch.setattr(replay, "scored", lambda *_: (rank, scores, torch.zeros(4, 2, 1)))
    trained = torch.tensor([0.0] * 4 + [99.0, 9.0] + [0.0] * 6)
    models = SimpleNamespace(
        count=3, retriever=SimpleNamespace(popularity=trained),
        features=SimpleNamespace(schema=SimpleNamespace(exclude_seen=True)),
        preset=SimpleNamespace(ranker=SimpleNamespace(memory=1)),
        logits=lambda _, proposed: -proposed.ids_BN[..., None].float(),
    )  # fmt: skip
    return replay.Static(models, request), request


def test_rising_items_join_the_candidates(static):
    models, request = static
    counts = torch.zeros(4, ITEMS)
    counts[:, [3, 5, 9]] = torch.tensor([50.0, 7.0, 20.0])  # seen, a candidate already, rising
    extended = models.extended(counts)
    assert extended.ids_BN[0, :4].tolist() == [4, 5, 6, 9] and not extended.ids_BN[0, 4:].any()
    np.testing.assert_allclose(extended.count_BN[0, :4], np.log1p([0, 7, 0, 20]), rtol=1e-6)
    assert extended.ranks(_blend(0.0), request).tolist()[:2] == [1, 3]
    assert extended.ranks(_blend(100.0), request).tolist()[:2] == [1, 0]
    assert extended.ranks(_blend(1.9), request).tolist()[:2] == [0, 1]  # -5 + 1.9 ln 8 above -9 + 1.9 ln 21 above -4
    for weight in (0.0, 100.0):  # neither a candidate nor rising; out of vocabulary
        assert extended.ranks(_blend(weight), request)[2] > 4 and extended.ranks(_blend(weight), request)[3] >= MISS


def test_trained_popularity_is_taken_off(static):
    models, request = static
    counts = torch.zeros(4, ITEMS)
    counts[:, [5, 9]] = torch.tensor([20.0, 7.0])
    extended = models.extended(counts)
    np.testing.assert_allclose(
        extended.scores(_blend(1.0, 2.0, 0.0))[0, :2], [-2 * np.log(100), np.log(21 / 100)], rtol=1e-5
    )
    assert extended.ranks(_blend(1.0, 0.0, 0.0), request).tolist()[:2] == [0, 1]
    assert extended.ranks(_blend(1.0, 1.0, 0.0), request)[1] == 0  # of what is left of 5, 21/10, against 8


def _answers() -> Answers:
    answers = Answers(ITEMS)
    answers.add("one", torch.tensor([0, 2]), torch.tensor([[3, 4], [3, 5]]))
    answers.add("one", torch.tensor([MISS]), torch.tensor([[0, 0]]))
    answers.add("two", torch.tensor([1, 1, 0]), torch.tensor([[3, 4]] * 3))
    answers.add_propensity(torch.tensor([5.0, 0.0]), torch.tensor([10.0, 10.0]))
    answers.add_propensity(torch.tensor([0.0]), torch.tensor([0.0]))
    return answers


def test_figures_by_hand():
    found = figures(_answers(), np.array([7, 7, 30]), "two")
    one = found["rows"]["one"]
    assert one["NDCG@10"] == pytest.approx((1 + 1 / 2) / 3) and one["HR@10"] == pytest.approx(2 / 3)
    assert one["coverage@10"] == pytest.approx(3 / 9)
    assert one["debiased NDCG@10"] == pytest.approx((2 * 1 + 1000 / 2) / (2 + 1000 + 1000))
    assert found["rows"]["two"]["gain"] == [0, 0, 0] and "p:" in DEBIASED
    assert found["by_hour"]["hour"] == [7, 30] and found["by_hour"]["requests"] == [2, 1]
    assert found["by_hour"]["NDCG@10"]["one"] == [pytest.approx(0.75), 0]
    by_day = found["by_day"]
    assert by_day["day"] == [0, 1] and by_day["requests"] == [2, 1] and by_day["NDCG@10"]["two"][1] == 1
    (mean, low, high), second = by_day["gain"]["one"]
    assert mean == pytest.approx(0.75 - 1 / np.log2(3)) and low <= mean <= high and second == [-1, -1, -1]


def test_table_and_plot(tmp_path):
    blend = {"weight": 2.0, "half_life": "2 h", "taken_off": 1.0, "model": 1.0}
    chosen = {"blends": {"one": blend}, "validation requests": 10}
    results = {"requests": 3, "chosen": chosen, **figures(_answers(), np.array([7, 7, 9]), "two")}
    assert render(results, "run").row_count == 2 and render_days(results, "one").row_count == 1
    plot_by_hour(results, tmp_path / "replay.png")
    assert (tmp_path / "replay.png").stat().st_size > 1000
