"""A ranker that chooses among older events is served as it was evaluated."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.parity import compare, offline_answers, served_answers
from serving.launcher import TritonServer
from tests.support import on_free_ports, own_copy, patient, quiet
from training.compile.compiler import compile_models
from training.learn.ranker import train_ranker
from training.presets import tiny
from vivace.run import Run

USERS, ENCODED, CHOSEN = 100, 6, 3


def test_what_the_nearest_older_events_bring_is_served_as_evaluated(root, features, tmp_path):
    run = Run(own_copy(root, tmp_path))
    preset = replace(tiny(), ranker=replace(tiny().ranker, memory=ENCODED, nearest=CHOSEN))
    train_ranker(features, preset, run.root, 3, quiet, quiet=True)
    compile_models(features, preset, run.root, 3, quiet)
    offline = offline_answers(features, preset, run.root, USERS)
    assert sum(len(history) > ENCODED for history in offline.histories) > USERS / 4
    with TritonServer(on_free_ports(run.repository, profile="fused")) as server:
        answers = patient(lambda: served_answers(f"{server.host}:{server.grpc_port}", offline.histories))
    result = compare(offline, answers)
    assert result["places_wrong"] == 0 and result["rows_equal"] > 0.9 * USERS, result
    assert result["largest_score_difference"] < 1e-4
