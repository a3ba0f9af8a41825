"""``make gpu`` end to end without a GPU, in an environment made from the pieces alone."""

from __future__ import annotations

import pytest

from benchmarks.gpu.pack import MIB
from benchmarks.gpu.rehearse import rehearse
from benchmarks.gpu.run import STEPS

MINUTES = 9.0  # under four on two idle cores
WITHOUT_A_GPU = ("tensorrt", "cuda")  # engines that may be named as not run


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    work = tmp_path_factory.mktemp("gpu")
    return rehearse(work, MINUTES), work


def test_every_step_runs_or_says_by_name_what_it_could_not(rehearsal):
    record, _ = rehearsal
    outcomes = {name: step["outcome"] for name, step in record["steps"].items()}
    failures = {name: step.get("last_words") for name, step in record["steps"].items() if step["outcome"] != "ok"}
    assert outcomes == {step.name: "ok" for step in STEPS}, failures
    not_run = {what: why for step in record["steps"].values() for what, why in step["not_run"].items()}
    assert not [what for what in not_run if not any(engine in what for engine in WITHOUT_A_GPU)], not_run


def test_nothing_of_merlin_is_there_and_numpy_is_a_later_one(rehearsal):
    versions = rehearsal[0]["versions"]
    assert not {"nvtabular", "merlin-models", "merlin-dataloader"} & set(versions)
    assert versions["numpy"].startswith("2.")


def test_pieces_are_under_their_limit(rehearsal):
    pieces = rehearsal[1] / "pieces"
    for piece in pieces.glob("*/piece.json"):
        assert sum(f.stat().st_size for f in piece.parent.iterdir()) <= 60 * MIB
