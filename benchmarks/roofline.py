"""The ranker by engine, number format and batch, beside what the machine could do at best.

    python -m benchmarks.roofline --preset base --preset large --batch 1 --batch 16 --batch 256

Engines: PyTorch eager, torch.compile (CUDA graphs on a GPU), ONNX Runtime (CUDA on a GPU), TensorRT. Weights are
untrained, which changes no time. Every time is from host memory to host memory, median of the rounds. FLOPs are counted
by PyTorch's counter in the float32 model, bytes are those of its weights, inputs and outputs, read or written once; the
ceilings (matrix product, copy) are measured here. ``share``: the least time that either ceiling allows over the time
taken. What cannot run on this machine is named, with the reason. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime as ort
import torch
import typer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.peaks import copy_rate, product_rate
from benchmarks.gpu.subjects import ranking_inputs, ranking_model, shape_of
from benchmarks.turns import milliseconds
from loadtest.reports.record import record_line
from serving.runtime.tensorrt_plan import Plan
from training.compile.onnx_export import export
from training.compile.quantize import convert, prepare
from training.compile.tensorrt_engine import build
from training.models.ranking import RankingGraph
from vivace.onnx_session import open_session

NAMES = ["HISTORY_IDS", "CANDIDATE_IDS", "CANDIDATE_SCORES", "ENCODED_HISTORY"]
OUT = ["RANKED_IDS", "RANKED_VALUES"]
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Run = Callable[[list[np.ndarray]], Any]


def ceilings(device: torch.device) -> dict[str, float]:
    """FLOPs a second of a large matrix product by format, and bytes a second of a copy (read and write)."""
    n = 8192 if device.type == "cuda" else 1536
    formats = [name for name in FORMATS if device.type == "cuda" or name != "fp16"]  # no CPU here computes in it
    rates = {name: product_rate(name, device, n, 1.0) for name in formats}
    if device.type == "cpu":  # a format that the CPU lacks is computed in float32, by whoever does it better
        rates = {name: max(rate, rates["fp32"]) for name, rate in rates.items()}
    return rates | {"copy": copy_rate(device, 1.0)}


def _session(session: ort.InferenceSession, given: list[np.ndarray]) -> Any:
    return session.run(None, dict(zip(NAMES, given, strict=True)))


def _plan(plan: Plan, given: list[np.ndarray]) -> Any:
    return plan.run(dict(zip(NAMES, given, strict=True)))


def engines(
    graph: RankingGraph,
    device: torch.device,
    example: list[Tensor],
    folder: Path,
    skip: dict[str, str],
    compiled: bool = True,
) -> Iterator[tuple[str, str, Run]]:
    """(engine, format, run) of all that this machine can run; the rest goes into ``skip`` with the reason."""
    moved = graph.to(device)
    for name, dtype in FORMATS.items():
        if device.type == "cpu" and name == "fp16":
            skip["PyTorch fp16"] = "no CPU computes in it"
            continue
        for kind in ("eager", *["compile"] * compiled):
            called: Any = moved
            if kind == "compile":
                called = torch.compile(moved, mode="reduce-overhead" if device.type == "cuda" else "default")

            def run(given: list[np.ndarray], called: Any = called, dtype: torch.dtype = dtype) -> Any:
                tensors = [torch.from_numpy(x).to(device) for x in given]
                off = dtype == torch.float32
                with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16 if off else dtype, not off):
                    return [x.float().cpu() if x.is_floating_point() else x.cpu() for x in called(*tensors)]

            yield f"PyTorch {kind}", name, run
    graph.to("cpu")
    exact, ready = folder / "fp32.onnx", folder / "ready.onnx"
    export(graph, tuple(example), NAMES, OUT, exact)
    prepare(exact, ready)
    feed = {n: x.numpy() for n, x in zip(NAMES, example, strict=True)}
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    for name in ("fp32", "fp16", "int8", "int8-qdq", "fp8"):
        path = folder / f"{name}.onnx"
        if name != "fp32":
            convert(ready, path, name, [feed])
        if provider not in ort.get_available_providers():
            here = ort.get_available_providers()
            skip[f"ONNX Runtime {name}"] = f"onnxruntime has {here}; pip install onnxruntime-gpu"
        else:
            try:
                session = open_session(path, threads=0, providers=[provider])
                session.run(None, feed)
                yield "ONNX Runtime", name, partial(_session, session)
            except Exception as error:
                skip[f"ONNX Runtime {name}"] = str(error).splitlines()[0][:150]
        if name == "int8":
            skip["TensorRT int8"] = "dynamic quantization is ONNX Runtime's own; int8-qdq is TensorRT's"
            continue
        try:
            plan = folder / f"{name}.plan"
            batch = len(example[0])
            build(path, plan, (1, min(16, batch), batch))
            engine = Plan(plan)
            yield "TensorRT", name, partial(_plan, engine)
        except (ValueError, RuntimeError) as error:
            built = " (built, not run)" if plan.exists() else ""
            skip[f"TensorRT {name}"] = str(error).splitlines()[0][:150] + built


def work(graph: RankingGraph, given: list[Tensor]) -> dict[str, float]:
    """FLOPs of a batch, and bytes of its weights, inputs and outputs."""
    weights = sum(p.numel() * 4 for name, p in graph.named_parameters() if ".item." not in name)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        out = graph(*given)
    return {
        "flop": float(counter.get_total_flops()),
        "bytes": float(weights + sum(v.numel() * v.element_size() for v in (*given, *out))),
    }


def timed(
    name: str, shape: tuple[int, int], batches: list[int], seconds: float, ceiling: dict[str, float],
    where: torch.device, compiled: bool, skipped: dict[str, str],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Rows of a preset's ranker by every engine and batch. ``shape``: candidates and items."""
    sizes = shape_of(name, items=shape[1], candidates=shape[0])
    graph = RankingGraph(ranking_model(name, sizes)).eval()
    given = {b: ranking_inputs(b, sizes) for b in batches}
    needed = {b: work(graph, x) for b, x in given.items()}
    with tempfile.TemporaryDirectory() as folder:
        largest = given[max(batches)]
        for engine, kind, run in engines(graph, where, largest, Path(folder), skipped, compiled):
            for b, x in given.items():
                arrays = [v.numpy() for v in x]
                try:
                    ms = milliseconds(lambda _: run(arrays), seconds)  # noqa: B023
                except Exception as error:
                    skipped[f"{engine} {kind}"] = str(error).splitlines()[0][:150]
                    break
                peak = ceiling.get(kind, ceiling.get("bf16" if kind in ("fp16", "fp8") else "fp32", 0.0))
                least = max(needed[b]["flop"] / peak, needed[b]["bytes"] / ceiling["copy"]) * 1000
                yield {
                    "preset": name, "engine": engine, "format": kind, "batch": b, "ms": round(ms, 3),
                    "gflop": round(needed[b]["flop"] / 1e9, 3), "mb": round(needed[b]["bytes"] / 1e6, 2),
                    "share": round(least / ms, 7),
                }  # fmt: skip


def main(
    chosen: Annotated[list[str], typer.Option("--preset", help="whose ranker")] = ["base", "large"],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="requests at once")] = [1, 4, 16, 64, 256],  # noqa: B006
    candidates: int = 500,
    items: Annotated[int, typer.Option(help="of the catalogue")] = 50_000,
    seconds: Annotated[float, typer.Option(help="of one measurement")] = 2.0,
    device: Annotated[str, typer.Option(help="cuda or cpu; what is there if empty")] = "",
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="torch.compile, which takes a while")] = True,
) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    torch._dynamo.config.recompile_limit = 256  # Merlin's wrapper of layers is compiled once for each
    torch.manual_seed(7)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    best = ceilings(where)
    print("ceilings: " + ", ".join(f"{k} {v / 1e9:,.0f} G{'B' if k == 'copy' else 'FLOP'}/s" for k, v in best.items()))
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for name in chosen:
        for r in timed(name, (candidates, items), batch, seconds, best, where, compiled, skipped):
            rows.append(r)
            print(
                f"{name:6} {r['engine']:16} {r['format']:9} batch {r['batch']:4} {r['ms']:10.3f} ms  "
                f"{r['share']:7.1%} of the ceiling"
            )
    for what, why in skipped.items():
        print(f"not run: {what}: {why}")
    print(record_line(
        "roofline", device=str(where), ceilings=best, rows=rows, not_run=skipped, candidates=candidates, items=items,
        threads=torch.get_num_threads(),
    ))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
