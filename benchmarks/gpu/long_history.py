"""Step of the GPU kit: what long histories cost, a training step and a request at 200, 1,000, 2,048 and 4,096 events.

    python -m benchmarks.gpu.long_history --out FOLDER --seconds 40

The retriever of ``base``, with its learned bias by distance and without ("none": then attention is causal and reads no
mask), plainly. Training steps are those of ``train_speed``, all of about as many events, so that a step of a longer
history costs more by its attention alone. A request is the whole retriever with an exact search of 50,000 items in
bf16, one CUDA graph. Memory is the most that the card held at a time.

Expected before the first run (H100), events a second beside 200 events: with the bias a third at 1,000 and a tenth at
4,096, as attention writes and reads a mask of heads x T x T and its gradient; without it .9 and .6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu import clock, steps, subjects
from benchmarks.gpu.record import Figures
from benchmarks.gpu.steps import Asked
from benchmarks.gpu.train_speed import ITEMS as TRAINED_ITEMS, flop_of_step, seconds_of, stepper
from training.models.retrieval import RetrievalGraph, RetrievalModel
from training.presets import Preset, preset

ITEMS, CANDIDATES = 50_000, 200
LENGTHS, EVENTS = (200, 4096, 1000, 2048), 65_536  # events of a training step
BATCHES = (1, 16)  # of a request
STEPS, NEEDED_S = 8, 3.0


@dataclass(frozen=True)
class Point:
    """``part``: "train" or "request"."""

    part: str
    preset: str
    bias: str
    history: int
    batch: int

    @property
    def sizes(self) -> Preset:
        chosen = preset(self.preset)
        encoder = replace(chosen.encoder, history=self.history, position_bias=self.bias)  # type: ignore[arg-type]
        return replace(chosen, encoder=encoder)


def points(cpu: bool) -> Iterator[Point]:
    """In order of worth: what was never measured first."""
    if cpu:
        yield from (Point(part, "tiny", bias, 64, 2) for part in ("train", "request") for bias in ("relative", "none"))
        return
    for length in LENGTHS:
        for bias in ("relative", "none"):
            yield Point("train", "base", bias, length, max(1, EVENTS // length))
            yield from (Point("request", "base", bias, length, batch) for batch in BATCHES)


def request(point: Point, items: int, where: torch.device) -> Callable[[], object]:
    """A replay of the retriever's graph."""
    encoder, shape = point.sizes.encoder, subjects.Shape(point.history, CANDIDATES, 0, items)
    with where:
        model = RetrievalModel(encoder, items, torch.ones(items))
        graph = RetrievalGraph(model, CANDIDATES).eval().requires_grad_(False)
        given = subjects.retrieval_inputs(point.batch, shape)
        subjects.cast(graph, torch.bfloat16)
        with torch.no_grad():
            replay, _ = clock.captured(lambda: graph(*given), where)
    return replay


def measure_point(figures: Figures, point: Point, where: torch.device) -> None:
    """One row."""
    cuda = where.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    if point.part == "train":
        step = stepper(point.sizes, point.batch, where, compiled=False)
        for _ in range(2):
            step()
        ms = seconds_of(step, STEPS if cuda else 1, where) * 1000
        more = {"tflops": flop_of_step(point.sizes, point.batch, TRAINED_ITEMS) / ms / 1e9}
    else:
        ms = clock.device_ms(request(point, ITEMS if cuda else 500, where), where, 0.1 if cuda else 0.02)
        more = {"requests_per_s": point.batch / ms * 1000}
    figures.row(
        part=point.part, preset=point.preset, bias=point.bias, history=point.history, batch=point.batch, ms=ms,
        events_per_s=point.batch * point.history / ms * 1000,
        memory_mib=torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0, **more,
    )  # fmt: skip


def measure(figures: Figures, where: torch.device, given: Asked) -> None:
    figures.set(items=ITEMS, events_of_a_step=EVENTS)
    for point in points(given.cpu):
        what = f"{point.preset} {point.part} {point.history} {point.bias} batch {point.batch}"
        if figures.left() < NEEDED_S:
            figures.skip(what, "no time left")
            continue
        try:
            measure_point(figures, point, where)
        except Exception as error:  # the other sizes' figures stay
            figures.skip(what, f"{type(error).__name__}: {error}")
        clock.release(where)


if __name__ == "__main__":
    steps.run("long_history", measure, "training steps and requests of long histories")
