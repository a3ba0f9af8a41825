"""Latency and throughput over batch, history and candidates, ranker and retriever apart, in bf16.

    python -m benchmarks.gpu.grid --out FOLDER --seconds 80

PyTorch's own kernels, captured as one CUDA graph, which needs no time to compile: ``engines`` says how much a compiler
adds. Points that would not fit into memory or take more than half a second are left out, with the reason; points
are run in order of worth until the time is up. ``ms`` is on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.gpu import clock, peaks, steps, subjects
from benchmarks.gpu.record import Figures
from benchmarks.gpu.steps import Asked
from benchmarks.gpu.subjects import Shape
from training.models.ranking_gpu import gpu_graph
from training.presets import preset

ITEMS = 50_000
BATCHES, HISTORIES, CANDIDATES = (1, 4, 16, 64, 256, 1024), (50, 200, 1000, 4096), (100, 500, 2000)
PRESETS = ("base", "large", "cpu")
LONGEST_MS, MEMORY = 500.0, 40e9  # of a point; bytes of its intermediates


def points(cpu: bool) -> Iterator[tuple[str, str, int, int, list[int]]]:
    """(preset, stage, history, candidates, batches) in order of worth: the usual request of each preset, then one axis
    at a time, then the rest. A retriever's candidates are those of its preset."""
    if cpu:
        yield from (("tiny", stage, 20, 50, [1, 4]) for stage in ("ranker", "retriever"))
        return
    batches = list(BATCHES)
    seen: set[tuple[str, str, int, int]] = set()
    usual = [(200, 500)]
    axes = [*((t, 500) for t in HISTORIES), *((200, n) for n in CANDIDATES)]
    for wave in (usual, axes, list(itertools.product(HISTORIES, CANDIDATES))):
        for (t, n), name, stage in itertools.product(wave, PRESETS, ("ranker", "retriever")):
            key = (name, stage, t, 500 if stage == "retriever" else n)
            if key not in seen:
                seen.add(key)
                yield *key, batches


def intermediates(name: str, stage: str, shape: Shape, batch: int) -> float:
    """Bytes of the largest tensors of a request that live at once, in bf16: an upper bound."""
    chosen, t, n, d = preset(name), shape.history, shape.candidates, shape.width
    if stage == "retriever":
        biased = chosen.encoder.position_bias != "none"
        mask = 3 * (chosen.encoder.heads if biased else 1) * t * t  # mask and bias, and their sum
        return batch * (2.0 * mask + 2 * 12 * t * d + 16 * shape.items)
    of = chosen.ranker
    channels = 3 * (3 * d + 32) + 5 * of.experts * of.expert_width
    return batch * (2.0 * n * channels + 2 * 8 * t * d + 40 * of.lags * of.followers)


def graph_of(
    name: str, stage: str, shape: Shape, where: torch.device, rankers: dict[str, nn.Module]
) -> tuple[nn.Module, float]:
    """(graph in bf16 on the device, FLOPs a request). ``rankers``: those made before, by preset."""
    with where:
        if stage == "retriever":
            graph = subjects.retrieval_graph(name, shape)
            return subjects.cast(graph, torch.bfloat16), subjects.retriever_flops(name, shape)
        if name not in rankers:  # of any history and number of candidates
            rankers[name] = gpu_graph(subjects.ranking_model(name, shape), torch.bfloat16, lookup="sorted")
    return rankers[name], subjects.ranker_flops(name, shape)


def one(
    figures: Figures, name: str, stage: str, shape: Shape, batch: int, graph: nn.Module, flop: float,
    where: torch.device, rates: dict[str, float],
) -> float:  # fmt: skip
    """Measures and writes a point; its ms."""
    make = subjects.retrieval_inputs if stage == "retriever" else subjects.ranking_inputs
    with where:
        given = make(batch, shape)
    if stage == "ranker":
        given[3] = given[3].to(torch.bfloat16)
    replay, _ = clock.captured(lambda: graph(*given), where)
    ms = clock.device_ms(replay, where, 0.06 if where.type == "cuda" else 0.02)
    per_s = flop * batch / ms * 1000
    figures.row(
        preset=name, stage=stage, history=shape.history, candidates=shape.candidates, batch=batch, ms=ms,
        requests_per_s=batch / ms * 1000, candidates_per_s=batch * shape.candidates / ms * 1000,
        gflop=flop * batch / 1e9, tflops=per_s / 1e12, share_bf16=per_s / rates["bf16"],
    )  # fmt: skip
    return ms


def line(
    figures: Figures, name: str, stage: str, shape: Shape, batches: list[int], where: torch.device,
    rates: dict[str, float], rankers: dict[str, nn.Module],
) -> None:  # fmt: skip
    """All batches of one history and number of candidates, as far as memory and time go."""
    what = f"{name} {stage} history {shape.history} candidates {shape.candidates}"
    try:
        graph, flop = graph_of(name, stage, shape, where, rankers)
    except Exception as error:
        figures.skip(what, f"{type(error).__name__}: {error}")
        return
    last = 0.0
    for i, batch in enumerate(batches):
        at = f"{what} batch {batch}"
        growth = batch / batches[i - 1] if i else 1.0
        if figures.left() < 1.0:
            return
        if intermediates(name, stage, shape, batch) > MEMORY:
            figures.skip(at, f"more than {MEMORY / 1e9:.0f} GB of intermediates")
            return
        if last * growth > 1.3 * LONGEST_MS:
            figures.skip(at, f"more than {LONGEST_MS:.0f} ms, by the batch before")
            return
        try:
            last = one(figures, name, stage, shape, batch, graph, flop, where, rates)
        except Exception as error:
            figures.skip(at, f"{type(error).__name__}: {error}")
            return
        finally:
            clock.release(where)


@torch.no_grad()
def measure(figures: Figures, where: torch.device, given: Asked) -> None:
    cpu = where.type == "cpu"
    items = 500 if cpu else ITEMS
    rates = peaks.measure(figures, where, ("bf16",), 0.02 if cpu else 0.3)
    figures.set(items=items, data_sheet_bf16=peaks.DATA_SHEET_BF16)
    rankers: dict[str, nn.Module] = {}
    for name, stage, history, candidates, batches in points(cpu):
        if figures.left() < 1.5:
            figures.skip(f"{name} {stage} history {history} candidates {candidates} and what follows", "no time left")
            return
        line(figures, name, stage, subjects.shape_of(name, items, candidates, history), batches, where, rates, rankers)


if __name__ == "__main__":
    steps.run("grid", measure, "latency and throughput by size")
