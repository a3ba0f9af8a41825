"""``make gpu`` end to end without a GPU, in an environment made from the pieces alone."""

from __future__ import annotations

import pytest

from benchmarks.gpu.pack import MIB
from benchmarks.gpu.rehearse import rehearse
from benchmarks.gpu.run import STEPS

MINUTES = 9.0  # under four on two idle cores
MAY_NOT_RUN = ("tensorrt", "cuda", "aoti")  # no GPU; packages that a busy processor does not compile in their time
TOO_SLOW = "by the batch before"  # a size that a busy processor does not finish in its time


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    work = tmp_path_factory.mktemp("gpu")
    return rehearse(work, MINUTES), work


def test_every_step_runs_or_says_by_name_what_it_could_not(rehearsal):
    record, _ = rehearsal
    steps = record["steps"]
    failures = {
        name: step.get("last_words") for name, step in steps.items() if step["outcome"] not in ("ok", "stopped")
    }
    assert list(steps) == [step.name for step in STEPS] and not failures, failures
    assert not [name for name, step in steps.items() if not step.get("rows")]  # one that was stopped has figures too
    not_run = {what: why for step in record["steps"].values() for what, why in step["not_run"].items()}
    here = {what for what, why in not_run.items() if TOO_SLOW not in why}
    assert not [what for what in here if not any(engine in what for engine in MAY_NOT_RUN)], not_run


def test_nothing_of_merlin_is_there_and_numpy_is_a_later_one(rehearsal):
    versions = rehearsal[0]["versions"]
    assert not {"nvtabular", "merlin-models", "merlin-dataloader"} & set(versions)
    assert versions["numpy"].startswith("2.")


def test_pieces_are_under_their_limit(rehearsal):
    pieces = rehearsal[1] / "pieces"
    for piece in pieces.glob("*/piece.json"):
        assert sum(f.stat().st_size for f in piece.parent.iterdir()) <= 60 * MIB
