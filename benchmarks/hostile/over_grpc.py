"""Hostile gRPC calls: messages that are malformed, other methods, metadata, compression, callers that give up."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from benchmarks.hostile.values import (
    DATATYPES,
    OUTPUTS,
    PUBLIC,
    STAGES,
    TEXTS,
    cut_strings,
    flipped,
    good,
    odd_parameter,
    odd_shape,
    packed,
)
from vivace import contract

SERVICE = "/inference.GRPCInferenceService/"
METHODS = (
    "ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer", "ModelStreamInfer",
    "ModelConfig", "ModelStatistics", "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload",
    "SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister", "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister", "TraceSetting", "LogSettings", "NoSuchMethod", "../v2/logging", "",
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One unary call of raw bytes. ``after_s``: when its caller gives up, by ``cancel`` or else by its timeout."""

    message: bytes
    path: str = f"{SERVICE}ModelInfer"
    metadata: list[tuple[str, Any]] = field(default_factory=list)
    compression: grpc.Compression = grpc.Compression.NoCompression
    after_s: float = 60.0
    cancel: bool = False


def _parameter(rng: random.Random, holder: Any) -> None:
    name, value = odd_parameter(rng)
    choice = holder[name]
    if isinstance(value, bool):
        choice.bool_param = value
    elif isinstance(value, int) and -(2**63) <= value < 2**63:
        choice.int64_param = value
    elif isinstance(value, float):
        choice.double_param = value
    elif value is not None:
        choice.string_param = str(value).encode("utf-8", "replace").decode()


def _contents(column: Any, tensor: Any) -> None:
    if column.datatype == "BYTES":
        tensor.contents.bytes_contents.extend(str(v).encode("utf-8", "replace") for v in column.values)
    elif column.datatype == "INT64":
        tensor.contents.int64_contents.extend(column.values)
    else:
        tensor.contents.int_contents.extend(column.values)


def infer(rng: random.Random, bad: bool = True) -> service_pb2.ModelInferRequest:
    """A ModelInferRequest with a few faults, or none."""
    model, columns = good(rng, rng.choice((1, 1, 1, 2, 64, 65)) if bad else 1)
    faulty = (lambda p: bad and rng.random() < p) if bad else (lambda p: False)
    message = service_pb2.ModelInferRequest(model_name=model)
    if faulty(0.1):
        message.model_name = rng.choice((*STAGES, *(t for t in TEXTS if "\ud800" not in t), "recommend/../response"))
    if faulty(0.1):
        message.model_version = rng.choice(("1", "0", "-1", "x", "1/../../response", "9" * 30))
    if faulty(0.1):
        message.id = rng.choice([t for t in TEXTS if "\ud800" not in t])
    raw = rng.random() < 0.6
    for column in columns[: rng.randrange(5)] if faulty(0.1) else columns:
        tensor = message.inputs.add(name=column.name, datatype=column.datatype)
        tensor.shape.extend([n for n in odd_shape(rng) if -(2**63) <= n < 2**63] if faulty(0.1) else column.shape)
        if faulty(0.05):
            tensor.name = rng.choice(("", "X", "ITEM_ID", '"', "USER_ID\x00"))
        if faulty(0.08):
            tensor.datatype = rng.choice(DATATYPES)
        if faulty(0.05):
            _parameter(rng, tensor.parameters)
        if raw:
            value = packed(column.values, column.datatype)
            message.raw_input_contents.append(cut_strings(rng, value) if faulty(0.2) else value)
        if not raw or faulty(0.05):
            _contents(column, tensor)
    if faulty(0.05):
        message.raw_input_contents.extend([b"x"] * rng.randrange(1, 40))
    while faulty(0.3):
        _parameter(rng, message.parameters)
    while faulty(0.2):
        output = message.outputs.add(name=rng.choice(OUTPUTS))
        if rng.random() < 0.4:
            _parameter(rng, output.parameters)
    return message


def fields(rng: random.Random) -> Call:
    return Call(infer(rng).SerializeToString())


def bytes_changed(rng: random.Random) -> Call:
    return Call(flipped(rng, infer(rng).SerializeToString()))


def garbage(rng: random.Random) -> Call:
    many = b"*\x00" * 100_000 + b"\n\x09recommend"
    return Call(rng.choice((rng.randbytes(rng.randrange(3000)), b"", many, b"\xff" * 200, b"\n\xff\xff\xff\xff\x0f")))


def methods(rng: random.Random) -> Call:
    """Any method, with any message: management, streams, names that are none."""
    name = "\n" + chr(len("recommend")) + rng.choice(("recommend", "retrieval"))
    message = rng.choice((b"", name.encode(), rng.randbytes(40), infer(rng).SerializeToString(), bytes(5000)))
    other = ("/grpc.health.v1.Health/Check", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "/x/y")
    path = SERVICE + rng.choice(METHODS) if rng.random() < 0.9 else rng.choice(other)
    return Call(message, path)


def metadata(rng: random.Random) -> Call:
    sets: list[list[tuple[str, Any]]] = [
        [("x-vivace-model", rng.choice((*STAGES, *PUBLIC)))], [("grpc-encoding", "gzip")],
        [("x-bin", rng.randbytes(90))],
        [(f"x-{n}", "1") for n in range(rng.choice((40, 80, 300)))], [("x", "y" * rng.choice((6000, 9000, 50_000)))],
        [("triton-grpc-protocol-vivace-key", "x")], [("traceparent", "x" * 50)], [("content-length", "5")],
        [("inference-header-content-length", "3")], [("x-envoy-retry-on", "5xx"), ("x-envoy-max-retries", "99")],
    ]  # fmt: skip
    return Call(infer(rng, bad=False).SerializeToString(), metadata=rng.choice(sets))


def compressed(rng: random.Random) -> Call:
    how = rng.choice((grpc.Compression.Gzip, grpc.Compression.Deflate))
    message = infer(rng).SerializeToString() if rng.random() < 0.5 else bytes(3 << 20)
    return Call(message, SERVICE + rng.choice(METHODS[:7]), compression=how)


def huge(rng: random.Random) -> Call:
    message = infer(rng, bad=False)
    size = rng.choice((5000, 200_000, 3 << 20, 7 << 20, 9 << 20))
    del message.raw_input_contents[:]
    if message.model_name == contract.ENSEMBLE and rng.random() < 0.5:
        message.inputs[2].shape[1] = min(size // 5, 110_000)
    for tensor in message.inputs:
        tensor.ClearField("contents")
        if tensor.datatype == "BYTES":
            long = rng.random() < 0.3 and math.prod(tensor.shape) < 5
            tensor.contents.bytes_contents.extend([b"u" * size if long else b"sku"] * math.prod(tensor.shape))
        elif tensor.datatype == "INT64":
            tensor.contents.int64_contents.append(0)
        else:
            tensor.contents.int_contents.append(5)
    return Call(message.SerializeToString())


def given_up(rng: random.Random) -> Call:
    """A good call that its caller cancels, or does not wait for, about when the answer comes."""
    return Call(infer(rng, bad=False).SerializeToString(), after_s=rng.uniform(0.0005, 0.04), cancel=rng.random() < 0.5)


KINDS: dict[str, Callable[[random.Random], Call]] = {
    f"gRPC {kind.__name__}": kind
    for kind in (fields, bytes_changed, garbage, methods, metadata, compressed, huge, given_up)
}
