"""Profiles for GPUs, against what Triton documents of its own backends:

- pytorch_backend, README of 26.05, "AOT Inductor Support": ``platform: "torch_aoti"``, ``model.pt2``, tensors by place,
  no batches of more than one row;
- onnxruntime_backend, README, "ONNX Runtime with CUDA Execution Provider optimization";
- common/protobuf/model_config.proto, ``ModelOptimizationPolicy.Cuda``: graphs and ``graph_spec``, for TensorRT alone.
"""

from __future__ import annotations

import pytest

from serving import repository
from serving.repository import DEFAULT_HEADS, DEFAULT_SHAPES, PROFILES, pb
from serving.runtime.batch_sizes import padded, padded_sizes
from vivace import contract


def configs(profile: str) -> dict[str, pb.ModelConfig]:
    return repository.model_configs(DEFAULT_SHAPES, DEFAULT_HEADS, PROFILES[profile])


@pytest.mark.parametrize("profile", ["aoti", "aoti-container"])
def test_a_package_is_called_by_the_place_of_its_tensors(profile):
    s, models = DEFAULT_SHAPES, configs(profile)
    for stage, inputs in (
        (contract.RETRIEVAL, contract.retrieval_inputs(s)),
        (contract.RANKING, contract.ranking_inputs(s)),
    ):
        config = models[stage]
        assert (config.backend, config.default_model_filename) == ("pytorch", "model.pt2")
        assert [t.name for t in config.input] == [f"INPUT__{i}" for i in range(len(inputs))]
        assert [tuple(t.dims) for t in config.input] == [t.dims for t in inputs]
        assert config.parameters["INFERENCE_MODE"].string_value == "true"
    step = next(s for s in models[contract.ENSEMBLE].ensemble_scheduling.step if s.model_name == contract.RANKING)
    assert step.input_map["INPUT__1"] == s.candidate_ids.name
    assert step.output_map["OUTPUT__0"] == s.ranked_ids.name


def test_only_the_container_is_told_the_platform_and_it_takes_one_row():
    ours, containers = configs("aoti")[contract.RANKING], configs("aoti-container")[contract.RANKING]
    assert (ours.platform, containers.platform) == ("", "torch_aoti")
    assert ours.max_batch_size > 1 == containers.max_batch_size
    kinds = [config.instance_group[0].kind for config in (ours, containers)]
    assert kinds == [pb.ModelInstanceGroup.KIND_MODEL, pb.ModelInstanceGroup.KIND_GPU]
    assert {c.max_batch_size for c in configs("aoti-container").values()} == {1}  # an ensemble's is its models'


def test_options_of_the_cuda_provider_go_by_its_own_names():
    (accelerator,) = configs("gpu")[contract.RETRIEVAL].optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, dict(accelerator.parameters)) == ("cuda", {"use_ep_level_unified_stream": "1"})
    assert not configs("")[contract.RETRIEVAL].optimization.HasField("execution_accelerators")


def test_tensorrt_records_a_graph_for_each_size_of_batch():
    for stage in repository.ONNX_STAGES:
        config = configs("tensorrt-graphs")[stage]
        cuda = config.optimization.cuda
        assert cuda.graphs and [g.batch_size for g in cuda.graph_spec] == [8, 16, 32, 64, 128, 256]
        assert config.max_batch_size == 256
        for spec in cuda.graph_spec:  # shapes without the batch axis
            assert {name: tuple(shape.dim) for name, shape in spec.input.items()} == {
                t.name: tuple(t.dims) for t in config.input
            }
    assert not configs("tensorrt")[contract.RANKING].optimization.cuda.graphs


def test_a_batch_is_filled_up_to_the_next_size():
    assert padded_sizes(256) == (8, 16, 32, 64, 128, 256)
    assert padded_sizes(100) == (8, 16, 32, 64, 100)
    assert padded_sizes(1) == (1,)
    assert [padded(rows, padded_sizes(100)) for rows in (1, 8, 9, 65, 100)] == [8, 8, 16, 100, 100]
    with pytest.raises(ValueError, match="at most 100 rows, got 101"):
        padded(101, padded_sizes(100))
