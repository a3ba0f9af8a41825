"""What is refused before anything is prepared, and how padding is counted."""

from __future__ import annotations

import pytest
import torch

from benchmarks.long_histories import Form, forms_of, main
from benchmarks.padding import counted


def test_forms_are_each_length_and_choices_beside_the_shorter_ones():
    names = [form.name for form in forms_of([50, 200, 1000], 1.6)]
    assert names == [
        "50", "50+20-of-1000-by-candidate", "200", "200+20-of-1000-by-candidate", "1000",
        "50+20-of-1000-by-request", "1000-stochastic",
    ]  # fmt: skip
    assert Form(1000, stochastic=1.6) not in forms_of([50, 1000], 0.0)


def test_options_that_say_nothing_of_the_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="users are of the shop; leave them out"):
        main(tmp_path / "runs", data="ml-1m-benchmark", path=tmp_path, users=5)
    with pytest.raises(ValueError, match="--lengths: expected two at least"):
        main(tmp_path / "runs", lengths="200")
    assert not (tmp_path / "runs").exists()


def test_padding_is_counted_by_places_and_by_pairs():
    one = torch.tensor([[0, 0, 5, 6, 7], [4, 5, 6, 7, 8]])  # the last event is predicted alone: 2 and 4 are read
    row = counted([one, one[1:]])
    assert (row["steps"], row["windows"], row["events"]) == (2, 3, 10)
    assert row["padded"] == pytest.approx(2 / 12) and row["padded_pairs"] == pytest.approx(12 / 48)
