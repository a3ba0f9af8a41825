"""Other number formats for exported graphs.

========  =================================================================================================
int8      ONNX Runtime on CPUs, dynamic: weights by channel, activations scaled as they come
int8-qdq  static: Q/DQ pairs around the matrix products, ranges calibrated on real requests; symmetric, so that
          TensorRT takes the same file
fp8       the same with E4M3 (TensorRT; ONNX Runtime runs it on CPUs to judge its quality)
fp16      half precision, inputs and outputs stay float32
========  =================================================================================================

Without VNNI two products of eight bits may overflow sixteen, so int8 weights get seven bits there (``reduce_range``).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16

from preprocessing.features import Features
from training.compile.engine import Engine
from training.compile.onnx_export import PARITY_REQUESTS
from training.data import batches
from training.data.live import with_live
from vivace import contract
from vivace.onnx_session import open_session

Precision = Literal["fp32", "fp16", "int8", "int8-qdq", "fp8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
PRODUCTS = ["MatMul", "Gemm"]
CALIBRATION_BATCHES = 8
SENSITIVITY_BATCHES = 2
OVERLAP = 0.97  # a product whose quantization alone changes more of the top 10 than this leaves stays in float32

Feed = Mapping[str, np.ndarray]


class _Requests(CalibrationDataReader):
    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._left = list(feeds)

    def get_next(self) -> Feed | None:  # type: ignore[override]
        return self._left.pop() if self._left else None


def has_vnni() -> bool:
    """Whether this CPU multiplies int8 without overflow (AVX512-VNNI or AVX-VNNI)."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.exists() else ""
    return "avx512_vnni" in flags or "avx_vnni" in flags


def products(path: Path) -> list[str]:
    """Names of the matrix products of a graph that have a constant factor: what quantization is for."""
    graph = onnx.load(path).graph
    constant = {t.name for t in graph.initializer} | {n.output[0] for n in graph.node if n.op_type == "Constant"}
    return [n.name for n in graph.node if n.op_type in PRODUCTS and any(i in constant for i in n.input)]


def prepare(source: Path, target: Path) -> None:
    """Shapes inferred and constants folded, which the quantizers ask for."""
    quant_pre_process(str(source), str(target), skip_symbolic_shape=True)


def convert(
    source: Path,
    target: Path,
    precision: str,
    feeds: Sequence[Feed],
    keep: Sequence[str] = (),
    only: Sequence[str] | None = None,
) -> None:
    """Writes the prepared graph ``source`` in another precision to ``target``. ``feeds``: inputs to calibrate on;
    ``keep``: products that stay in float32; ``only``: the products to quantize (None: all). Raises ValueError for an
    unknown precision."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # the quantizers talk much
    nodes = None if only is None else list(only)
    try:
        if precision == "fp16":
            onnx.save(
                convert_float_to_float16(onnx.load(source), keep_io_types=True, node_block_list=list(keep)), target
            )
        elif precision == "int8":
            quantize_dynamic(
                str(source), str(target), per_channel=True, weight_type=QuantType.QInt8, nodes_to_exclude=list(keep),
                nodes_to_quantize=nodes, op_types_to_quantize=PRODUCTS, reduce_range=not has_vnni(),
                extra_options={"MatMulConstBOnly": True},
            )  # fmt: skip
        elif precision in ("int8-qdq", "fp8"):
            eight = QuantType.QFLOAT8E4M3FN if precision == "fp8" else QuantType.QInt8
            quantize_static(
                str(source), str(target), _Requests(feeds), quant_format=QuantFormat.QDQ,
                per_channel=precision != "fp8", activation_type=eight, weight_type=eight,
                calibrate_method=CalibrationMethod.Distribution if precision == "fp8" else CalibrationMethod.MinMax,
                nodes_to_exclude=list(keep), nodes_to_quantize=nodes, op_types_to_quantize=PRODUCTS,
                reduce_range=precision != "fp8" and not has_vnni(),
                # TensorRT wants biases in float and ranges around zero
                extra_options={
                    "MatMulConstBOnly": True, "QuantizeBias": False,
                    "ActivationSymmetric": True, "WeightSymmetric": True,
                },
            )  # fmt: skip
        else:
            raise ValueError(f"precision: expected one of {PRECISIONS[1:]}, got {precision!r}")
    finally:
        logging.getLogger().setLevel(level)


def overlap(expected: np.ndarray, got: np.ndarray, k: int = 10) -> float:
    """Mean share of the first ``k`` ids of each row that two answers have in common."""
    rows = [len(set(a[:k]) & set(b[:k])) / k for a, b in zip(expected, got, strict=True)]
    return float(np.mean(rows))


def sensitivities(
    source: Path, precision: str, feeds: Sequence[Feed], run: Callable[[Path, Feed], np.ndarray], scratch: Path
) -> dict[str, float]:
    """For each product of the prepared graph: the top-10 overlap with float32 if it alone is quantized. ``run`` gives
    the ids [B, N], best first, that a graph answers."""
    expected = [run(source, f) for f in feeds]
    kept = {}
    for name in products(source):
        convert(source, scratch, precision, feeds, only=[name])
        kept[name] = float(np.mean([overlap(e, run(scratch, f)) for e, f in zip(expected, feeds, strict=True)]))
    scratch.unlink(missing_ok=True)
    return kept


def calibration_feeds(features: Features, tensors: contract.StageTensors, engine: Engine) -> dict[str, list[Feed]]:
    """Inputs of both graphs, by stage, of validation requests."""
    heads = [h.name for h in features.schema.heads]
    feeds: dict[str, list[Feed]] = {contract.RETRIEVAL: [], contract.RANKING: []}
    requests = batches.requests(features.files("valid"), heads, tensors.history, PARITY_REQUESTS)
    for request in itertools.islice(with_live(requests, features, "valid", tensors), CALIBRATION_BATCHES):
        inputs = request.inputs(tensors, features.schema.exclude_seen)
        rows = (inputs[0], *engine.retrieve(inputs))
        feeds[contract.RETRIEVAL].append(dict(zip(engine.names[0], inputs, strict=False)))
        feeds[contract.RANKING].append(dict(zip(engine.names[1], rows, strict=True)))
    return feeds


def reduce_precision(
    features: Features, tensors: contract.StageTensors, exact: Path, target: Path, precision: Precision
) -> dict[str, dict[str, float]]:
    """Writes both graphs of the folder ``exact`` in ``precision`` to ``target``, calibrated on validation requests;
    returns for each stage and product the share of the top 10 that stays if it alone is quantized. Products below
    OVERLAP stayed in float32."""
    by_stage: dict[str, dict[str, float]] = {}
    for stage, feeds in calibration_feeds(features, tensors, Engine(exact, tensors)).items():
        ready, scratch = target / f"{stage}.ready.onnx", target / f"{stage}.scratch.onnx"
        prepare(exact / f"{stage}.onnx", ready)
        alone: dict[str, float] = {}
        if precision != "fp16":
            answer = lambda path, feed: open_session(path).run(None, dict(feed))[0]  # noqa: E731
            alone = sensitivities(ready, precision, feeds[:SENSITIVITY_BATCHES], answer, scratch)
        sensitive = [name for name, share in alone.items() if share < OVERLAP]
        convert(ready, target / f"{stage}.onnx", precision, feeds, sensitive)
        ready.unlink()
        by_stage[stage] = alone
    return by_stage
