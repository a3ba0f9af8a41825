"""Times on the device: CUDA events around replays of a captured graph; on the CPU the wall clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
LEAST_ROUNDS, MOST_ROUNDS = 20, 200


def device_ms(call: Call, where: torch.device, seconds: float = 0.25) -> float:
    """Median time of a call on the device, of 20 to 200 rounds that take about ``seconds``."""
    if where.type == "cpu":
        return _wall_ms(call, seconds)
    call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    once = max(time.perf_counter() - began, 1e-6)
    rounds = int(min(MOST_ROUNDS, max(LEAST_ROUNDS, seconds / once)))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False))


def _wall_ms(call: Call, seconds: float) -> float:
    call()
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while len(taken) < 3 or (time.perf_counter() < until and len(taken) < MOST_ROUNDS):
        began = time.perf_counter()
        call()
        taken.append((time.perf_counter() - began) * 1000)
    return statistics.median(taken)


def captured(call: Call, where: torch.device) -> tuple[Call, Any]:
    """(a replay of the call as one CUDA graph, the outputs that it writes); on the CPU the call itself. The outputs of
    a replay stand in the same memory as those of the one before."""
    if where.type == "cpu":
        return call, call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph.replay, out


def host_ms(replay: Call, inputs: list[Tensor], outputs: Any, where: torch.device, seconds: float = 0.25) -> float:
    """Median time of inputs from host memory, a replay, and the outputs back in host memory."""
    pin = where.type == "cuda"
    hosts = [x.cpu().pin_memory() if pin else x.clone() for x in inputs]
    answers = [torch.empty(x.shape, dtype=x.dtype, pin_memory=pin) for x in outputs]

    def whole() -> None:
        for x, host in zip(inputs, hosts, strict=True):
            x.copy_(host, non_blocking=True)
        replay()
        for answer, out in zip(answers, outputs, strict=True):
            answer.copy_(out, non_blocking=True)
        if pin:
            torch.cuda.synchronize()

    return _wall_ms(whole, seconds)


def release(where: torch.device) -> None:
    """Gives back the memory of graphs that are gone."""
    if where.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
