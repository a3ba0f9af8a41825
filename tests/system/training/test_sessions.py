"""A log of sessions by the command line: the preset that suits it, V-SKNN beside the models, a final fit that is
compiled."""

from __future__ import annotations

import json

import numpy as np
import pytest

from preprocessing.features import Features
from tests.support import vivace
from training.advice import sizes_of, suited
from training.compile.engine import Engine
from training.judge.gate import graph_ranks
from vivace.run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("sessions")
    rng = np.random.default_rng(5)
    lines = [f"i{a} i{a} i{a ^ 1}" for a in rng.integers(0, 200, 1500)]
    (folder / "train_sessions.txt").write_text("\n".join(lines) + "\n")
    preset = {"preset": "tiny", "encoder.neighbours": 4}
    (folder / "preset.json").write_text(json.dumps(preset))
    steps = [
        ["prepare", "--data", "sessions", "--path", str(folder), "--partitions", "2"],
        ["train", "--preset", str(folder / "preset.json")],
        ["evaluate"],
        ["train", "--final"],
        ["compile", "--precision", "int8", "--bound", "0.2"],
    ]
    for step in steps:
        out = vivace(*step, "--artifacts", str(folder / "artifacts"))
        assert out.returncode == 0, out.stdout + out.stderr
        if step[0] == "evaluate":
            assert "V-SKNN" in out.stdout and "HR@20" in out.stdout
            assert "next: vivace train --name sessions" in out.stdout and out.stdout.strip().endswith("--final")
    return Run(folder / "artifacts" / "sessions")


def test_the_preset_is_that_of_sessions(run):
    assert suited(sizes_of(Features(run.features)))[0] == "session"


def test_the_card_tells_of_the_final_fit_and_judges_the_models_before_it(run):
    card = run.card()
    assert card["final_fit"].startswith("final fit on all events: ")
    assert "retrieval + ranking" in card["quality"]["table"]
    assert not any(name.startswith("final fit") for name in card["quality"]["table"])


def test_the_gate_compared_the_engine_with_the_final_fit_itself(run):
    gate = run.card()["gate"]
    features = Features(run.features)
    ranks = graph_ranks(features, run.shapes(), Engine(run.compiled, run.shapes()))
    assert gate["requests"] == len(ranks) and abs(gate["change"]) < 0.2


def test_an_index_cannot_do_what_a_session_memory_does(run):
    out = vivace("compile", "--name", "sessions", "--index", "HNSW32", "--artifacts", str(run.root.parent))
    assert out.returncode == 1 and "this run's retriever has a session memory" in out.stderr
