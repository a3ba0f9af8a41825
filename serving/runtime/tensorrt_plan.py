"""TensorRT plans at request time: one engine on a CUDA device, from host memory to host memory."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

LIBRARIES = ("tensorrt", "tensorrt_rtx")


def library(name: str = "") -> Any:
    """The TensorRT at hand (or the named one). Raises ValueError naming what to install."""
    for candidate in [name] if name else LIBRARIES:
        try:
            return importlib.import_module(candidate)
        except ImportError:
            continue
    raise ValueError(
        f"TensorRT: expected {name or ' or '.join(LIBRARIES)}, found none; pip install tensorrt-cu13 (with a GPU) or "
        "tensorrt-rtx"
    )


class Plan:
    """An engine file on a CUDA device; tensors pass through PyTorch's memory there. ``run`` is from host memory to host
    memory. Raises ValueError where there is no device or TensorRT does not take the file."""

    def __init__(self, path: Path, device: int = 0, name: str = "") -> None:
        import torch

        if not torch.cuda.is_available():
            raise ValueError(f"{path.name}: expected a CUDA device, got none; choose a profile without a GPU")
        trt = library(name)
        self.device = torch.device("cuda", device)
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
        self.inputs: dict[str, tuple[str, int]] = {}  # name to TensorRT's name of the type and the number of axes
        self.outputs: dict[str, tuple[str, int]] = {}
        for i in range(self.engine.num_io_tensors):
            tensor = self.engine.get_tensor_name(i)
            side = self.inputs if self.engine.get_tensor_mode(tensor).name == "INPUT" else self.outputs
            side[tensor] = (self.engine.get_tensor_dtype(tensor).name, len(self.engine.get_tensor_shape(tensor)))

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name of inputs by name."""
        import torch

        kinds = {
            "FLOAT": torch.float32, "HALF": torch.float16, "INT64": torch.int64, "INT32": torch.int32,
            "INT8": torch.int8, "UINT8": torch.uint8, "BOOL": torch.bool,
        }  # fmt: skip
        with torch.cuda.stream(self.stream):
            device_inputs = {n: torch.from_numpy(np.ascontiguousarray(v)).to(self.device) for n, v in feed.items()}
            for name, tensor in device_inputs.items():
                self.context.set_input_shape(name, tuple(tensor.shape))
                self.context.set_tensor_address(name, tensor.data_ptr())
            device_outputs = {}
            for name, (kind, _) in self.outputs.items():  # TensorRT wants an address for each
                shape = tuple(self.context.get_tensor_shape(name))
                device_outputs[name] = torch.empty(shape, dtype=kinds[kind], device=self.device)
                self.context.set_tensor_address(name, device_outputs[name].data_ptr())
            if not self.context.execute_async_v3(self.stream.cuda_stream):
                raise RuntimeError("the engine did not run; Triton's log says why")
            answers = {name: tensor.cpu() for name, tensor in device_outputs.items()}
        self.stream.synchronize()
        return {name: tensor.numpy() for name, tensor in answers.items()}
