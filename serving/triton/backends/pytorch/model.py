"""Triton Python-based backend ``pytorch``: serves AOTInductor packages.

Reads what Triton's C++ backend of that name reads since 26.05
(https://github.com/triton-inference-server/pytorch_backend#aot-inductor-support-beta): the file ``model.pt2`` unless
``default_model_filename`` names another, tensors by their place ("INPUT__0", "OUTPUT__0"), ``instance_group``
(KIND_MODEL: the device that the package was compiled for), and the parameter INTRA_OP_THREAD_COUNT. Two things differ:

- the C++ backend needs ``platform: "torch_aoti"``, which Triton 2.51 refuses ("unexpected 'platform' and 'backend'
  pair"): the profile "aoti" is without, "aoti-container" with it;
- the C++ backend takes one row at a time so far; this one whole batches, filled up to a few sizes and replayed as CUDA
  graphs.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from serving.runtime.aoti_package import Package
from serving.triton.graph_model import GraphModel, Tensor, parameters

NUMPY_OF_TRITON = {
    "TYPE_FP32": "float32",
    "TYPE_FP16": "float16",
    "TYPE_FP64": "float64",
    "TYPE_INT64": "int64",
    "TYPE_INT32": "int32",
    "TYPE_INT8": "int8",
    "TYPE_UINT8": "uint8",
    "TYPE_BOOL": "bool",
}
TRITON_OF_NUMPY = {name: triton for triton, name in NUMPY_OF_TRITON.items()}
PLACE = re.compile(r"(?:INPUT|OUTPUT)__(\d+)")
EVERY_S = 0.25  # between two hand-overs of the counters, each a call to another process


class TritonPythonModel(GraphModel):
    runtime = "pytorch"
    default_file = "model.pt2"

    def open(self, path: Path, config: dict[str, Any], kind: str, device: str) -> None:
        import torch

        given = parameters(config)
        torch.set_num_threads(int(given.get("INTRA_OP_THREAD_COUNT", 1)))
        chosen = {"CPU": "cpu", "GPU": f"cuda:{device or 0}"}.get(kind, "")
        if kind == "GPU" and not torch.cuda.is_available():
            raise ValueError(f"model '{config['name']}': instance_group asks for KIND_GPU, PyTorch sees no CUDA device")
        self.package = Package(path, chosen, int(config.get("max_batch_size", 0)) or 1, pb_utils.Logger.log_warn)
        self.places = {side: [_place(t["name"]) for t in config[side]] for side in ("input", "output")}
        shapes = sorted(
            (place, tuple(int(d) for d in t["dims"]), np.dtype(NUMPY_OF_TRITON[t["data_type"]]))
            for place, t in zip(self.places["input"], config["input"], strict=True)
        )
        answers = self.package.warm([(dims, dtype) for _, dims, dtype in shapes])
        self.tensors = (
            {t["name"]: Tensor(t["data_type"], len(t["dims"]) + 1) for t in config["input"]},
            {f"OUTPUT__{i}": Tensor(TRITON_OF_NUMPY[str(x.dtype)], x.ndim) for i, x in enumerate(answers)},
        )
        self.package.device_seconds = self.package.wall_seconds = 0.0
        self._counters = _counters(config["name"])
        self._counted, self._last = [0.0, 0.0], time.monotonic()

    def signature(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.tensors

    def run(self, outputs: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        results = self.package.run([feed[name] for name in sorted(feed, key=_place)])
        self._count()
        return [results[_place(name)] for name in outputs]

    def _count(self) -> None:
        if time.monotonic() - self._last < EVERY_S:
            return
        spent = [self.package.device_seconds, self.package.wall_seconds]
        for counter, now, before in zip(self._counters, spent, self._counted, strict=True):
            counter.increment(now - before)
        self._counted, self._last = spent, time.monotonic()


def _place(name: str) -> int:
    match = PLACE.fullmatch(name)
    if match is None:
        raise ValueError(f"tensor '{name}': expected INPUT__<place> or OUTPUT__<place>")
    return int(match.group(1))


def _counters(model: str) -> list[Any]:
    """Seconds of device time by CUDA events, and of waiting for it, on Triton's metrics page."""
    described = {
        "vivace_device_seconds_total": "Time the device worked on a model's batches, copies included",
        "vivace_package_seconds_total": "Wall time of a model's batches, from host memory to host memory",
    }
    counters = []
    for name, description in described.items():
        family = pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.COUNTER)
        counters.append(family.Metric(labels={"model": model}))
        _FAMILIES.append(family)  # a metric lives as long as its family
    return counters


_FAMILIES: list[Any] = []
