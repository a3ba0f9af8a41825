"""Triton Python-based backend ``tensorrt``: serves any model whose config says ``backend: "tensorrt"``.

Reads what Triton's C++ backend of that name reads: ``default_model_filename`` ("model.plan" if absent) and
``instance_group`` (one execution context an instance, on its device). Runs plans of ``tensorrt`` or, where that is not
installed, of ``tensorrt_rtx``; tensors pass through PyTorch's CUDA memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from serving.graph_model import GraphModel, Tensor
from training.tensorrt_engine import library

TRITON_OF_TENSORRT = {
    "FLOAT": "TYPE_FP32",
    "HALF": "TYPE_FP16",
    "INT64": "TYPE_INT64",
    "INT32": "TYPE_INT32",
    "INT8": "TYPE_INT8",
    "UINT8": "TYPE_UINT8",
    "BOOL": "TYPE_BOOL",
}
TORCH_OF_TRITON = {
    "TYPE_FP32": torch.float32,
    "TYPE_FP16": torch.float16,
    "TYPE_INT64": torch.int64,
    "TYPE_INT32": torch.int32,
    "TYPE_INT8": torch.int8,
    "TYPE_UINT8": torch.uint8,
    "TYPE_BOOL": torch.bool,
}


class TritonPythonModel(GraphModel):
    runtime = "tensorrt"
    default_file = "model.plan"

    def open(self, path: Path, config: dict[str, Any], kind: str, device: str) -> None:
        if kind != "GPU" or not torch.cuda.is_available():
            raise ValueError(
                f"model '{config['name']}': backend tensorrt: expected KIND_GPU and a CUDA device, got KIND_{kind} and "
                f"{torch.cuda.device_count()} devices; choose another profile"
            )
        trt = library()
        self.device = torch.device("cuda", int(device or 0))
        torch.cuda.set_device(self.device)
        self.logger = trt.Logger(trt.Logger.ERROR)
        self.engine = trt.Runtime(self.logger).deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise ValueError(
                f"{path}: TensorRT {trt.__version__} does not take this plan: it was built for another GPU or version; "
                "run 'vivace compile --target tensorrt' on this machine"
            )
        self.context = self.engine.create_execution_context()
        self.stream = torch.cuda.Stream(self.device)

    def signature(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        sides: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for i in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(i)
            side = sides[0 if self.engine.get_tensor_mode(name).name == "INPUT" else 1]
            kind = TRITON_OF_TENSORRT.get(self.engine.get_tensor_dtype(name).name, "?")
            side[name] = Tensor(kind, len(self.engine.get_tensor_shape(name)))
        return sides

    def run(self, outputs: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        _, produced = self.signature()
        with torch.cuda.stream(self.stream):
            given = {n: torch.from_numpy(np.ascontiguousarray(v)).to(self.device) for n, v in feed.items()}
            for name, tensor in given.items():
                self.context.set_input_shape(name, tuple(tensor.shape))
                self.context.set_tensor_address(name, tensor.data_ptr())
            found = {}
            for name, tensor in produced.items():  # TensorRT wants an address for each
                shape = tuple(self.context.get_tensor_shape(name))
                found[name] = torch.empty(shape, dtype=TORCH_OF_TRITON[tensor.datatype], device=self.device)
                self.context.set_tensor_address(name, found[name].data_ptr())
            if not self.context.execute_async_v3(self.stream.cuda_stream):
                raise RuntimeError("the engine did not run; Triton's log says why")
            answers = [found[name].cpu() for name in outputs]
        self.stream.synchronize()
        return [a.numpy() for a in answers]
