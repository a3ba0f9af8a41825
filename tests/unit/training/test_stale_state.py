"""Every step refuses inputs that are not those it was made from, and names the step to run."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.reports.compress import variant
from loadtest.tune.space import engines
from preprocessing.features import Features
from search.published import LAYOUT
from training.compile.compiler import CompileConfig, compile_models
from training.compile.compress import Compression, compress
from training.judge.compare import compare
from training.judge.evaluate import evaluate
from training.learn.ranker import train_ranker
from training.presets import tiny
from training.search.train import SearchTraining, train_search
from vivace.manifest import Step, replaced
from vivace.run import (
    COMPILED,
    CONTROL,
    EVALUATION,
    FEATURES,
    RANKING,
    REFERENCE,
    RETRIEVAL,
    SEARCH,
    TEACHER,
    TEXT,
    Run,
    StaleError,
)

INPUTS = {  # of each part, in the order that they are made
    FEATURES: (),
    TEXT: (FEATURES,),
    RETRIEVAL: (FEATURES, TEXT),
    RANKING: (RETRIEVAL,),
    CONTROL: (RETRIEVAL,),
    SEARCH: (FEATURES, RETRIEVAL, RANKING),
    EVALUATION: (RETRIEVAL, RANKING, CONTROL),
    COMPILED: (FEATURES, RETRIEVAL, RANKING, SEARCH, EVALUATION),
}


def quiet(_: str) -> None:
    pass


def make(run: Run, part: str, seed: int = 0) -> None:
    """A part's manifest, as the step writes it from what is there now."""
    inputs = {name: run.key(name) for name in INPUTS[part]}
    step = Step(run.step(part), part, {"layout": LAYOUT}, seed, inputs)
    step.reset()
    step.finish(0.0, features=1)


def made_from(part: str) -> set[str]:
    """All that a part was made from, directly or not."""
    return set(INPUTS[part]).union(*(made_from(name) for name in INPUTS[part]))


@pytest.fixture(autouse=True)
def no_git(monkeypatch):
    """Manifests record the commit: two processes for each."""
    monkeypatch.setattr("vivace.manifest.commit", lambda: "unknown")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "shop")
    for part in INPUTS:
        make(run, part)
    return run


STEPS = {  # what each step reads, and how it is called
    "train the ranker": (
        (RETRIEVAL,),
        lambda run, features: train_ranker(features, tiny(), run.root, 1, quiet, quiet=True),
    ),
    "train search": (
        (FEATURES, RETRIEVAL, RANKING),
        lambda run, features: train_search(features, tiny(), run.root, SearchTraining(), 1, quiet, True),
    ),
    "evaluate": ((RETRIEVAL, RANKING, CONTROL), lambda run, features: evaluate(features, tiny(), run.root, 1, quiet)),
    "compare": ((EVALUATION,), lambda run, features: compare([run.root])),
    "compile": (
        (FEATURES, RETRIEVAL, RANKING, SEARCH),
        lambda run, features: compile_models(features, tiny(), run.root, 1, quiet),
    ),
    "compile by the gate": (
        (FEATURES, RETRIEVAL, RANKING, SEARCH, EVALUATION),
        lambda run, features: compile_models(features, tiny(), run.root, 1, quiet, CompileConfig(precision="int8")),
    ),
    "tune": ((COMPILED,), lambda run, features: engines(run.root)),
    "report": ((COMPILED, EVALUATION, RETRIEVAL), lambda run, features: variant("whole model", run.root)),
    "compress": (
        (EVALUATION, RETRIEVAL, FEATURES),
        lambda run, features: compress(features, tiny(), run.root, "small", Compression(), 1, quiet, True),
    ),
}


@pytest.mark.parametrize("remade", INPUTS)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_refuses_what_was_made_from_something_else(run, step, remade):
    reads, call = STEPS[step]
    make(run, remade, seed=1)
    stale = [part for part in reads if remade in made_from(part)]
    refusal = ""
    try:
        call(run, Features(run.features))
    except StaleError as error:
        refusal = str(error)
    except (OSError, ValueError, KeyError):  # there is no data: a step that takes its inputs may fail later
        pass
    assert bool(refusal) == bool(stale), refusal
    if stale:
        assert "run 'vivace " in refusal and "--name shop' again" in refusal


@pytest.mark.parametrize("lost", [FEATURES, RETRIEVAL, RANKING])
def test_a_missing_part_is_named_with_the_step_that_makes_it(run, lost):
    (run.step(lost) / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"run 'vivace (prepare|train) --name shop' first"):
        run.manifest(COMPILED)


@pytest.mark.parametrize("remade", [FEATURES, RETRIEVAL, EVALUATION])
def test_a_variant_is_stale_with_the_run_that_it_was_made_of(run, remade):
    variant = Run(run.variants / "small")
    made_of = {
        RETRIEVAL: lambda: {FEATURES: run.key(FEATURES), TEACHER: run.key(RETRIEVAL)},
        COMPILED: lambda: {RETRIEVAL: variant.key(RETRIEVAL), REFERENCE: run.key(EVALUATION)},
    }
    for part, inputs in made_of.items():
        step = Step(variant.step(part), part, {}, 0, inputs())
        step.reset()
        step.finish(0.0)
    assert variant.manifest(COMPILED)["step"] == COMPILED
    make(run, remade, seed=1)
    with pytest.raises(StaleError, match=r"run 'vivace .*--name shop"):
        variant.manifest(COMPILED)
    if remade == RETRIEVAL:
        with pytest.raises(StaleError, match="run 'vivace compress --name shop --variant small' again"):
            variant.manifest(RETRIEVAL)


def test_a_folder_is_replaced_whole_or_stays_as_it_was(tmp_path):
    folder = tmp_path / "features"
    with replaced(folder) as fresh:
        (fresh / "a").write_text("1")
        assert not folder.exists()
    with pytest.raises(RuntimeError), replaced(folder) as fresh:
        (fresh / "a").write_text("2")
        (fresh / "rejects").touch()
        raise RuntimeError
    assert (folder / "a").read_text() == "1" and (tmp_path / "features.partial" / "rejects").exists()
    folder.rename(tmp_path / "features.old")  # killed between the two renames
    with pytest.raises(RuntimeError), replaced(folder):
        raise RuntimeError
    assert (folder / "a").read_text() == "1"
    with replaced(folder) as fresh:
        (fresh / "b").touch()
    assert [p.name for p in folder.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["features"]
