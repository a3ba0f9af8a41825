"""The ranking graph with its candidates in micro-batches (M-FALCON, Zhai et al. 2024, section 4.4): the history is read
once, then a loop within the graph scores so many candidates at a time, so that memory does not grow with their number.

Three graphs are exported: what comes before the loop, its body and what comes after it. They are put together in one
file with the inputs and outputs of ``contract.ranking_inputs``, so who runs it needs to know nothing of the loop.
Axis legend: B requests, T history events, N candidates, n of them scored so far, D width, H heads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from training.compile.onnx_export import RANKING_AXES, Export, export
from training.models.context import moment_of
from training.models.ranking import RankingGraph

BODY, END = "of_chunk/", "of_end/"  # before the names of what is worked out in the loop and after it
KEYS, VALUES, NEWEST, TIMES, NONE = "KEYS", "VALUES", "NEWEST_EVENT", "CHUNKS", "NO_LOGITS"
STEP, GO_ON, SO_FAR, LOGITS = "CHUNK", "GO_ON", "LOGITS_SO_FAR", "LOGITS"
ROUND = "ROUND"  # what the loop counts, a scalar; STEP is the same with an axis
FREE = {KEYS: (1, "encoded"), VALUES: (1, "encoded"), NONE: (1, "none"), SO_FAR: (1, "scored"), LOGITS: (1, "scored")}
SHARED = {KEYS, VALUES, NEWEST, STEP, SO_FAR, LOGITS}


class Before(nn.Module):
    """Ranking inputs to what the loop reads of the history, and how often it goes round."""

    def __init__(self, graph: RankingGraph, chunk: int) -> None:
        super().__init__()
        self.model, self.chunk = graph.model, chunk

    def forward(
        self, history_ids: Tensor, candidate_ids: Tensor, candidate_scores: Tensor, encoded_history: Tensor,
        *more: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """KEYS and VALUES float32 [B, T, D], NEWEST [B, 1, D], TIMES int64 [1], NONE float32 [B, 0, H]."""
        types, _, _ = moment_of(self.model.types, self.model.columns, more)
        key, value = self.model.keys_and_values(encoded_history, history_ids, types)
        times = (torch.ones_like(candidate_ids[:1]).sum(1) + (self.chunk - 1)) // self.chunk
        none = candidate_scores[:, :0, None].expand(-1, -1, len(self.model.head_names))
        return key, value, encoded_history[:, -1:] + 0.0, times, none + 0.0


class Body(nn.Module):
    """The logits of one chunk behind those of the chunks before it."""

    def __init__(self, graph: RankingGraph, chunk: int) -> None:
        super().__init__()
        self.model, self.chunk = graph.model, chunk

    def forward(
        self, step: Tensor, so_far_BnH: Tensor, history_ids: Tensor, candidate_ids: Tensor, candidate_scores: Tensor,
        key: Tensor, value: Tensor, newest: Tensor, *more: Tensor,
    ) -> Tensor:  # fmt: skip
        """float32 [B, n + chunk, H], fewer of the last chunk."""
        types, context, live = moment_of(self.model.types, self.model.columns, more)
        start = step[0] * self.chunk
        ids, scores = (x[:, start : start + self.chunk] for x in (candidate_ids, candidate_scores))
        logits = self.model.logits(ids, scores, candidate_scores, history_ids, types, key, value, newest, context, live)
        return torch.cat([so_far_BnH, logits], 1)


class After(nn.Module):
    """Logits to what the ranking graph answers."""

    def __init__(self, graph: RankingGraph) -> None:
        super().__init__()
        self.graph = graph

    def forward(
        self, logits: Tensor, history_ids: Tensor, candidate_ids: Tensor, scores: Tensor, *more: Tensor
    ) -> tuple[Tensor, ...]:
        """See ``RankingGraph.ordered``."""
        return self.graph.ordered(logits, history_ids, candidate_ids, scores, *more)


def export_in_chunks(chunk: int) -> Export:
    """How a ranking graph is exported that scores ``chunk`` candidates at a time (0: all at once)."""
    return partial(_export, chunk) if chunk else export


def _export(
    chunk: int, graph: RankingGraph, example: tuple[Tensor, ...], inputs: Sequence[str], outputs: Sequence[str],
    path: Path, axes: Mapping[str, tuple[int, str]] | None = None,
) -> None:  # fmt: skip
    """See ``onnx_export.export``."""
    nearest = graph.model.nearest
    if nearest is not None and not nearest.per_candidate:
        raise ValueError(
            "--at-once: expected a ranker whose candidates can be scored apart, got ranker.nearest_to 'request', which "
            "chooses events by all of them; train with ranker.nearest_to 'candidate', or leave --at-once out"
        )
    graph = graph.eval()
    history, ids, scores, encoded, *more = example
    names, rest = list(inputs[:3]), list(inputs[4:])
    before, body, after = Before(graph, chunk).eval(), Body(graph, chunk).eval(), After(graph).eval()
    with torch.no_grad():
        key, value, newest, _, none = before(history, ids, scores, encoded, *more)
        step = torch.zeros(1, dtype=torch.int64)
        logits = graph.model(history, ids, scores, encoded, *more)
    free = {**(axes or RANKING_AXES), **FREE}
    with tempfile.TemporaryDirectory() as folder:
        parts = [Path(folder) / name for name in ("before.onnx", "body.onnx", "after.onnx")]
        export(before, example, list(inputs), [KEYS, VALUES, NEWEST, TIMES, NONE], parts[0], free)
        given = (step, logits[:, :chunk], history, ids, scores, key, value, newest, *more)
        export(body, given, [STEP, SO_FAR, *names, KEYS, VALUES, NEWEST, *rest], [LOGITS], parts[1], free)
        given = (logits, history, ids, scores, *more)
        export(after, given, [LOGITS, *names, *rest], list(outputs), parts[2], free)
        whole = _together(inputs, onnx.load(parts[0]), onnx.load(parts[1]), onnx.load(parts[2]), none.shape[2])
    onnx.checker.check_model(whole, full_check=False)
    onnx.save(whole, str(path))


def _together(
    inputs: Sequence[str], first: onnx.ModelProto, body: onnx.ModelProto, last: onnx.ModelProto, heads: int
) -> onnx.ModelProto:
    """One model of the three: the body reads what it needs from around the loop. A part whose graph reads an input no
    further has lost it, so the whole has the ``inputs`` that any of them reads."""
    read = {i.name: i for part in (last, body, first) for i in part.graph.input}
    outer = set(inputs) | {o.name for o in first.graph.output}
    _rename(body.graph, BODY, outer | SHARED)
    _rename(last.graph, END, outer | SHARED | {o.name for o in last.graph.output})
    floats: list[str | int | None] = ["batch", "scored", heads]
    loop = helper.make_graph(
        [
            helper.make_node("Reshape", [ROUND, f"{BODY}one"], [STEP]),
            *body.graph.node,
            helper.make_node("Identity", [GO_ON], [f"{GO_ON}_THEN"]),
        ],
        "chunk",
        [
            helper.make_tensor_value_info(ROUND, TensorProto.INT64, []),
            helper.make_tensor_value_info(GO_ON, TensorProto.BOOL, []),
            helper.make_tensor_value_info(SO_FAR, TensorProto.FLOAT, floats),
        ],
        [
            helper.make_tensor_value_info(f"{GO_ON}_THEN", TensorProto.BOOL, []),
            helper.make_tensor_value_info(f"{BODY}{LOGITS}", TensorProto.FLOAT, floats),
        ],
        initializer=[helper.make_tensor(f"{BODY}one", TensorProto.INT64, [1], [1])],
    )
    for node in loop.node:
        node.output[:] = [f"{BODY}{LOGITS}" if name == LOGITS else name for name in node.output]
    graph = helper.make_graph(
        [*first.graph.node, helper.make_node("Loop", [TIMES, "", NONE], [LOGITS], body=loop), *last.graph.node],
        "ranking",
        [read[name] for name in inputs if name in read],
        list(last.graph.output),
        initializer=_once([*first.graph.initializer, *body.graph.initializer, *last.graph.initializer]),
    )
    return helper.make_model(graph, opset_imports=first.opset_import, ir_version=first.ir_version)


def _once(initializers: Sequence[TensorProto]) -> list[TensorProto]:
    return list({i.name: i for i in initializers}.values())


def _rename(graph: onnx.GraphProto, before: str, kept: set[str]) -> None:
    """Puts ``before`` in front of all names but those in ``kept``."""
    names = {i.name for i in graph.initializer} | {o for node in graph.node for o in node.output}
    new: Mapping[str, str] = {name: before + name for name in names - kept if name}
    for node in graph.node:
        assert not any(a.HasField("g") for a in node.attribute), f"{node.op_type}: a graph within the loop's"
        node.name = before + node.name
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    for initializer in graph.initializer:
        initializer.name = new.get(initializer.name, initializer.name)
