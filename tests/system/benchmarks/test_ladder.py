"""The parity ladder on the small shop: every rung holds, and a damaged one is seen."""

from __future__ import annotations

import numpy as np

from benchmarks.ladder import TOLERANCES, Answers, climb, rung
from tests.support import patient
from training.presets import tiny


def test_every_rung_holds(features, root):
    found = patient(lambda: climb(features, tiny(), root, 200, None))
    assert [r.name for r in found] == ["ONNX Runtime, float32", "engine, fp32", "OpenVINO", "served"]
    for r in found:
        assert r.holds and r.kind == "same", r
    assert len({round(r.ndcg, 3) for r in found}) == 1 and found[0].ndcg > 0.05


def test_a_damaged_rung_is_seen():
    items = np.array([[f"i{n}" for n in range(20)]] * 10, object)
    scores = np.linspace(5, 1, 20, dtype=np.float32)[None].repeat(10, 0)
    whole, targets = ("whole", Answers(items, scores)), ["i0"] * 10
    assert rung("same", "same", whole, Answers(items, scores + 1e-5), targets).holds
    off = scores.copy()
    off[3, 7] += 0.01  # one score of two hundred
    assert not rung("off", "same", whole, Answers(items, off), targets).holds
    swapped = items.copy()
    swapped[0, [0, 1]] = swapped[0, [1, 0]]  # the target of one request falls to the second place: 3.7 % of NDCG@10
    moved = rung("swapped", "fewer bits", whole, Answers(swapped, scores), targets)
    assert not moved.holds and moved.overlap == 1.0 and -0.04 < moved.change < -TOLERANCES["fewer bits"].ndcg
    turned = Answers(items[:, ::-1], scores)  # the worst come first
    assert not rung("turned", "fewer bits", whole, turned, targets).holds
