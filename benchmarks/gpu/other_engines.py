"""Engines beside PyTorch's own: each takes a graph, its inputs on the device and a number format, and gives back a call
that answers with tensors. Raises an error that says why, where an engine is not here or does not take the graph."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[], Any]
NAMES = ["HISTORY_IDS", "CANDIDATE_IDS", "CANDIDATE_SCORES", "ENCODED_HISTORY"]  # of the ranker
OUT = ["RANKED_IDS", "RANKED_VALUES"]


def aoti(graph: nn.Module, given: list[Tensor], number_format: str) -> Call:
    """torch.export and AOTInductor: a shared library that needs no Python."""
    program = torch.export.export(graph, tuple(given))
    folder = Path(tempfile.mkdtemp(prefix="aoti-"))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "graph.pt2"))
    runner = torch._inductor.aoti_load_package(path, run_single_threaded=True)  # which a CUDA graph needs
    return lambda: runner(*given)


def to_onnx(graph: nn.Module, given: list[Tensor], path: Path) -> Path:
    """The ranker's graph as an ONNX file, in the number format that its weights and inputs have."""
    from training.compile.onnx_export import export

    export(copy.deepcopy(graph), tuple(x[:2].cpu() for x in given), NAMES, OUT, path)
    return path


def onnxruntime(graph: nn.Module, given: list[Tensor], number_format: str) -> Call:
    """ONNX Runtime, on CUDA where the inputs are there."""
    import onnxruntime as ort

    cuda = given[0].is_cuda
    if cuda and "CUDAExecutionProvider" not in ort.get_available_providers():
        raise ValueError(f"onnxruntime {ort.__version__} has {ort.get_available_providers()}, no CUDA")
    with tempfile.TemporaryDirectory() as folder:
        content = to_onnx(graph, given, Path(folder) / "graph.onnx").read_bytes()
    if not cuda:
        host = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
        feed = {n: x.numpy() for n, x in zip(NAMES, given, strict=True)}
        return lambda: [torch.from_numpy(x) for x in host.run(None, feed)]
    stream = torch.cuda.current_stream()
    options = {"user_compute_stream": str(stream.cuda_stream), "device_id": "0"}
    session = ort.InferenceSession(content, providers=[("CUDAExecutionProvider", options)])
    binding = session.io_binding()
    batch, count = given[1].shape
    kinds = {torch.int64: "int64", torch.float32: "float32", torch.float16: "float16"}
    outputs = [torch.empty_like(given[1]), torch.empty(batch, 3, count, device=given[1].device)]
    for bind, names, tensors in ((binding.bind_input, NAMES, given), (binding.bind_output, OUT, outputs)):
        for name, x in zip(names, tensors, strict=True):
            bind(name, "cuda", 0, kinds[x.dtype], tuple(x.shape), x.data_ptr())

    def call() -> list[Tensor]:
        session.run_with_iobinding(binding)
        return outputs

    return call


def tensorrt(graph: nn.Module, given: list[Tensor], number_format: str) -> Call:
    """TensorRT or TensorRT-RTX, whichever is here, through an ONNX file."""
    from serving.runtime.tensorrt_plan import library
    from training.compile.tensorrt_engine import build

    trt = library()
    if not given[0].is_cuda:
        raise ValueError(f"{trt.__name__} {trt.__version__}: plans run on a CUDA device, the inputs are on the CPU")
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "graph.plan"
        build(to_onnx(graph, given, Path(folder) / "graph.onnx"), plan, (1, len(given[0]), len(given[0])))
        content = plan.read_bytes()
    logger = trt.Logger(trt.Logger.ERROR)
    engine = trt.Runtime(logger).deserialize_cuda_engine(content)
    if engine is None:
        raise RuntimeError(f"{trt.__name__} {trt.__version__} built a plan that it does not load on this card")
    context = engine.create_execution_context()
    kinds = {"FLOAT": torch.float32, "HALF": torch.float16, "INT64": torch.int64, "INT32": torch.int32}
    for name, x in zip(NAMES, given, strict=True):
        context.set_input_shape(name, tuple(x.shape))
        context.set_tensor_address(name, x.data_ptr())
    outputs = []
    for name in OUT:
        kind = kinds[engine.get_tensor_dtype(name).name]
        outputs.append(torch.empty(tuple(context.get_tensor_shape(name)), dtype=kind, device=given[0].device))
        context.set_tensor_address(name, outputs[-1].data_ptr())

    def call() -> list[Tensor]:
        assert engine is not None and logger is not None  # they must outlive the context
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError(f"{trt.__name__} {trt.__version__}: the plan did not run")
        return outputs

    return call


OTHERS: dict[str, Callable[[nn.Module, list[Tensor], str], Call]] = {
    "aoti": aoti, "onnxruntime": onnxruntime, "tensorrt": tensorrt,
}  # fmt: skip
