"""ONNX graphs to TensorRT engines: strongly typed, one profile from the smallest to the largest batch.

``tensorrt`` builds ``model.plan`` for the official container and needs the GPU it builds for. ``tensorrt-rtx`` builds
ahead of time without any GPU; here it is the check that a graph compiles in TensorRT at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serving.runtime.tensorrt_plan import library


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
    errors: list[str] = []

    class Log(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(message)

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
    keep = timings is not None and trt.__name__ == "tensorrt"  # in TensorRT-RTX a timing cache does nothing
    if keep and timings is not None:
        known = timings.read_bytes() if timings.exists() else b""
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ValueError(f"TensorRT built no engine of {source.name}: {'; '.join(errors)[:500]}")
    target.write_bytes(engine)
    if keep and timings is not None:
        timings.write_bytes(config.get_timing_cache().serialize())
    return int(engine.nbytes)
