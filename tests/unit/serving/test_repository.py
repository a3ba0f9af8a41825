"""Configurations are rendered from the contract, and the checkout's are the default rendering."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from serving import repository
from vivace import contract
from vivace.run import Run


def test_committed_configs_are_the_rendered_ones(tmp_path):
    repository.write_configs(tmp_path, repository.DEFAULT_SHAPES, repository.DEFAULT_HEADS)
    for rendered in sorted(tmp_path.rglob("*.pbtxt")):
        committed = repository.CHECKOUT_REPOSITORY / rendered.relative_to(tmp_path)
        assert committed.read_text() == rendered.read_text(), f"{committed}: run python -m serving.repository"


def test_every_ensemble_tensor_has_one_source():
    configs = repository.model_configs(repository.DEFAULT_SHAPES, repository.DEFAULT_HEADS, repository.PROFILES[""])
    known = {t.name for t in configs[contract.ENSEMBLE].input}
    for step in configs[contract.ENSEMBLE].ensemble_scheduling.step:
        model = configs[step.model_name]
        assert {t.name for t in model.input} == set(step.input_map) and set(step.input_map.values()) <= known
        assert {t.name for t in model.output} == set(step.output_map)
        assert not known & set(step.output_map.values())
        known |= set(step.output_map.values())
    assert {t.name for t in configs[contract.ENSEMBLE].output} <= known


@pytest.mark.parametrize("search", [0, 8])
def test_no_two_stages_are_at_work_for_one_request(search):
    """Triton 2.51 loses requests and corrupts its memory where a stage fails beside another."""
    shapes = replace(repository.DEFAULT_SHAPES, search=search)
    configs = repository.model_configs(shapes, repository.DEFAULT_HEADS, repository.PROFILES[""])
    known = {t.name for t in configs[contract.ENSEMBLE].input}
    waiting = list(configs[contract.ENSEMBLE].ensemble_scheduling.step)
    while waiting:
        (step,) = (s for s in waiting if set(s.input_map.values()) <= known)
        waiting.remove(step)
        known |= set(step.output_map.values())


@pytest.mark.parametrize("profile", sorted(repository.PROFILES))
def test_queues_of_the_ensemble_are_bounded_and_calls_that_store_wait_for_no_policy(profile):
    """With any policy Triton 2.51 lets some calls wait for half a second: docs/log.md, upserts that waited."""
    configs = repository.model_configs(
        repository.DEFAULT_SHAPES, repository.DEFAULT_HEADS, repository.PROFILES[profile]
    )
    for name, config in configs.items():
        if config.HasField("dynamic_batching"):
            bounded = config.dynamic_batching.HasField("default_queue_policy")
            assert bounded == (name not in repository.STORE_MODELS), name


def test_the_gpu_profile_moves_only_the_onnx_stages():
    configs = repository.model_configs(repository.DEFAULT_SHAPES, repository.DEFAULT_HEADS, repository.PROFILES["gpu"])
    kinds = {name: {g.kind for g in m.instance_group} for name, m in configs.items() if name != contract.ENSEMBLE}
    on_gpu = {name for name, kind in kinds.items() if kind == {repository.pb.ModelInstanceGroup.KIND_GPU}}
    assert on_gpu == set(repository.ONNX_STAGES)


def test_a_new_version_holds_every_model_and_one_number(tmp_path):
    file = tmp_path / "graph"
    file.write_text("x")
    files = {contract.RETRIEVAL: {"model.onnx": file}}
    target = tmp_path / "repository"
    versions = [
        repository.assemble(target, repository.DEFAULT_SHAPES, repository.DEFAULT_HEADS, files) for _ in range(3)
    ]
    assert versions == [1, 2, 3]
    models = set(repository.ALL_MODELS) - {contract.QUERY_SEARCH}
    assert {p.name for p in target.iterdir() if p.is_dir()} == models
    assert {p.name for p in target.glob("*/*") if p.is_dir() and p.name.isdigit()} == {"3"}
    assert (target / contract.RETRIEVAL / "3" / "model.onnx").read_text() == "x"


def test_a_profile_that_is_not_there_is_refused(tmp_path):
    run = Run(tmp_path / "shop")
    repository.write_configs(run.repository, repository.DEFAULT_SHAPES, repository.DEFAULT_HEADS)
    assert repository.profiles(run.repository) == sorted(set(repository.PROFILES) - {""})
    for profile in repository.PROFILES:
        assert contract.APPEND_EVENT in repository.models(run.repository, profile)
        assert repository.served_from(run.root, profile) == run.root
    names = ", ".join(["ensemble", *sorted(set(repository.PROFILES) - {""})])
    asks = (
        repository.models,
        repository.check_profile,
        lambda *where: repository.read_config(where[0], contract.ENSEMBLE, where[1]),
    )
    for ask in asks:
        with pytest.raises(ValueError, match=f"one of {names}, or no --profile"):
            ask(run.repository, "fast")


def test_a_tuned_profile_goes_with_the_graphs_it_was_tuned_for(tmp_path):
    run = Run(tmp_path / "shop")
    engine = Run(run.variants / "small")
    shapes, heads = repository.DEFAULT_SHAPES, repository.DEFAULT_HEADS
    repository.write_configs(engine.repository, shapes, heads)
    repository.write_profile(engine.repository, shapes, heads, "quick", repository.PROFILES["fused"])
    run.tuning.mkdir()
    record = {"chosen": {"trial": {"engine": "compressed/small"}}}
    (run.tuning / "quick.json").write_text(json.dumps(record))
    assert repository.served_from(run.root, "quick") == engine.root
    (run.tuning / "nothing.json").write_text('{"chosen": null}')  # none met its objective
    assert repository.tuned_for(engine) == ["quick"] and repository.tuned_for(run) == []
    repository.write_configs(engine.repository, shapes, heads)  # compiled anew
    with pytest.raises(ValueError, match=r"compiled anew since; run 'vivace tune --name shop --save-as quick' again"):
        repository.served_from(run.root, "quick")


def test_more_candidates_than_items_is_refused():
    with pytest.raises(ValueError, match="at most the 47 items"):
        contract.StageTensors(history=10, candidates=100, items=50, width=8)
