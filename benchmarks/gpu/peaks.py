"""What the card can do at best, measured: large matrix products by number format, and a copy."""

from __future__ import annotations

import torch

from benchmarks.gpu.clock import device_ms
from benchmarks.gpu.record import Figures

DATA_SHEET_BF16 = 990e12  # FLOPs a second of an H100 SXM, dense, as its maker gives them
ALL = ("bf16", "fp8", "int8", "tf32", "fp16", "fp32")


def product_rate(kind: str, where: torch.device, n: int, seconds: float) -> float:
    """FLOPs a second of an n x n x n product of random numbers."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32)
    a, b = (torch.randn(n, n, device=where) for _ in range(2))
    if kind == "fp8":
        q, one = [x.to(torch.float8_e4m3fn) for x in (a, b)], torch.ones((), device=where)
        call = lambda: torch._scaled_mm(  # noqa: E731
            q[0], q[1].t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    elif kind == "int8":
        r = [(x * 30).clamp(-127, 127).to(torch.int8) for x in (a, b)]
        call = lambda: torch._int_mm(r[0], r[1].t())  # noqa: E731
    else:
        a, b = a.to(dtype), b.to(dtype)
        call = lambda: a @ b  # noqa: E731
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        return 2.0 * n**3 / device_ms(call, where, seconds) * 1000
    finally:
        torch.set_float32_matmul_precision(before)


def copy_rate(where: torch.device, seconds: float) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    block = torch.empty((1 << 30 if where.type == "cuda" else 1 << 28) // 4, device=where)
    other = torch.empty_like(block)
    return 2.0 * block.numel() * 4 / device_ms(lambda: other.copy_(block), where, seconds) * 1000


def measure(figures: Figures, where: torch.device, kinds: tuple[str, ...], seconds: float = 0.3) -> dict[str, float]:
    """Rates of the products of ``kinds`` and of the copy ("copy"), written as ``peaks``."""
    rates: dict[str, float] = {}
    for kind in kinds:
        try:
            rates[kind] = product_rate(kind, where, 8192 if where.type == "cuda" else 256, seconds)
        except Exception as error:
            figures.skip(f"product {kind}", error)
    rates["copy"] = copy_rate(where, seconds)
    figures.set(peaks=rates)
    print("peaks: " + ", ".join(f"{k} {v / 1e12:.2f} T/s" for k, v in rates.items()), flush=True)
    return rates
