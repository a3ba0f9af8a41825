"""Triton Python-based backend ``tensorrt``: serves any model whose config says ``backend: "tensorrt"``.

Reads what Triton's C++ backend of that name reads: ``default_model_filename`` ("model.plan" if absent) and
``instance_group`` (one execution context an instance, on its device). Runs plans of ``tensorrt`` or, where that is not
installed, of ``tensorrt_rtx``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from serving.runtime.tensorrt_plan import Plan
from serving.triton.graph_model import GraphModel, Tensor

TRITON_OF_TENSORRT = {
    "FLOAT": "TYPE_FP32",
    "HALF": "TYPE_FP16",
    "INT64": "TYPE_INT64",
    "INT32": "TYPE_INT32",
    "INT8": "TYPE_INT8",
    "UINT8": "TYPE_UINT8",
    "BOOL": "TYPE_BOOL",
}


class TritonPythonModel(GraphModel):
    runtime = "tensorrt"
    default_file = "model.plan"

    def open(self, path: Path, config: dict[str, Any], kind: str, device: str) -> None:
        if kind != "GPU":
            raise ValueError(f"model '{config['name']}': backend tensorrt: expected KIND_GPU, got KIND_{kind}")
        self.plan = Plan(path, int(device or 0))

    def signature(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        inputs, outputs = (
            {name: Tensor(TRITON_OF_TENSORRT.get(datatype, "?"), rank) for name, (datatype, rank) in side.items()}
            for side in (self.plan.inputs, self.plan.outputs)
        )
        return inputs, outputs

    def run(self, outputs: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        results = self.plan.run(feed)
        return [results[name] for name in outputs]
