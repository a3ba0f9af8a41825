"""Step of the GPU kit: where the ranker's time on the card goes, kernel by kernel, as compiled in bfloat16 and in fp8.

    python -m benchmarks.gpu.kernels --out FOLDER --seconds 30

A row is a kind of kernel with its share of the time; ``largest`` names the longest kernels. What is no matrix product
gets no faster by fewer bits in the products, so these shares say how much a number format can bring.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch

from benchmarks.gpu import steps
from benchmarks.gpu.engines import ITEMS, Subject, Variant, built, call_of, precision, subject
from benchmarks.gpu.record import Figures
from benchmarks.gpu.steps import Asked

KINDS = (  # the first that fits: a fused kernel may name the product that it prepares
    ("fused with reductions", r"triton_(red|per)"),
    ("fused", r"triton_poi"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|scaled_mm|xmma|splitk"),
    ("attention", r"fmha|flash|attention|softmax_warp"),
    ("sorting, top k", r"sort|topk|radix|bitonic"),
    ("copies", r"memcpy|memset|copy_kernel|catarray"),
    ("pointwise", r"elementwise"),
    ("reductions", r"reduce|layer_norm"),
    ("gathers", r"index|gather|scatter|embedding"),
)
CALLS, LONGEST = 5, 12
VARIANTS = (("compile", "bf16", "gpu"), ("compile", "fp8", "gpu"))


def kind(kernel: str) -> str:
    """What a kernel does, by its name; "others" where that does not say."""
    name = kernel.lower()
    return next((label for label, pattern in KINDS if re.search(pattern, name)), "others")


def times_of(call: Any, where: torch.device) -> dict[str, float]:
    """Microseconds a call of each kernel, by name; on the CPU of each operator."""
    activity = torch.profiler.ProfilerActivity
    cuda = where.type == "cuda"
    for _ in range(3):
        call()
    with torch.profiler.profile(activities=[activity.CUDA] if cuda else [activity.CPU]) as profile:
        for _ in range(CALLS):
            call()
        if cuda:
            torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        times[event.key] += spent / CALLS
    return {name: us for name, us in times.items() if us > 0}


def profile(figures: Figures, of: Subject, variant: Variant, batch: int) -> None:
    with precision(variant.format):
        times = times_of(call_of(variant, built(of, variant, batch), of.inputs(batch)), of.where)
    total = sum(times.values())
    by_kind: dict[str, float] = defaultdict(float)
    for name, us in times.items():
        by_kind[kind(name)] += us
    for label, us in sorted(by_kind.items(), key=lambda pair: -pair[1]):
        figures.row(
            preset=of.name, format=variant.format, form=variant.form, batch=batch, kernels=label, us=us,
            share=us / total,
        )  # fmt: skip
    longest = sorted(times.items(), key=lambda pair: -pair[1])[:LONGEST]
    largest = {**figures.values.get("largest", {}), f"{of.name} {variant.format}": [[n[:90], us] for n, us in longest]}
    figures.set(largest=largest)


@torch.no_grad()
def measure(figures: Figures, where: torch.device, given: Asked) -> None:
    cpu = where.type == "cpu"
    for name, batch in (("tiny", 4),) if cpu else (("large", 1024), ("base", 1024)):
        of = subject(name, "ranker", 500 if cpu else ITEMS, where)
        for way in (("eager", "bf16", "gpu"),) if cpu else VARIANTS:
            if figures.left() < 3:
                figures.skip(f"{name} {way}", "no time left")
                continue
            try:
                profile(figures, of, Variant("ranker", *way), batch)
            except Exception as error:
                figures.skip(f"{name} {way}", f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    steps.run("kernels", measure, "where the ranker's time on the card goes")
