"""What a compiled run is made ready for, beside ONNX Runtime on the CPU: each target is checked or built, and says what
was run and what was only exported.

================  ==================================================================================================
openvino          OpenVINO reads the same ONNX files; run here and compared with ONNX Runtime
cuda              ONNX Runtime's CUDA provider reads the same files; run and compared where there is a GPU
tensorrt          ``model.plan`` for the GPU at hand, for Triton's own backend; needs one
tensorrt-rtx      ``model.plan`` built ahead of time without a GPU, for the Python-based backend
aoti              ``model.pt2`` by AOTInductor, for the GPU at hand, else for this CPU; run and compared
================  ==================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from training.compile import aoti
from training.compile.tensorrt_engine import build
from training.judge.parity import difference
from vivace import contract
from vivace.onnx_session import open_session

TargetName = Literal["openvino", "cuda", "tensorrt", "tensorrt-rtx", "aoti"]
TARGETS: tuple[TargetName, ...] = get_args(TargetName)
PLAN = "model.plan"

Run = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]


def on_openvino(path: Path, threads: int = 1, device: str = "CPU", bf16: bool = False) -> Run:
    """The graph on an OpenVINO device, in float32 unless ``bf16``. Raises ValueError where OpenVINO is missing."""
    try:
        import openvino as ov
    except ImportError:
        raise ValueError("--target openvino: expected the package, found none; pip install openvino") from None
    core = ov.Core()
    settings = {"INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32"}
    if device == "CPU":
        settings |= {"INFERENCE_NUM_THREADS": str(threads), "NUM_STREAMS": "1"}
    model = core.compile_model(core.read_model(path), device, settings)
    request = model.create_infer_request()

    def run(feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        request.infer(dict(feed))
        return [request.get_output_tensor(i).data.copy() for i in range(len(model.outputs))]

    return run


def on_cuda(path: Path) -> Run:
    """The graph under ONNX Runtime's CUDA provider. Raises ValueError without one."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise ValueError(
            f"--target cuda: expected onnxruntime with CUDAExecutionProvider, got {ort.get_available_providers()}; "
            "pip install onnxruntime-gpu on a machine with a GPU"
        )
    session = open_session(path, providers=["CUDAExecutionProvider"])
    return lambda feed: session.run(None, dict(feed))


def make(
    target: str,
    folder: Path,
    feeds: Mapping[str, Mapping[str, np.ndarray]],
    batches: tuple[int, int, int],
    graphs: Mapping[str, nn.Module],
) -> dict[str, float]:
    """Checks or builds one target of the graphs in ``folder``; ``feeds``: example inputs by stage; ``graphs``: what
    the ONNX files were exported from. Returns what to record: how far the answers are from ONNX Runtime's on the CPU
    (see ``parity``), or the sizes of the plans. Raises ValueError."""
    if target not in TARGETS:
        raise ValueError(f"--target: expected one of {TARGETS}, got {target!r}")
    if target.startswith("tensorrt"):
        if target == "tensorrt" and not has_gpu():
            raise ValueError(
                "--target tensorrt: a plan is built on the GPU it is for, and there is none; --target tensorrt-rtx "
                "builds ahead of time on any machine"
            )
        library = target.replace("-", "_")
        spread = {n: {name: (1, v.shape[1], v.shape[1]) for name, v in feed.items()} for n, feed in feeds.items()}
        return {
            f"{n} bytes": build(folder / f"{n}.onnx", folder / f"{n}.plan", batches, library, axes=spread[n])
            for n in feeds
        }
    apart: dict[str, float] = {}
    packages = {}
    if target == "aoti":
        examples = {name: [torch.from_numpy(x) for x in feed.values()] for name, feed in feeds.items()}
        packages = aoti.build(graphs, examples, folder)
    for name, feed in feeds.items():
        if name in packages:
            run = aoti.on_package(packages[name], max(len(x) for x in feed.values()))
        else:
            run = (on_openvino if target == "openvino" else on_cuda)(folder / f"{name}.onnx")
        expected = open_session(folder / f"{name}.onnx", threads=0)
        names = [t.name for t in expected.get_outputs()]
        by_tensor = difference(expected.run(None, dict(feed)), run(feed), names)
        apart |= {f"{name}, {tensor}": value for tensor, value in by_tensor.items()}
    return apart


def has_gpu() -> bool:
    return torch.cuda.is_available()


def files(folder: Path) -> dict[str, dict[str, Path]]:
    """Plans and packages that were built, for the repository, by stage."""
    built = {
        stage: {name: folder / f"{stage}{Path(name).suffix}" for name in (PLAN, aoti.PACKAGE)}
        for stage in (contract.RETRIEVAL, contract.RANKING)
    }
    there = {stage: {n: p for n, p in paths.items() if p.exists()} for stage, paths in built.items()}
    return {stage: paths for stage, paths in there.items() if paths}
