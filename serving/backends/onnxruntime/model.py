"""Triton Python-based backend ``onnxruntime``: serves any model whose config says ``backend: "onnxruntime"``.

Used where only pip is to be had; in the official container Triton's C++ backend of the same name takes its place and
reads the same configuration: ``default_model_filename``, tensor names, dtypes and dims, ``instance_group`` (one
session an instance), ``optimization.graph.level``, and the parameters ``intra_op_thread_count``,
``inter_op_thread_count``, ``execution_mode``, ``session.*`` entries as in the C++ backend's documentation.

This file is copied into the backend folder as it is, so it imports nothing of the project.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils

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


def model_path(config: dict, repository: str, version: str) -> Path:
    return Path(repository) / version / (config.get("default_model_filename") or "model.onnx")


def session_options(config: dict) -> ort.SessionOptions:
    """ONNX Runtime options of a Triton model config (its JSON form)."""
    parameters = {k: v.get("string_value", "") for k, v in config.get("parameters", {}).items()}
    options = ort.SessionOptions()
    options.intra_op_num_threads = int(parameters.get("intra_op_thread_count", 0))
    options.inter_op_num_threads = int(parameters.get("inter_op_thread_count", 0))
    if int(parameters.get("execution_mode", 0)) == 1:
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    if level not in GRAPH_LEVELS:
        raise ValueError(f"optimization.graph.level: expected one of {sorted(GRAPH_LEVELS)}, got {level}")
    options.graph_optimization_level = GRAPH_LEVELS[level]
    for key, value in parameters.items():
        if key.startswith("session."):
            options.add_session_config_entry(key, value)
    return options


def providers(kind: str, device_id: str) -> list:
    """Execution providers of an instance; asking for a GPU that ONNX Runtime cannot use is an error, not a fallback."""
    if kind != "GPU":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise ValueError(
            "instance_group asks for KIND_GPU, but this onnxruntime has only "
            f"{ort.get_available_providers()}; install onnxruntime-gpu or choose a CPU profile"
        )
    return [("CUDAExecutionProvider", {"device_id": int(device_id or 0)}), "CPUExecutionProvider"]


def check_signature(config: dict, session: ort.InferenceSession) -> None:
    """Raises ValueError where the config and the graph disagree on a name, dtype or rank."""
    batched = int(config.get("max_batch_size", 0)) > 0
    for side, graph in (("input", session.get_inputs()), ("output", session.get_outputs())):
        found = {t.name: t for t in graph}
        for tensor in config.get(side, []):
            name = tensor["name"]
            if name not in found:
                raise ValueError(
                    f"model '{config['name']}': {side} '{name}' is in config.pbtxt but the graph has {sorted(found)}"
                )
            want, got = tensor["data_type"], TRITON_OF_ONNX.get(found[name].type, found[name].type)
            if want != got:
                raise ValueError(f"model '{config['name']}': {side} '{name}': config says {want}, the graph says {got}")
            rank = len(tensor["dims"]) + batched
            if rank != len(found[name].shape):
                raise ValueError(
                    f"model '{config['name']}': {side} '{name}': config says rank {rank} with the batch axis, "
                    f"the graph says shape {found[name].shape}"
                )
        missing = set(found) - {t["name"] for t in config.get(side, [])}
        if side == "input" and missing:
            raise ValueError(f"model '{config['name']}': the graph needs inputs {sorted(missing)}, config.pbtxt lacks")


def decode(array: np.ndarray) -> np.ndarray:
    """Triton hands strings over as bytes objects; ONNX Runtime wants str."""
    if array.dtype.kind != "O":
        return array
    return np.array([b.decode() if isinstance(b, bytes) else b for b in array.ravel()], object).reshape(array.shape)


class TritonPythonModel:
    """One model instance: its own session; a batch of requests is one run of the graph."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config):  # noqa: ANN001, ANN205 - Triton's own types
        return auto_complete_model_config

    def initialize(self, args: dict) -> None:
        config = json.loads(args["model_config"])
        path = model_path(config, args["model_repository"], args["model_version"])
        if not path.exists():
            raise pb_utils.TritonModelException(f"model '{config['name']}': no file {path}; run 'vivace compile'")
        kind, device = args["model_instance_kind"], args["model_instance_device_id"]
        self.session = ort.InferenceSession(str(path), session_options(config), providers=providers(kind, device))
        check_signature(config, self.session)
        self.inputs = [t["name"] for t in config["input"]]
        self.outputs = [t["name"] for t in config["output"]]
        self.batched = int(config.get("max_batch_size", 0)) > 0
        gc.collect()
        gc.freeze()  # what is loaded stays: later collections need not walk it

    def execute(self, requests: list) -> list:
        if not self.batched:
            return [self._answer([request])[0] for request in requests]
        return self._answer(requests)

    def _answer(self, requests: list) -> list:
        try:
            columns = [
                [pb_utils.get_input_tensor_by_name(r, name).as_numpy() for r in requests] for name in self.inputs
            ]
            feed = {
                name: decode(parts[0] if len(parts) == 1 else np.concatenate(parts))
                for name, parts in zip(self.inputs, columns, strict=True)
            }
            results = self.session.run(self.outputs, feed)
        except Exception as error:
            if len(requests) > 1:  # find the request that is at fault: the others get their answers
                return [self._answer([request])[0] for request in requests]
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(f"onnxruntime: {error}"))]
        responses, start = [], 0
        for row, request in enumerate(requests):
            stop = start + (len(columns[0][row]) if self.batched else 0)
            wanted = request.requested_output_names()
            tensors = [
                pb_utils.Tensor(name, value[start:stop] if self.batched else value)
                for name, value in zip(self.outputs, results, strict=True)
                if name in wanted
            ]
            responses.append(pb_utils.InferenceResponse(tensors))
            start = stop
        return responses
