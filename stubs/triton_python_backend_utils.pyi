"""What the Triton models use of the module that Triton's Python stub puts in their reach (Triton 2.51)."""

from collections.abc import Callable
from typing import ClassVar

import numpy as np

class TritonModelException(Exception): ...  # noqa: N818 - Triton's own name

class TritonError(Exception):
    UNKNOWN: ClassVar[int]
    INVALID_ARG: ClassVar[int]
    UNAVAILABLE: ClassVar[int]
    def __init__(self, message: str, code: int = ...) -> None: ...
    def message(self) -> str: ...

class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None: ...
    def name(self) -> str: ...
    def as_numpy(self) -> np.ndarray: ...

class InferenceRequest:
    def parameters(self) -> str: ...
    def requested_output_names(self) -> list[str]: ...

class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] = ..., error: TritonError | None = ...) -> None: ...
    def has_error(self) -> bool: ...

class Logger:
    @staticmethod
    def log_error(message: str) -> None: ...
    @staticmethod
    def log_warn(message: str) -> None: ...

class Metric:
    def increment(self, value: float) -> None: ...

class MetricFamily:
    COUNTER: ClassVar[int]
    def __init__(self, name: str, description: str, kind: int) -> None: ...
    def Metric(self, labels: dict[str, str]) -> Metric: ...  # noqa: N802 - Triton's own name

deserialize_bytes_tensor: Callable[[np.ndarray | bytes], np.ndarray]
serialize_byte_tensor: Callable[[np.ndarray], bytes | tuple[()]]

def get_input_tensor_by_name(inference_request: InferenceRequest, name: str) -> Tensor: ...
