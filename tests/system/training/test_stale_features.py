"""Features prepared again on other data: nothing of the old models is shown or published; what fails leaves no mark."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from preprocessing.features import Features
from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers.shop import Shop, ShopConfig
from training.checkpoints import load_ranker, load_retrieval
from training.compile.compiler import CompileConfig, compile_models
from training.judge.evaluate import evaluate
from training.judge.gate import GateError
from training.learn.ranker import train_ranker
from training.learn.retriever import train_retrieval
from training.presets import tiny
from vivace.run import COMPILED, EVALUATION, FEATURES, Run, StaleError

SMALL = ShopConfig(users=120, items=60, events=2000, seed=3)
PRESET = replace(tiny(), retrieval=replace(tiny().retrieval, epochs=1))


def quiet(_: str) -> None:
    pass


def _contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _train(run: Run) -> Features:
    features = Features(run.features)
    train_retrieval(features, PRESET, run.root, 1, quiet, quiet=True)
    train_ranker(features, PRESET, run.root, 1, quiet, quiet=True)
    return features


class Broken(Shop):
    """A shop whose log cannot be read to its end."""

    def interactions(self):
        yield next(iter(super().interactions()))
        raise ValueError("row 7: expected three columns, got two")

    def fingerprint(self) -> str:
        return "broken"


def test_old_weights_never_meet_a_new_vocabulary(tmp_path):
    run = Run(tmp_path / "shop")
    prepare(Shop(SMALL), PrepareConfig(partitions=1), run.root, 1, quiet)
    features = _train(run)
    assert evaluate(features, PRESET, run.root, 1, quiet)["seconds"] > 0
    compile_models(features, PRESET, run.root, 1, quiet)
    published = _contents(run.repository)

    before = _contents(run.features)
    with pytest.raises(ValueError, match="row 7"):
        prepare(Broken(SMALL), PrepareConfig(partitions=1), run.root, 1, quiet)
    assert _contents(run.features) == before and not run.doubt()

    prepare(Shop(replace(SMALL, seed=4)), PrepareConfig(partitions=1), run.root, 1, quiet)
    features = Features(run.features)
    for step in (
        lambda: evaluate(features, PRESET, run.root, 1, quiet),
        lambda: compile_models(features, PRESET, run.root, 1, quiet),
        lambda: train_ranker(features, PRESET, run.root, 1, quiet, quiet=True),
        lambda: load_retrieval(features, PRESET, run.root),
        lambda: load_ranker(features, PRESET, run.root),
        lambda: run.manifest(EVALUATION),
    ):
        with pytest.raises(StaleError, match="run 'vivace train --name shop' again"):
            step()
    assert "vivace train" in run.doubt()  # what vivace serve says
    assert _contents(run.repository) == published

    _train(run)
    with pytest.raises(StaleError, match="run 'vivace evaluate --name shop' again"):  # made of the models before
        compile_models(features, PRESET, run.root, 1, quiet, CompileConfig(precision="int8"))
    compile_models(features, PRESET, run.root, 1, quiet)
    card = run.card()
    assert run.manifest(COMPILED)["inputs"][FEATURES] == run.key(FEATURES) and not run.doubt()
    assert card["quality"].startswith("not evaluated")
    evaluate(features, PRESET, run.root, 1, quiet)

    refused = CompileConfig(precision="int8", bound=-10.0)  # nothing gains so much
    (run.compiled / "retrieval.plan").touch()  # left by a target that is not built now
    published, compiled = _contents(run.repository), _contents(run.compiled)
    with pytest.raises(GateError, match="not published"):
        compile_models(features, PRESET, run.root, 1, quiet, refused)
    assert _contents(run.repository) == published and _contents(run.compiled) == compiled
    compile_models(features, PRESET, run.root, 1, quiet, replace(refused, force=True))
    gate = run.card()["gate"]
    assert gate["forced"] and gate["split"] == "validation requests" and not (run.compiled / "retrieval.plan").exists()
    assert not list(run.repository.rglob("*.plan"))
    json.loads(run.card_file.read_text(), parse_constant=pytest.fail)
