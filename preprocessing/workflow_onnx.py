"""Compiles a fitted NVTabular workflow to ONNX, so that pandas never runs in a request.

Each raw column is one graph input: string [rows] for categoricals ("" is null), float32 [rows] for continuous ones
(NaN is null). Each encoded column is one output, named by ``encoded_name``; a cross has no input, but those of its
columns, which have to be there. Operators: EmptyToNull, Crossed, Categorify (one vocabulary a column), FillMissing,
FillMedian, Normalize, NormalizeMinMax, LogOp, and selections; anything else raises.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
from onnx import TensorProto, helper

from preprocessing.workflow import Crossed, EmptyToNull
from vivace.contract import NULL_ID, OOV_ID, cross_name

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import nvtabular as nvt
    from merlin.dag import Node
    from merlin.dag.ops.concat_columns import ConcatColumns
    from merlin.dag.ops.selection import SelectionOp
    from merlin.dag.ops.subset_columns import SubsetColumns
    from nvtabular import ops

OPSET = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]


def encoded_name(column: str) -> str:
    """Output of the graph for ``column`` (ONNX wants names of inputs and outputs to differ)."""
    return f"{column}__encoded"


def vocabulary(categorify: ops.Categorify, column: str) -> pd.Series:
    """Fitted vocabulary: values indexed by their ids (3 and up)."""
    path = categorify.categories[categorify.storage_name.get(column, column)]
    table = pd.read_parquet(path)
    return table[column]


def event_vocabulary(workflow: nvt.Workflow, column: str) -> pd.Series:
    """Fitted vocabulary of ``column`` in a workflow; raises ValueError if it has none."""
    for node in _nodes(workflow):
        if isinstance(node.op, ops.Categorify) and column in node.input_schema.column_names:
            return vocabulary(node.op, column)
    raise ValueError(f"workflow: column {column} has no vocabulary")


class _Graph:
    """The ONNX graph under construction; every value is named once."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: dict[str, int] = {}

    def add(self, op: str, inputs: list[str], domain: str = "", **attributes: Any) -> str:
        name = f"v{len(self.nodes)}_{op}"
        self.nodes.append(helper.make_node(op, inputs, [name], domain=domain, **attributes))
        return name

    def constant(self, value: Any, dtype: type) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def source(self, column: str, is_text: bool) -> str:
        kind = TensorProto.STRING if is_text else TensorProto.FLOAT
        self.inputs[column] = kind
        return column


def _categorify(graph: _Graph, op: ops.Categorify, column: str, value: str) -> str:
    words = vocabulary(op, column)
    if not all(isinstance(w, str) for w in words):
        raise ValueError(f"column {column}: expected a vocabulary of strings, got {words.dtype}")
    return graph.add(
        "LabelEncoder",
        [value],
        domain="ai.onnx.ml",
        keys_strings=["", *words],
        values_int64s=[NULL_ID, *(int(i) for i in words.index)],
        default_int64=OOV_ID,
    )


def _numbers(graph: _Graph, value: str, words: Sequence[str]) -> str:
    """Place of each text among ``words`` from 2 on; 0 for "", 1 for others."""
    return graph.add(
        "LabelEncoder",
        [value],
        domain="ai.onnx.ml",
        keys_strings=["", *words],
        values_int64s=[0, *range(2, len(words) + 2)],
        default_int64=1,
    )


def _categorify_cross(graph: _Graph, op: ops.Categorify, column: str, values: Sequence[str]) -> str:
    """Ids of values together: a number of each text, one number of all, and that number's id."""
    pairs = vocabulary(op, column)
    rows = [json.loads(pair) for pair in pairs]
    key, null, keys = "", "", np.zeros(len(rows), np.int64)
    for place, value in enumerate(values):
        words = sorted({row[place] for row in rows})
        part, of_word = _numbers(graph, value, words), {word: i for i, word in enumerate(words, 2)}
        missing = graph.add("Equal", [part, graph.constant(0, np.int64)])
        scale = len(words) + 2
        keys = keys * scale + np.array([of_word[row[place]] for row in rows], np.int64)
        key = part if not key else graph.add("Add", [graph.add("Mul", [key, graph.constant(scale, np.int64)]), part])
        null = missing if not null else graph.add("Or", [null, missing])
    ids = graph.add(
        "LabelEncoder",
        [key],
        domain="ai.onnx.ml",
        keys_int64s=[-1, *(int(k) for k in keys)],  # -1: the list may not be empty
        values_int64s=[OOV_ID, *(int(i) for i in pairs.index)],
        default_int64=OOV_ID,
    )
    return graph.add("Where", [null, graph.constant(NULL_ID, np.int64), ids])


def _fill(graph: _Graph, value: str, fill: float) -> str:
    return graph.add("Where", [graph.add("IsNaN", [value]), graph.constant(fill, np.float32), value])


def _affine(graph: _Graph, value: str, shift: float, scale: float) -> str:
    """(x - shift) / scale in float64, as NVTabular computes it, then float32."""
    wide = graph.add("Cast", [value], to=TensorProto.DOUBLE)
    shifted = graph.add("Sub", [wide, graph.constant(shift, np.float64)])
    if scale:
        shifted = graph.add("Div", [shifted, graph.constant(scale, np.float64)])
    return graph.add("Cast", [shifted], to=TensorProto.FLOAT)


def _apply(graph: _Graph, op: Any, column: str, value: str | tuple[str, ...]) -> str:
    if isinstance(value, tuple):
        if isinstance(op, ops.Categorify):
            return _categorify_cross(graph, op, column, value)
        raise NotImplementedError(f"column {column}: expected Categorify after Crossed, got {type(op).__name__}")
    if isinstance(op, EmptyToNull):
        return value
    if isinstance(op, ops.Categorify):
        return _categorify(graph, op, column, value)
    if isinstance(op, ops.FillMissing):
        return _fill(graph, value, op.fill_val)
    if isinstance(op, ops.FillMedian):
        return _fill(graph, value, float(op.medians[column]))
    if isinstance(op, ops.Normalize):
        return _affine(graph, value, float(op.means[column]), float(op.stds[column]))
    if isinstance(op, ops.NormalizeMinMax):
        low, high = float(op.mins[column]), float(op.maxs[column])
        return _affine(graph, value, low, high - low)
    if isinstance(op, ops.LogOp):
        return graph.add("Log", [graph.add("Add", [value, graph.constant(1, np.float32)])])
    raise NotImplementedError(
        f"column {column}: operator {type(op).__name__} has no ONNX form here; use one that transform_onnx lists"
    )


def _is_text(workflow: nvt.Workflow, column: str) -> bool:
    """A raw column is text if a Categorify sees it."""
    return any(
        isinstance(node.op, ops.Categorify) and column in node.input_schema.column_names for node in _nodes(workflow)
    )


def _nodes(workflow: nvt.Workflow) -> list[Node]:
    from merlin.dag.node import iter_nodes

    return list(iter_nodes([workflow.output_node]))


def _values(workflow: nvt.Workflow, graph: _Graph, node: Node, columns: set[str]) -> dict[str, Any]:
    """Graph value of each column that ``node`` puts out, for the raw columns ``columns``: its name, or of what Crossed
    puts together the names of its parts."""
    parents = node.parents_with_dependencies
    incoming: dict[str, Any] = {}
    for parent in parents:
        incoming.update(_values(workflow, graph, parent, columns))
    if not parents:
        for name in node.input_schema.column_names if node.input_schema else ():
            if name in columns:
                incoming[name] = graph.source(name, _is_text(workflow, name))
    if isinstance(node.op, ops.Groupby):
        return incoming  # rows are compiled; grouping is the feature store's part
    selected = {n: v for n, v in incoming.items() if n in node.input_schema.column_names}
    if node.op is None or isinstance(node.op, SelectionOp | ConcatColumns | SubsetColumns):
        return selected
    if isinstance(node.op, Crossed):
        names = node.input_schema.column_names
        whole = all(name in selected for name in names)
        return {cross_name(names): tuple(selected[name] for name in names)} if whole else {}
    return {name: _apply(graph, node.op, name, value) for name, value in selected.items()}


def compile_workflow(workflow: nvt.Workflow, columns: Sequence[str]) -> onnx.ModelProto:
    """The fitted row operators of ``workflow`` over the raw ``columns`` as one ONNX model.

    Raises ValueError for a column that the workflow does not encode, NotImplementedError for an operator without an
    ONNX form.
    """
    graph = _Graph()
    values = _values(workflow, graph, workflow.output_node, set(columns))
    missing = [name for name in columns if name not in values]
    if missing:
        raise ValueError(f"workflow: expected to encode {list(columns)}, but {missing} are not among its columns")
    outputs = []
    for column in columns:
        is_id = graph.inputs.get(column, TensorProto.STRING) == TensorProto.STRING  # a cross has no input
        name = encoded_name(column)
        graph.nodes.append(helper.make_node("Identity", [values[column]], [name]))
        outputs.append(helper.make_tensor_value_info(name, TensorProto.INT64 if is_id else TensorProto.FLOAT, ["rows"]))
    inputs = [helper.make_tensor_value_info(n, k, ["rows"]) for n, k in graph.inputs.items()]
    proto = helper.make_graph(graph.nodes, "transform", inputs, outputs, graph.constants)
    model = helper.make_model(proto, opset_imports=OPSET, ir_version=9, producer_name="vivace")
    onnx.checker.check_model(model)
    return model


def graph_feed(frame: pd.DataFrame, columns: Sequence[str], text: set[str]) -> dict[str, np.ndarray]:
    """Raw rows as inputs of the graph: nulls become "" and NaN."""
    return {
        c: frame[c].astype(object).where(frame[c].notna(), "").to_numpy(object)
        if c in text
        else frame[c].astype(np.float32).to_numpy()
        for c in columns
    }


def save(model: onnx.ModelProto, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
