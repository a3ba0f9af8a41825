"""ONNX graphs to TensorRT engines: strongly typed, one profile from the smallest to the largest batch.

``tensorrt`` builds ``model.plan`` for the official container and needs the GPU it builds for. ``tensorrt-rtx`` builds
ahead of time without any GPU; here it is the check that a graph compiles in TensorRT at all.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

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


def build(source: Path, target: Path, batches: tuple[int, int, int] = (1, 16, 64), name: str = "") -> int:
    """Writes the engine of an ONNX graph with a free batch axis; returns its size in bytes. ``batches``: smallest,
    usual and largest. Raises ValueError with TensorRT's own words if the graph does not parse or build."""
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
        profile.set_shape(tensor.name, *([batch, *fixed] for batch in batches))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ValueError(f"TensorRT built no engine of {source.name}: {'; '.join(said)[:500]}")
    target.write_bytes(engine)
    return int(engine.nbytes)
