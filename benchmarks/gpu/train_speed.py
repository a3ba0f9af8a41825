"""Step of the GPU kit: how fast the retriever trains alone on the card, plainly and through ``torch.compile``.

    python -m benchmarks.gpu.train_speed --out FOLDER --seconds 70

One step is forward in bfloat16, backward, clipping and AdamW over windows of the whole history, without a data loader.
FLOPs are those of the products, three times the forward pass; the share is of the product of two large bfloat16
matrices, measured here. What is compiled comes last, and its compiler says every few seconds where it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu import steps
from benchmarks.gpu.peaks import product_rate
from benchmarks.gpu.record import Figures
from benchmarks.gpu.steps import Asked
from training.compile.aoti import tell_where
from training.distributed import ALONE, Parallel
from training.learn.loop import parameter_groups
from training.learn.objectives import log_expected_counts, retrieval_loss
from training.learn.retriever import compile_blocks
from training.models.retrieval import RetrievalModel
from training.presets import Preset, preset
from vivace.contract import FIRST_ID

ITEMS = 3_416 + FIRST_ID  # ML-1M's
STEPS, TOLD_S = 20, 8.0
BATCHES = {"base": (128, 512), "large": (128, 256), "tiny": (32,)}


def flop_of_step(chosen: Preset, batch: int, items: int) -> float:
    """Of one training step: products of layers, attention over the whole window and the softmax over all items."""
    e, t = chosen.encoder, chosen.encoder.history
    inner = e.heads * e.of_head
    of_token = e.layers * (4 * e.width * inner + 2 * e.width * e.of_ffn + 2 * t * inner) + e.width * items
    return 3.0 * 2.0 * batch * t * of_token


def seconds_of(call: Callable[[], object], times: int, where: torch.device) -> float:
    """Mean wall time of ``call``, the card's work included."""
    if where.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        call()
    if where.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def stepper(chosen: Preset, batch: int, where: torch.device, compiled: bool) -> Callable[[], float]:
    """A call that takes one training step on random windows and returns its loss."""
    torch.manual_seed(7)
    model = RetrievalModel(chosen.encoder, ITEMS, torch.ones(ITEMS)).to(where).train()
    if compiled:
        compile_blocks(model)
    expected_V = log_expected_counts(torch.ones(ITEMS), chosen.retrieval).to(where)
    loss = Parallel(model, retrieval_loss(model, chosen.retrieval, expected_V), ALONE)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=1e-4, fused=where.type == "cuda")
    windows = torch.randint(FIRST_ID, ITEMS, (batch, chosen.encoder.history + 1), device=where)

    def step() -> float:
        value, mean = loss(windows)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return mean

    return step


def points(cpu: bool) -> Iterator[tuple[str, int, bool]]:
    """(preset, windows, compiled): all eager ones, then one compiled of each preset, then the rest. A processor
    compiles for minutes."""
    names = ("tiny",) if cpu else ("base", "large")
    yield from ((name, batch, False) for name in names for batch in BATCHES[name])
    if not cpu:
        yield from ((name, BATCHES[name][0], True) for name in names)
        yield from ((name, batch, True) for name in names for batch in BATCHES[name][1:])


def measure(figures: Figures, where: torch.device, given: Asked) -> None:
    best = product_rate("bf16", where, 8192 if where.type == "cuda" else 512, 0.3)
    figures.set(peak_bf16_tflops=best / 1e12)
    for name, batch, compiled in points(given.cpu):
        how = "compiled" if compiled else "eager"
        if figures.left() < 10:
            figures.skip(f"{name} {how} {batch}", "the step's time was over")
            continue
        if compiled:
            tell_where(TOLD_S)
        try:
            step = stepper(preset(name), batch, where, compiled)
            began = time.perf_counter()
            losses = [step() for _ in range(3)]
            warm_up = time.perf_counter() - began
            took = seconds_of(step, STEPS, where)
        except Exception as error:
            figures.skip(f"{name} {how} {batch}", error)
            continue
        rate = flop_of_step(preset(name), batch, ITEMS) / took
        figures.row(
            preset=name, how=how, batch=batch, ms=took * 1000, warm_up_s=warm_up, loss=losses[0],
            tokens_per_s=batch * preset(name).encoder.history / took, tflops=rate / 1e12, share=rate / best,
        )  # fmt: skip


if __name__ == "__main__":
    steps.run("train_speed", measure, "training steps of the retriever alone on the card")
