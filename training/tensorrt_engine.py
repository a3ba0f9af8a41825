"""ONNX graphs to TensorRT engines: strongly typed, one profile from the smallest to the largest batch.

``tensorrt`` builds ``model.plan`` for the official container and needs the GPU it builds for. ``tensorrt-rtx`` builds
ahead of time without any GPU; here it is the check that a graph compiles in TensorRT at all.
"""

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


def build(
    source: Path,
    target: Path,
    batches: tuple[int, int, int] = (1, 16, 64),
    name: str = "",
    sparse: bool = False,
    timings: Path | None = None,
    axes: Mapping[str, tuple[int, int, int]] | None = None,
) -> int:
    """Writes the engine of an ONNX graph with a free batch axis; returns its size in bytes. ``batches``: smallest,
    usual and largest; ``axes``: the same of an input's other free axis, by its name. ``sparse``: take 2:4 weights
    for what they are; ``timings``: file of TensorRT's timing cache, read and written. Plans run on later versions too
    where the library can write such. Raises ValueError with TensorRT's own words if a graph does not parse or build."""
    trt = library(name)
    said: list[str] = []

    class Log(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                said.append(message)

    log = Log()
    builder = trt.Builder(log)
    flags = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flags is None else 1 << int(flags))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(source.read_bytes()):
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise ValueError(f"TensorRT does not take {source.name}: {'; '.join(reasons)[:500]}")
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        fixed = list(tensor.shape)[1:]
        if -1 in fixed and tensor.name not in (axes or {}):
            raise ValueError(f"{source.name}: {tensor.name} has a free axis: expected its sizes in axes, got none")
        given = zip(batches, (axes or {}).get(tensor.name, batches), strict=True)
        profile.set_shape(tensor.name, *([b, *(n if d < 0 else d for d in fixed)] for b, n in given))
    config.add_optimization_profile(profile)
    # tensorrt-rtx has the flag but not the library that it needs
    for flag in ["SPARSE_WEIGHTS"] * sparse + ["VERSION_COMPATIBLE"] * (trt.__name__ == "tensorrt"):
        if hasattr(trt.BuilderFlag, flag):
            config.set_flag(getattr(trt.BuilderFlag, flag))
    keep = timings is not None and hasattr(config, "create_timing_cache")
    if keep and timings is not None:
        known = timings.read_bytes() if timings.exists() else b""
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ValueError(f"TensorRT built no engine of {source.name}: {'; '.join(said)[:500]}")
    target.write_bytes(engine)
    if keep and timings is not None:
        timings.write_bytes(config.get_timing_cache().serialize())
    return int(engine.nbytes)


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
            given = {n: torch.from_numpy(np.ascontiguousarray(v)).to(self.device) for n, v in feed.items()}
            for name, tensor in given.items():
                self.context.set_input_shape(name, tuple(tensor.shape))
                self.context.set_tensor_address(name, tensor.data_ptr())
            found = {}
            for name, (kind, _) in self.outputs.items():  # TensorRT wants an address for each
                shape = tuple(self.context.get_tensor_shape(name))
                found[name] = torch.empty(shape, dtype=kinds[kind], device=self.device)
                self.context.set_tensor_address(name, found[name].data_ptr())
            if not self.context.execute_async_v3(self.stream.cuda_stream):
                raise RuntimeError("the engine did not run; Triton's log says why")
            answers = {name: tensor.cpu() for name, tensor in found.items()}
        self.stream.synchronize()
        return {name: tensor.numpy() for name, tensor in answers.items()}
