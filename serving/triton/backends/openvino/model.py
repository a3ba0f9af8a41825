"""Triton Python-based backend ``openvino``: serves any model whose config says ``backend: "openvino"``.

Reads what Triton's C++ backend of that name reads: ``default_model_filename`` (ours names the ONNX file, which
OpenVINO reads as it is), and the parameters ``INFERENCE_NUM_THREADS``, ``NUM_STREAMS``, ``TARGET_DEVICE`` (CPU if
absent; GPU for an integrated one, NPU, AUTO) and ``HINT_BF16`` ("YES"; if absent float32, also where the CPU has
bfloat16).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from serving.triton.graph_model import GraphModel, Tensor, parameters

TRITON_OF_OPENVINO = {
    "f32": "TYPE_FP32",
    "f16": "TYPE_FP16",
    "f64": "TYPE_FP64",
    "i64": "TYPE_INT64",
    "i32": "TYPE_INT32",
    "i8": "TYPE_INT8",
    "u8": "TYPE_UINT8",
    "boolean": "TYPE_BOOL",
    "string": "TYPE_STRING",
}
PROPERTIES = ("INFERENCE_NUM_THREADS", "NUM_STREAMS")


class TritonPythonModel(GraphModel):
    runtime = "openvino"

    def open(self, path: Path, config: dict[str, Any], kind: str, device: str) -> None:
        given = parameters(config)
        target = given.get("TARGET_DEVICE") or ("GPU" if kind == "GPU" else "CPU")
        core = ov.Core()
        if target.split(".")[0].split(":")[0] not in {
            "AUTO",
            "HETERO",
            *(d.split(".")[0] for d in core.available_devices),
        }:
            raise ValueError(
                f"TARGET_DEVICE: expected one of {core.available_devices} or AUTO on this machine, got {target!r}"
            )
        settings = {key: given[key] for key in PROPERTIES if key in given}
        settings["INFERENCE_PRECISION_HINT"] = "bf16" if given.get("HINT_BF16") == "YES" else "f32"
        self.model = core.compile_model(core.read_model(path), target, settings)
        self.request = self.model.create_infer_request()
        self.named = {tensor["name"] for side in ("input", "output") for tensor in config.get(side, [])}

    def signature(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        inputs, outputs = (
            {
                name: Tensor(TRITON_OF_OPENVINO.get(t.element_type.get_type_name(), "?"), len(t.partial_shape))
                for t in side
                for name in (t.names & self.named or t.names)  # OpenVINO merges tensors that are one, with their names
            }
            for side in (self.model.inputs, self.model.outputs)
        )
        return inputs, outputs

    def run(self, outputs: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.request.infer({name: np.ascontiguousarray(value) for name, value in feed.items()})
        return [self.request.get_tensor(name).data.copy() for name in outputs]
