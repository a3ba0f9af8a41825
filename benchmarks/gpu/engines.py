"""The ranker and the retriever by engine and number format: time on the device, share of the card's peak, parity.

    python -m benchmarks.gpu.engines --out FOLDER --seconds 120

A row: preset, stage, engine, number format, form of the graph ("plain": as trained, "gpu": ``GpuRanking``, "folded":
with tables of what depends on an item alone), batch. ``ms`` is the median of replays of one CUDA graph with inputs on
the device (``graphed`` says where an engine takes none). FLOPs are those of the graph of that form, counted by hand (a
test compares with PyTorch's counter). ``share_bf16`` is of an 8192^3 product measured in the same run. Parity is
against PyTorch in float32: the largest difference of a score, the share of the ten best items that both have; with
untrained weights it is about rounding, not about quality.

Expected before the first run, from FLOPs and bytes: the ranker of ``base`` (0.16 GFLOP and, in bf16, some 8 KB of
intermediates a candidate at best) is bound by memory, about 25 % of the bf16 peak compiled at batch 1,024; ``large``
(1.5 GFLOP, about 25 KB a candidate) reaches 40 %. Eight bits halve the products, which are half of ``large``'s time,
and a cast or a pass is added: 1.3 times bf16 with calibrated scales, less with scales of each row, nothing for
``base``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import clock, peaks, steps, subjects
from benchmarks.gpu.linears import quantise, sparsify
from benchmarks.gpu.other_engines import OTHERS
from benchmarks.gpu.record import Figures
from benchmarks.gpu.steps import Asked
from benchmarks.gpu.subjects import Shape
from training.models.ranking import RankingGraph, RankingModel
from training.models.ranking_gpu import gpu_graph

ITEMS = 50_000
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
UNCAPTURED = ("onnxruntime", "tensorrt", "2:4")  # engines and formats with work of their own at each call
NEEDED_S = {"compile": 12.0, "aoti": 30.0, "tensorrt": 15.0}  # with less than that left, what follows may still fit
EIGHT_BITS = ("fp8", "fp8-rows", "int8")


@dataclass(frozen=True)
class Variant:
    """One way to run a stage. ``form``: "plain", "gpu" or "folded"; a retriever has only the plain one."""

    stage: str
    engine: str
    format: str
    form: str = "plain"
    lookup: str = "sum"


@dataclass
class Subject:
    """A stage of a preset with its inputs and float32 answers by batch."""

    name: str
    stage: str
    shape: Shape
    graph: nn.Module
    where: torch.device
    model: RankingModel | None = None
    given: dict[int, list[Tensor]] = field(default_factory=dict)
    answers: dict[int, list[Tensor]] = field(default_factory=dict)

    def inputs(self, batch: int) -> list[Tensor]:
        if batch not in self.given:
            make = subjects.ranking_inputs if self.stage == "ranker" else subjects.retrieval_inputs
            with self.where:
                self.given[batch] = make(batch, self.shape)
        return self.given[batch]

    def reference(self, batch: int) -> list[Tensor]:
        """Answers in float32 of the first requests of a batch."""
        if batch not in self.answers:
            few = [x[:64] for x in self.inputs(batch)]
            with precision("fp32"):
                self.answers[batch] = [x.float() for x in self.graph(*few)[:2]]
        return self.answers[batch]

    def flops(self, folded: bool) -> float:
        """FLOPs a request."""
        if self.stage == "retriever":
            return subjects.retriever_flops(self.name, self.shape)
        return subjects.ranker_flops(self.name, self.shape, folded)


def subject(name: str, stage: str, items: int, where: torch.device) -> Subject:
    shape = subjects.shape_of(name, items)
    with where:
        if stage == "retriever":
            return Subject(name, stage, shape, subjects.retrieval_graph(name, shape), where)
        model = subjects.ranking_model(name, shape)
    return Subject(name, stage, shape, RankingGraph(model).eval(), where, model)


@contextmanager
def precision(number_format: str) -> Iterator[None]:
    """TF32 products where the format says so, float32 ones elsewhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if number_format == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def built(of: Subject, variant: Variant, batch: int) -> nn.Module:
    """The stage's graph in the variant's form and number format."""
    dtype = DTYPES.get(variant.format, torch.bfloat16)
    if of.model is not None and variant.form != "plain":
        graph: nn.Module = gpu_graph(of.model, dtype, variant.form == "folded", variant.lookup)  # type: ignore[arg-type]
    else:
        graph = subjects.cast(copy.deepcopy(of.graph), dtype)
    example = [x[:64] for x in of.inputs(batch)]
    if variant.format in EIGHT_BITS:
        quantise(graph, variant.format, lambda: graph(*example))  # type: ignore[arg-type]
    elif variant.format == "2:4":
        sparsify(graph, of.where.type == "cuda")
    return graph


def parity(expected: list[Tensor], got: list[Tensor], stage: str) -> dict[str, float]:
    """Largest difference of a score, item by item, and the share of the ten best that both have, of answers (ids,
    scores) with the best first."""
    ids, other = expected[0].long(), got[0].long()[: len(expected[0])]
    score, score_other = (x[:, 0] if x.ndim == 3 else x for x in (expected[1], got[1][: len(ids)].float()))
    k = min(10, ids.shape[1])
    top = (ids[:, :k, None] == other[:, None, :k]).any(2).float().mean()
    at = [x.argsort(1) for x in (ids, other)]
    same = ids.gather(1, at[0]) == other.gather(1, at[1])
    apart = (score.gather(1, at[0]) - score_other.gather(1, at[1])).abs()
    if stage == "retriever":  # the sets differ at their end; the k-th best score of each is compared
        same, apart = torch.ones_like(score, dtype=torch.bool), (score - score_other).abs()
    finite = bool(torch.isfinite(score_other).all())
    worst = float(apart[same].max()) if bool(same.any()) and finite else float("nan")
    return {"largest_difference": worst, "same_top10": float(top)}


def given_to(of: Subject, variant: Variant, batch: int) -> list[Tensor]:
    """A batch's inputs on the device; encodings in the format in which a retriever of that format hands them over."""
    given = of.inputs(batch)
    if of.stage == "ranker" and variant.form != "plain":
        return [*given[:3], given[3].to(DTYPES.get(variant.format, torch.bfloat16))]
    return given


def call_of(variant: Variant, graph: nn.Module, given: list[Tensor]) -> Callable[[], Any]:
    """A call of the variant."""
    if variant.engine == "eager":
        return lambda: graph(*given)
    if variant.engine == "compile":
        torch._dynamo.reset()
        compiled = torch.compile(graph, dynamic=False)
        return lambda: compiled(*given)
    return OTHERS[variant.engine](graph, given, variant.format)


def _captured(call: Callable[[], Any], of: Subject, variant: Variant) -> tuple[Callable[[], Any], Any, bool]:
    """A replay of the call, its outputs, and whether it is a CUDA graph's; the call itself where none takes it."""
    if of.where.type == "cuda" and variant.engine not in UNCAPTURED and variant.format not in UNCAPTURED:
        try:
            return *clock.captured(call, of.where), True
        except Exception as error:
            print(f"not captured: {str(error).splitlines()[0][:200]}", flush=True)
            torch.cuda.synchronize()
    return call, call(), False


def measure_variant(
    figures: Figures, of: Subject, variant: Variant, batch: int, rates: dict[str, float], host: bool = False
) -> float:
    """Builds, runs and writes one row; its ms."""
    with precision(variant.format):
        given = given_to(of, variant, batch)
        call = call_of(variant, built(of, variant, batch), given)
        replay, out, graphed = _captured(call, of, variant)
        seconds = 0.25 if of.where.type == "cuda" else 0.02
        ms = clock.device_ms(replay, of.where, seconds)
        replay()
        apart = parity(of.reference(batch), list(out[:2]), of.stage)
        extra = {"host_ms": clock.host_ms(replay, given, out, of.where, seconds)} if host else {}
    flop = of.flops(variant.form == "folded") * batch
    itemsize = {"fp32": 4, "tf32": 4, "fp8": 1, "fp8-rows": 1, "int8": 1}.get(variant.format, 2)
    moved = subjects.bytes_of(of.graph, given, list(out), itemsize)
    per_s = flop / ms * 1000
    figures.row(
        preset=of.name, stage=of.stage, engine=variant.engine, format=variant.format, form=variant.form,
        lookup=variant.lookup if variant.form != "plain" else "", batch=batch, graphed=graphed, ms=ms, gflop=flop / 1e9,
        tflops=per_s / 1e12, share_bf16=per_s / rates["bf16"], share_data_sheet=per_s / peaks.DATA_SHEET_BF16,
        mb=moved / 1e6, share_copy=moved / ms * 1000 / rates["copy"], requests_per_s=batch / ms * 1000,
        **apart, **extra,
    )  # fmt: skip
    return ms


def attempt(
    figures: Figures, of: Subject, variant: Variant, batch: int, rates: dict[str, float], host: bool = False
) -> float | None:
    """``measure_variant``; None, and the reason written, where it does not run or no time is left."""
    what = f"{of.name} {of.stage} {variant.engine} {variant.format} {variant.form} batch {batch}"
    if figures.left() < NEEDED_S.get(variant.engine, 1.0):
        figures.skip(what, f"no time left: {figures.left():.0f} s")
        return None
    before = figures.left()
    try:
        ms = measure_variant(figures, of, variant, batch, rates, host)
        figures.values["rows"][-1]["took_s"] = round(before - figures.left(), 1)
        return ms
    except Exception as error:
        figures.skip(what, f"{type(error).__name__}: {error}")
        return None
    finally:
        clock.release(of.where)


def best_batch(figures: Figures, of: Subject, variant: Variant, batches: list[int], rates: dict[str, float]) -> int:
    """The batch of the most requests a second; what was kept of the others is let go."""
    taken = {b: attempt(figures, of, variant, b, rates) for b in batches}
    speeds = {b: b / ms for b, ms in taken.items() if ms}
    best = max(speeds, key=lambda b: speeds[b]) if speeds else batches[0]
    of.given = {b: x for b, x in of.given.items() if b == best}
    of.answers = {b: x for b, x in of.answers.items() if b == best}
    return best


def ways(stage: str, *named: str) -> list[Variant]:
    """Variants written as "engine format form lookup", the last two where they are not the usual ones."""
    return [Variant(stage, *way.split()) for way in named]


RANKERS = {  # in order of worth
    "claims": ways("ranker", "eager bf16 gpu sorted", "compile bf16 gpu", "compile fp8 gpu"),
    "quick": ways("ranker", "eager fp32", "eager tf32", "eager fp16 gpu sorted", "eager bf16 gpu"),
    "others": ways(
        "ranker", "onnxruntime fp32", "onnxruntime fp16 gpu", "tensorrt fp16 gpu", "tensorrt fp32",
    ),
    "compiled": ways(
        "ranker", "compile bf16 folded", "compile fp8 folded", "compile int8 gpu", "compile fp8-rows gpu",
    ),
    "sparse": ways("ranker", "eager 2:4 gpu sorted"),
    "rest": ways(
        "ranker", "aoti bf16 gpu", "compile bf16 gpu sorted", "eager fp8 gpu sorted", "compile tf32",
        "compile fp16 gpu", "eager bf16 folded sorted", "compile fp32",
    ),
}  # fmt: skip
RETRIEVERS = {
    "quick": ways("retriever", "eager bf16", "eager fp32", "eager tf32", "eager fp16"),
    "compiled": ways("retriever", "compile bf16", "compile fp8"),
    "rest": ways("retriever", "eager 2:4", "compile int8", "compile fp8-rows", "compile tf32"),
}
LARGE, BASE, LARGE_RETRIEVER, BASE_RETRIEVER = [256, 512, 1024], [512, 1024, 2048], [64, 256], [256, 1024]


def plan(cpu: bool) -> list[tuple[str, str, list[int], list[Variant]]]:
    """(preset, stage, batches, ways to run it) in order of worth: what the claims rest on first, the rest after. The
    first way of a preset's stage is run at every batch, the others at its best."""
    if cpu:
        slow = ("compile", "aoti")
        every = [[v for group in of.values() for v in group if v.engine not in slow] for of in (RANKERS, RETRIEVERS)]
        return [("tiny", "ranker", [2, 4], every[0]), ("tiny", "retriever", [2], every[1])]
    large, base = ("large", "ranker", LARGE), ("base", "ranker", BASE)
    retrievers = [("large", "retriever", LARGE_RETRIEVER), ("base", "retriever", BASE_RETRIEVER)]
    return [
        (*large, RANKERS["claims"]), (*base, RANKERS["claims"]), (*large, RANKERS["quick"]), (*base, RANKERS["quick"]),
        *((*of, RETRIEVERS["quick"]) for of in retrievers), (*base, RANKERS["others"]), (*large, RANKERS["compiled"]),
        *((*of, RETRIEVERS["compiled"]) for of in retrievers), (*large, RANKERS["sparse"]),
        (*base, RANKERS["compiled"]), (*base, RANKERS["sparse"]), (*base, RANKERS["rest"]), (*large, RANKERS["rest"]),
        *((*of, RETRIEVERS["rest"]) for of in retrievers),
    ]  # fmt: skip


@torch.no_grad()
def measure(figures: Figures, where: torch.device, given: Asked) -> None:
    cpu = where.type == "cpu"
    items = 500 if cpu else ITEMS
    rates = peaks.measure(figures, where, ("bf16",), 0.02 if cpu else 0.3)
    figures.set(data_sheet_bf16=peaks.DATA_SHEET_BF16, items=items)
    here: dict[tuple[str, str], Subject] = {}
    best: dict[tuple[str, str], int] = {}
    for name, stage, batches, variants in plan(cpu):
        key = (name, stage)
        try:
            of = here.get(key) or here.setdefault(key, subject(name, stage, items, where))
        except Exception as error:
            figures.skip(f"{name} {stage}", f"{type(error).__name__}: {error}")
            continue
        if key not in best:
            attempt(figures, of, variants[0], 1, rates, host=True)  # the time of one request
            best[key], variants = best_batch(figures, of, variants[0], batches, rates), variants[1:]
            figures.set(best_batch={f"{n} {s}": b for (n, s), b in best.items()})
        for variant in variants:
            host = (variant.engine, variant.format) == ("compile", "bf16")
            attempt(figures, of, variant, best[key], rates, host)


if __name__ == "__main__":
    steps.run("engines", measure, "the stages by engine and number format")
