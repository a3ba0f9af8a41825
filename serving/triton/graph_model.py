"""What the Python-based backends share: from a batch of Triton's requests to one run of a graph, and back.

``serving/triton/backends/<name>/model.py`` stands in for Triton's C++ backend of that name where only pip is to be had
and reads the same configuration. Runs inside Triton's Python stub only (it imports ``triton_python_backend_utils``).
"""

from __future__ import annotations

import functools
import gc
import json
import math
import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from serving.process import close_callers, give_way
from vivace import contract
from vivace.store.interface import StoreError


@dataclass(frozen=True)
class Tensor:
    """One input or output of a graph: Triton's name of its type ("TYPE_FP32") and its number of axes."""

    datatype: str
    rank: int


def parameters(config: dict[str, Any]) -> dict[str, str]:
    return {k: v.get("string_value", "") for k, v in config.get("parameters", {}).items()}


def check_signature(config: dict[str, Any], inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
    """Raises ValueError where the config and the graph disagree on a name, dtype or rank."""
    batched = int(config.get("max_batch_size", 0)) > 0
    for side, of_graph in (("input", inputs), ("output", outputs)):
        for tensor in config.get(side, []):
            name = tensor["name"]
            if name not in of_graph:
                raise ValueError(
                    f"model '{config['name']}': {side} '{name}' is in config.pbtxt but the graph has {sorted(of_graph)}"
                )
            datatype, of_config = of_graph[name].datatype, tensor["data_type"]
            if datatype != of_config:
                raise ValueError(
                    f"model '{config['name']}': {side} '{name}': config says {of_config}, the graph says {datatype}"
                )
            rank = len(tensor["dims"]) + batched
            if rank != of_graph[name].rank:
                raise ValueError(
                    f"model '{config['name']}': {side} '{name}': config says rank {rank} with the batch axis, "
                    f"the graph says {of_graph[name].rank}"
                )
        missing = set(of_graph) - {t["name"] for t in config.get(side, [])}
        if side == "input" and missing:
            raise ValueError(f"model '{config['name']}': the graph needs inputs {sorted(missing)}, config.pbtxt lacks")


def decode(array: np.ndarray) -> np.ndarray:
    """Triton hands strings over as bytes objects; graphs want str."""
    if array.dtype.kind != "O":
        return array
    return np.array([b.decode() if isinstance(b, bytes) else b for b in array.ravel()], object).reshape(array.shape)


def deadline(request: Any) -> float:
    """When the client stops waiting, in Unix ms; infinity if it did not say. Raises ValueError for what is no time."""
    parameters_json = request.parameters()
    if contract.DEADLINE not in parameters_json:  # as most requests are: without reading them
        return math.inf
    given = json.loads(parameters_json).get(contract.DEADLINE)
    if given is None:
        return math.inf
    moment_ms = float(given) if re.fullmatch(r"-?[0-9]{1,18}(\.[0-9]{1,9})?", str(given)) else math.nan
    if math.isnan(moment_ms):
        raise ValueError(f"{contract.DEADLINE}: expected Unix time in ms, got {str(given)[:80]!r}; or leave it out")
    return moment_ms


def overdue(request: Any) -> float:
    """Milliseconds since a request's deadline passed; 0 if it did not, or is none (the first stage refuses that)."""
    try:
        return max(0.0, time.time() * 1000 - deadline(request))
    except ValueError:
        return 0.0


Execute = Callable[[Any, list[Any]], list[Any]]


def reason_of(error: Exception, where: str = "") -> str:
    """What the answer says of an error. Words of ours (ValueError, StoreError, TimeoutError) as they are; of anything
    else its kind, and the log has the rest, as messages of libraries name paths of the server."""
    if isinstance(error, ValueError | StoreError | TimeoutError):
        return str(error)
    pb_utils.Logger.log_error("".join(traceback.format_exception(error)))
    return f"{where}this request failed ({type(error).__name__}); the server's log says where"


def failure(error: Exception, where: str = "") -> Any:
    """The answer to the request that an error belongs to."""
    code = pb_utils.TritonError.UNKNOWN
    if isinstance(error, ValueError):
        code = pb_utils.TritonError.INVALID_ARG
    elif isinstance(error, StoreError):
        code = pb_utils.TritonError.UNAVAILABLE
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(reason_of(error, where), code))


def each_by_itself(execute: Execute) -> Execute:
    """The one guard around every ``execute``: where a batch fails, its requests are answered one by one, and the one
    that is at fault gets an error of its own."""

    @functools.wraps(execute)
    def guarded(self: Any, requests: list[Any]) -> list[Any]:
        try:
            return execute(self, requests)
        except Exception as error:
            if len(requests) > 1:
                return [guarded(self, [request])[0] for request in requests]
            return [failure(error)]

    return guarded


def hopeless(left_ms: float, needs_ms: float) -> Any:
    """The answer to a request that has ``left_ms`` until its deadline where its batch needs ``needs_ms``."""
    reason = (
        f"{contract.DEADLINE}: {left_ms:.0f} ms left, the answer takes {needs_ms:.0f}; "
        "ask with more time or fewer at once"
    )
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(reason, pb_utils.TritonError.UNAVAILABLE))


def refusal(ms: float, stage: str) -> Any:
    """The answer to a request whose deadline passed ``ms`` ago, before ``stage``."""
    reason = (
        f"{contract.DEADLINE}: passed {ms:.0f} ms ago, before {stage}; ask with more time or fewer requests at once"
    )
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(reason, pb_utils.TritonError.UNAVAILABLE))


def answer(request: Any, names: Sequence[str], values: Sequence[np.ndarray]) -> Any:
    """The response with those of the outputs ``names`` that the request wants."""
    requested = set(request.requested_output_names())
    return pb_utils.InferenceResponse(
        [
            pb_utils.Tensor(name, np.ascontiguousarray(value))
            for name, value in zip(names, values, strict=True)
            if name in requested
        ]
    )


class GraphModel:
    """One model instance; a batch of requests is one run of the graph. A backend says how to open a file and run it."""

    runtime = ""  # in the words of error messages
    default_file = "model.onnx"

    @staticmethod
    def auto_complete_config(auto_complete_model_config):  # noqa: ANN001, ANN205 - Triton's own types
        return auto_complete_model_config

    def open(self, path: Path, config: dict[str, Any], kind: str, device: str) -> None:
        """Loads the graph for an instance of ``kind`` "CPU" or "GPU" on ``device``. Raises ValueError."""
        raise NotImplementedError

    def signature(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs and outputs of the graph."""
        raise NotImplementedError

    def run(self, outputs: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        raise NotImplementedError

    def initialize(self, args: dict[str, Any]) -> None:
        close_callers()
        config = json.loads(args["model_config"])
        self.name = config["name"]
        file = config.get("default_model_filename") or self.default_file
        path = Path(args["model_repository"]) / args["model_version"] / file
        if not path.exists():
            raise pb_utils.TritonModelException(f"model '{config['name']}': no file {path}; run 'vivace compile'")
        self.open(path, config, args["model_instance_kind"], args["model_instance_device_id"])
        check_signature(config, *self.signature())
        self.inputs = [t["name"] for t in config["input"]]
        self.outputs = [t["name"] for t in config["output"]]
        self.batched = int(config.get("max_batch_size", 0)) > 0
        gc.collect()
        gc.freeze()  # what is loaded stays: later collections need not walk it
        give_way()

    @each_by_itself
    def execute(self, requests: list[Any]) -> list[Any]:
        if not self.batched:
            return [self._answer([request])[0] for request in requests]
        late = [overdue(request) for request in requests]
        if not any(late):
            return self._answer(requests)
        answers = iter(self._answer([r for r, ms in zip(requests, late, strict=True) if not ms]))
        return [refusal(ms, self.name) if ms else next(answers) for ms in late]

    def _answer(self, requests: list[Any]) -> list[Any]:
        try:
            columns = [
                [pb_utils.get_input_tensor_by_name(r, name).as_numpy() for r in requests] for name in self.inputs
            ]
            feed = {
                name: decode(parts[0] if len(parts) == 1 else np.concatenate(parts))
                for name, parts in zip(self.inputs, columns, strict=True)
            }
            results = self.run(self.outputs, feed)
        except Exception as error:
            if len(requests) > 1:  # find the request that is at fault: the others get their answers
                return [self._answer([request])[0] for request in requests]
            return [failure(error, f"{self.runtime}: ")]
        responses, start = [], 0
        for row, request in enumerate(requests):
            stop = start + (len(columns[0][row]) if self.batched else 0)
            values = [value[start:stop] if self.batched else value for value in results]
            responses.append(answer(request, self.outputs, values))
            start = stop
        return responses
