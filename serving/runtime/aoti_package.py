"""AOTInductor packages (``model.pt2``) at request time: from host memory to host memory, on the CPU or a CUDA device.

A package is for the kind of device that it was compiled for. On a CUDA device batches are filled up to a few sizes and
each size is recorded once as a CUDA graph; where that fails, kernels are launched one by one. Tensors are on the device
only inside ``run``. Axis legend: B rows of a batch, P rows it is filled up to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serving.runtime.batch_sizes import padded, padded_sizes


class Package:
    """``run(inputs)``: arrays in the order of the exported arguments, [B, …] each, to outputs in their order.

    ``device``: "cpu", "cuda:0", or "" for whatever the package was compiled for. ``largest``: rows of a batch at most.
    ``device_seconds``: time that the device worked, by CUDA events (0 on the CPU). Raises ValueError where the package
    does not fit the device.
    """

    def __init__(self, path: Path, device: str = "", largest: int = 256, say: Callable[[str], None] = print) -> None:
        import torch

        index = int(device.partition(":")[2] or 0) if device.startswith("cuda") else -1
        try:  # without the threads' locks, which a CUDA graph cannot record; an instance has one thread
            model = torch._inductor.aoti_load_package(str(path), run_single_threaded=True, device_index=index)
        except RuntimeError as error:
            raise ValueError(
                f"{path.name}: PyTorch {torch.__version__} does not take this package: {str(error).splitlines()[0]}; "
                "run 'vivace compile --target aoti' on this machine"
            ) from error
        self.loader: Any = model.loader
        built_for = str(self.loader.get_metadata().get("AOTI_DEVICE_KEY", "cpu"))
        if device and built_for != device.partition(":")[0]:
            raise ValueError(
                f"{path.name}: compiled for {built_for}, asked to run on {device}; run 'vivace compile --target aoti' "
                "on such a machine, or serve the profile 'aoti'"
            )
        self.device = torch.device(built_for, max(index, 0)) if built_for == "cuda" else torch.device("cpu")
        self.sizes, self.say = padded_sizes(largest), say
        self.graphs: dict[int, _Recorded] = {}
        self.recording = self.device.type == "cuda"
        self.device_seconds, self.wall_seconds = 0.0, 0.0

    def warm(self, shapes: Sequence[tuple[tuple[int, ...], np.dtype[Any]]]) -> list[np.ndarray]:
        """Runs each size once with zeros of these shapes (without the batch axis); the answers of the smallest."""
        answers: list[np.ndarray] = []
        for size in (self.sizes if self.recording else self.sizes[:1])[::-1]:  # the largest first: it sets the memory
            answers = self.run([np.zeros((size, *shape), dtype) for shape, dtype in shapes])
        return answers

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        import torch

        started = time.perf_counter()
        with torch.inference_mode():
            answers = self._on_cpu(inputs) if self.device.type == "cpu" else self._on_cuda(inputs)
        self.wall_seconds += time.perf_counter() - started
        return answers

    def _on_cpu(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        import torch

        outputs = self.loader.run([torch.from_numpy(_writable(x)) for x in inputs])
        return [y.numpy() for y in outputs]

    def _on_cuda(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        import torch

        rows = len(inputs[0])
        size = padded(rows, self.sizes)
        with torch.cuda.device(self.device):
            if size not in self.graphs:
                self.graphs[size] = _Recorded(self.loader, inputs, size, self.device, self.recording)
                if self.recording and self.graphs[size].graph is None:
                    self.recording = False
                    self.say(f"no CUDA graphs, kernels are launched one by one: {self.graphs[size].failure}")
            recorded = self.graphs[size]
            answers = recorded.run(inputs)
            self.device_seconds += recorded.device_seconds
        return answers


def _writable(array: np.ndarray) -> np.ndarray:
    """C-contiguous and writable, as torch.from_numpy takes it without a warning."""
    array = np.ascontiguousarray(array)
    return array if array.flags.writeable else array.copy()


class _Recorded:
    """One size of batch on a CUDA device: buffers in pinned host memory and on the device, and the recorded kernels
    (``graph`` None: they are launched, ``failure`` says why)."""

    def __init__(self, loader: Any, inputs: Sequence[np.ndarray], size: int, device: Any, record: bool) -> None:
        import torch

        self.loader, self.graph, self.failure, self.device_seconds = loader, None, "", 0.0
        host = [torch.zeros((size, *x.shape[1:]), dtype=torch.from_numpy(_writable(x[:0])).dtype) for x in inputs]
        self.host_in = [x.pin_memory() for x in host]
        self.views = [x.numpy() for x in self.host_in]
        self.static_in = [x.to(device) for x in host]
        self.stream = torch.cuda.Stream(device)
        self.begin, self.end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self.stream):
            for _ in range(2):  # kernels are loaded and libraries take their memory, which no graph may record
                self.static_out = loader.run(list(self.static_in))
        self.stream.synchronize()
        if record:
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                    self.static_out = loader.run(list(self.static_in))
                self.graph = graph
            except RuntimeError as error:
                self.failure = str(error).splitlines()[0]
                torch.cuda.synchronize(device)
        self.host_out = [torch.empty(y.shape, dtype=y.dtype, pin_memory=True) for y in self.static_out]

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        import torch

        rows = len(inputs[0])
        for view, x in zip(self.views, inputs, strict=True):
            view[:rows] = x
        with torch.cuda.stream(self.stream):
            self.begin.record(self.stream)
            for there, here in zip(self.static_in, self.host_in, strict=True):
                there[:rows].copy_(here[:rows], non_blocking=True)
            if self.graph is not None:
                self.graph.replay()
            else:
                self.static_out = self.loader.run(list(self.static_in))
            for here, there in zip(self.host_out, self.static_out, strict=True):
                here[:rows].copy_(there[:rows], non_blocking=True)
            self.end.record(self.stream)
        self.end.synchronize()
        self.device_seconds = self.begin.elapsed_time(self.end) / 1000
        return [y[:rows].numpy().copy() for y in self.host_out]
