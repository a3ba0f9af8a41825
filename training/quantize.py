"""Int8 for ONNX Runtime on CPUs: weights of the matrix products by channel, activations as they come (dynamic).

Without VNNI two products of eight bits may overflow sixteen, so weights get seven bits there (``reduce_range``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process


def has_vnni() -> bool:
    """Whether this CPU multiplies int8 without overflow (AVX512-VNNI or AVX-VNNI)."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.exists() else ""
    return "avx512_vnni" in flags or "avx_vnni" in flags


def quantize(source: Path, target: Path, keep: Sequence[str] = (), reduce_range: bool | None = None) -> None:
    """Writes ``source`` with int8 weights to ``target``. ``keep``: names of nodes that stay in float32;
    ``reduce_range``: seven bits instead of eight (None: where the CPU has no VNNI)."""
    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_dynamic(
        str(prepared), str(target), per_channel=True, weight_type=QuantType.QInt8, nodes_to_exclude=list(keep),
        reduce_range=not has_vnni() if reduce_range is None else reduce_range,
        extra_options={"MatMulConstBOnly": True},
    )  # fmt: skip
    prepared.unlink()
