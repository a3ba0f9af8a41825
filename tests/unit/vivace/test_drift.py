"""Distances of two distributions by hand and by simulation, and how many requests a verdict needs."""

from __future__ import annotations

import numpy as np
import pytest

from vivace.drift import (
    LOOK,
    SHIFTED,
    STABLE,
    Feature,
    Reference,
    category,
    compare,
    ks,
    least,
    number,
    psi,
)


def test_psi_and_ks_by_hand():
    # shares .5, .5 and .25, .75: (.25 - .5) ln(.25/.5) + (.75 - .5) ln(.75/.5) = .1733 + .1014
    assert psi(np.array([5e6, 5e6]), np.array([25e5, 75e5])) == pytest.approx(0.2747, abs=1e-4)
    assert ks(np.array([5, 5]), np.array([1, 3])) == pytest.approx(0.25)
    assert psi(np.array([50, 50]), np.array([100, 0])) < 10  # an empty bin is no infinity


def test_chance_alone_passes_the_first_threshold_in_one_hour_of_twenty():
    rng = np.random.default_rng(0)
    feature = number("n", np.arange(2000))
    n = int(least(feature))
    assert 100 < n < 400
    shares = np.array(feature.counts) / 2000
    hours = [psi(rng.multinomial(2000, shares), rng.multinomial(n, shares)) for _ in range(1000)]
    assert 0.02 < np.mean(np.array(hours) > LOOK) < 0.07  # halves in each bin shrink it a little
    assert least(number("few", np.arange(40))) == np.inf


def test_what_a_server_counts_is_compared_feature_by_feature(tmp_path):
    rng = np.random.default_rng(1)
    lengths, devices = rng.integers(1, 40, 2000), rng.choice([3, 4, 5], 2000, p=[0.6, 0.3, 0.1])
    features = (
        number("length", lengths),
        category("device", devices, {2: "unknown", 3: "phone", 4: "tv", 5: "desk"}, [2]),
    )
    Reference("test", 2000, 50, features, ()).save(tmp_path / "drift.json")
    reference = Reference.load(tmp_path / "drift.json")
    assert reference == Reference("test", 2000, 50, features, ())

    def verdicts(lengths: np.ndarray, devices: np.ndarray) -> list[str]:
        counted = [f.counted(v) for f, v in zip(reference.features, (lengths, devices), strict=True)]
        return [row.verdict for row in compare(reference, np.concatenate([*counted, [0.0, 0.0]]))]

    same = rng.choice(2000, 1000)
    assert verdicts(lengths[same], devices[same]) == [STABLE, STABLE]
    assert verdicts(lengths[same] + 20, np.full(1000, 9)) == [SHIFTED, SHIFTED]  # 9: a device nobody had
    assert verdicts(lengths[:20], devices[:20])[0].startswith("too few requests: 20 of ")
    assert [sum(f.counts) for f in features] == [2000, 2000] and features[1].bins == (
        "phone",
        "tv",
        "desk",
        "unknown",
        "others",
    )


def test_a_feature_that_is_none_is_refused():
    with pytest.raises(ValueError, match="device: expected a bin and a count more than edges or ids, got 1 bins"):
        Feature("device", "category", ("a",), (1,), ids=(3,))


def test_values_that_are_all_the_same_are_told_from_others():
    feature = number("score", np.full(50, 0.25))
    assert feature.bins == ("< 0.25", "0.25", "> 0.25") and feature.counts == (0, 50, 0)
    assert feature.counted(np.array([0.2, 0.25, 0.25, 0.3])).tolist() == [1, 2, 1, 1.0]
