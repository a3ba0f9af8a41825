"""Triton Python-based backend ``onnxruntime``: serves any model whose config says ``backend: "onnxruntime"``.

Reads what Triton's C++ backend of that name reads: ``default_model_filename``, tensor names, dtypes and dims,
``instance_group`` (one session an instance), ``optimization.graph.level``, options of the CUDA provider in
``optimization.execution_accelerators``, and the parameters ``intra_op_thread_count``, ``inter_op_thread_count``,
``execution_mode``, ``session.*`` entries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from serving.triton.graph_model import GraphModel, Tensor, parameters
from vivace.onnx_session import open_session

TRITON_OF_ONNX = {
    "tensor(float)": "TYPE_FP32",
    "tensor(float16)": "TYPE_FP16",
    "tensor(double)": "TYPE_FP64",
    "tensor(int64)": "TYPE_INT64",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int8)": "TYPE_INT8",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(bool)": "TYPE_BOOL",
    "tensor(string)": "TYPE_STRING",
}
# optimization.graph.level as the C++ backend reads it; absent or 0 means everything
GRAPH_LEVELS = {
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    0: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}


def options_of(config: dict[str, Any]) -> ort.SessionOptions:
    """ONNX Runtime options of a Triton model config (its JSON form)."""
    settings = parameters(config)
    options = ort.SessionOptions()
    options.intra_op_num_threads = int(settings.get("intra_op_thread_count", 0))
    options.inter_op_num_threads = int(settings.get("inter_op_thread_count", 0))
    if int(settings.get("execution_mode", 0)) == 1:
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    if level not in GRAPH_LEVELS:
        raise ValueError(f"optimization.graph.level: expected one of {sorted(GRAPH_LEVELS)}, got {level}")
    options.graph_optimization_level = GRAPH_LEVELS[level]
    for key, value in settings.items():
        if key.startswith("session."):
            options.add_session_config_entry(key, value)
    return options


def cuda_options(config: dict[str, Any]) -> dict[str, str]:
    """What a config says of ONNX Runtime's CUDA provider, by the provider's own names."""
    accelerators = config.get("optimization", {}).get("execution_accelerators", {})
    options: dict[str, str] = {}
    for accelerator in accelerators.get("gpu_execution_accelerator", []):
        if accelerator.get("name") == "cuda":
            options |= accelerator.get("parameters", {})
    return options


def providers(kind: str, device_id: str, options: dict[str, str]) -> list[Any]:
    """Execution providers of an instance; asking for a GPU that ONNX Runtime cannot use is an error, not a fallback.
    ``options``: of the CUDA provider."""
    if kind != "GPU":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise ValueError(
            "instance_group asks for KIND_GPU, but this onnxruntime has only "
            f"{ort.get_available_providers()}; install onnxruntime-gpu or choose a CPU profile"
        )
    return [("CUDAExecutionProvider", {**options, "device_id": int(device_id or 0)}), "CPUExecutionProvider"]


class TritonPythonModel(GraphModel):
    runtime = "onnxruntime"

    def open(self, path: Path, config: dict[str, Any], kind: str, device: str) -> None:
        chosen = providers(kind, device, cuda_options(config))
        self.session = open_session(path, providers=chosen, options=options_of(config))

    def signature(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        inputs, outputs = (
            {t.name: Tensor(TRITON_OF_ONNX.get(t.type, t.type), len(t.shape)) for t in side}
            for side in (self.session.get_inputs(), self.session.get_outputs())
        )
        return inputs, outputs

    def run(self, outputs: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        results: list[np.ndarray] = self.session.run(outputs, feed)
        return results
