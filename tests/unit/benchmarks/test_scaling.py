"""The ladder of sizes: laws that are known are read back, and a size says what is trained."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.scaling import Size
from benchmarks.scaling_law import HOFFMANN, KAPLAN, Ladder, fit, laws

SIZES = np.geomspace(1e4, 1e6, 6)


def ladder(of_sizes, noise: float) -> Ladder:
    """Losses around ``of_sizes`` of 500 users, some easier than others for every size alike."""
    users = np.random.default_rng(0).normal(0.0, noise, (1, 500))
    return Ladder(tuple("abcdef"), {"parameters": SIZES}, of_sizes[:, None] + users - users.mean())


def test_laws_are_read_back():
    exponent, floor, scale = fit(SIZES, 20.0 * SIZES**-0.1, floors=False)
    assert (exponent, floor, scale) == (pytest.approx(0.1), 0.0, pytest.approx(20.0))
    exponent, floor, scale = fit(SIZES, 3.0 + 40.0 * SIZES**-0.3, floors=True)
    assert (exponent, floor, scale) == (
        pytest.approx(0.3, rel=0.03),
        pytest.approx(3.0, rel=0.01),
        pytest.approx(40, rel=0.3),
    )


def test_intervals_hold_the_exponent_and_narrow_with_the_noise():
    of_sizes = 20.0 * SIZES**-0.1
    wide, narrow = ({law.form: law for law in laws(ladder(of_sizes, noise))}[KAPLAN] for noise in (2.0, 0.1))
    for law in (wide, narrow):
        assert law.exponent_interval[0] < 0.1 < law.exponent_interval[1]
    of = [high - low for low, high in (wide.exponent_interval, narrow.exponent_interval)]
    assert of[0] > 5 * of[1] > 0


def test_a_floor_is_seen_where_there_is_one():
    by_form = {law.form: law for law in laws(ladder(3.0 + 40.0 * SIZES**-0.3, 0.1))}
    assert by_form[HOFFMANN].largest_miss < 0.01 < by_form[KAPLAN].largest_miss
    low, high = by_form[HOFFMANN].floor_interval
    assert low < 3.0 < high


def test_three_sizes_are_too_few():
    with pytest.raises(ValueError, match="at least 4 sizes"):
        Ladder(("a", "b", "c"), {"parameters": SIZES[:3]}, np.ones((3, 5)))


def test_a_size_is_a_recipe():
    small, large, other = (Size.parsed(t) for t in ("16x1", "128x3", "64x2,encoder.dropout=0.4"))
    assert [s.preset(4).retrieval.learning_rate for s in (small, large, other)] == [8e-3, 2e-3, 4e-3]
    assert large.preset(4).encoder.heads == 4 and other.preset(4).encoder.dropout == 0.4
    assert other.label == "64x2,encoder.dropout=0.4" and Size.parsed(other.label) == other
    with pytest.raises(ValueError, match="WIDTHxLAYERS"):
        Size.parsed("tiny")
