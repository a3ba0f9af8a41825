"""PyTorch graphs to ONNX files, checked against PyTorch on real requests.

Axis legend: B requests, T history events, V item ids, P earlier events, S new events, C states of an event.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from preprocessing.features import Features
from serving.runtime.cache_settings import StateSettings
from serving.runtime.grown import GrownRetrieval
from training.data import batches
from training.data.live import with_live
from training.judge.parity import difference
from training.models.retrieval import EncoderStepGraph, RetrievalModel, ScoringGraph, states_of_event
from training.presets import Preset, shapes
from vivace import contract
from vivace.onnx_session import open_session
from vivace.step_contract import (
    ENCODER_STEP,
    SCORING,
    scoring_inputs,
    scoring_outputs,
    step_inputs,
    step_outputs,
)

OPSET = 18
TOLERANCE = 2e-4  # absolute, on scores of magnitude 10: float32 sums in another order
EQUAL_IDS = 0.99  # by position: items of nearly equal score change places
PARITY_REQUESTS = 64
PARITY_PAIRS = 64 << 20  # pairs of events: of 4,096 events 4 requests, which take the memory of 64 of 1,024
TRACED_EVENTS = 1024  # of a history, with which a graph is recorded
OUTSIDE_BYTES = 1024  # constants that a mapped file holds; small ones stay in the graph
CHECK_BYTES = 1 << 28  # of the cache that the check fills
HELD_BACK = 3  # newest events that the check appends

# axes that are free beside the batch, by tensor: a server may read less of the history and rank fewer candidates
RETRIEVAL_AXES = {t: (1, "history") for t in ("HISTORY_IDS", "HISTORY_TIMES", "HISTORY_TYPES")} | {
    contract.ENCODED_HISTORY: (1, "encoded")
}
RANKING_AXES = RETRIEVAL_AXES | {
    **{t: (1, "candidates") for t in ("CANDIDATE_IDS", "CANDIDATE_SCORES", "RANKED_IDS")},
    "RANKED_VALUES": (2, "candidates"),
}


Export = Callable[
    [Any, tuple[Tensor, ...], Sequence[str], Sequence[str], Path, Mapping[str, tuple[int, str]] | None], None
]  # a graph, its example, names of its inputs and outputs, the file, free axes: see ``export``


def names_of(tensors: Sequence[contract.WireTensor]) -> list[str]:
    return [t.name for t in tensors]


def example_requests(features: Features, preset: Preset, count: int = PARITY_REQUESTS) -> tuple[Tensor, ...]:
    """What the feature transform gives of validation requests, the last one with an empty history: see
    ``Requests.inputs``."""
    heads = [h.name for h in features.schema.heads]
    files = features.files("valid") or features.files("test")  # short logs have no validation; targets are not read
    count = min(count, max(4, PARITY_PAIRS // preset.encoder.history**2))
    requests = batches.requests(files, heads, preset.encoder.window, count)
    part = "valid" if features.files("valid") else "test"
    s = shapes(preset, features)
    request = next(iter(with_live(requests, features, part, s)))
    inputs = [torch.from_numpy(x.copy()) for x in request.inputs(s, features.schema.exclude_seen)]
    for tensor, value in zip(contract.retrieval_inputs(s), inputs, strict=False):
        if tensor.name in (s.history_ids.name, s.history_times.name, s.history_types.name):
            value[-1] = contract.PADDING_ID
    return tuple(inputs)


def export(
    graph: nn.Module,
    example: tuple[Tensor, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    path: Path,
    free: Mapping[str, tuple[int, str]] | None = None,
) -> None:
    """One ONNX file with a free batch axis on every tensor; raises if the checker finds fault. ``free``: one more axis
    of tensors by name, and what it is called."""
    path.parent.mkdir(parents=True, exist_ok=True)
    axes = {name: {0: "batch"} for name in (*inputs, *outputs)}
    for name, (axis, called) in (free or {}).items():
        if name in axes:
            axes[name][axis] = called
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        # the TorchScript exporter is the one Merlin's expert blocks were known to export with; the newer was not tried
        torch.onnx.export(
            graph.eval().cpu(),
            tuple(x.cpu() for x in example),
            str(path),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
    onnx.checker.check_model(str(path))


def put_outside(graph: Path, file: str, least_bytes: int = OUTSIDE_BYTES) -> None:
    """Moves the constants of ``least_bytes`` and more of an ONNX file into ``file`` beside it. ONNX Runtime maps that
    into memory and copies nothing: pages are read when a request first needs them, stay while memory lasts, and all
    processes share them."""
    model = onnx.load(str(graph))
    (graph.parent / file).unlink(missing_ok=True)  # onnx would append
    onnx.save(model, str(graph), save_as_external_data=True, location=file, size_threshold=least_bytes)


def _check(stage: str, apart: Mapping[str, float]) -> None:
    ids, *values = apart.items()
    if not ids[1] >= EQUAL_IDS:
        raise ValueError(
            f"{stage}: {ids[0]}: {ids[1]:.4f} of the ids equal PyTorch's, expected {EQUAL_IDS}; not published"
        )
    for name, value in values:
        if not value <= TOLERANCE:
            raise ValueError(
                f"{stage}: {name}: PyTorch and ONNX differ by {value:.3g}, expected at most {TOLERANCE}; not published"
            )


def _traced(
    example: tuple[Tensor, ...], names: Sequence[str], axes: Mapping[str, tuple[int, str]]
) -> tuple[Tensor, ...]:
    """What a graph is recorded with: of long histories two rows and the newest events, as the recorder keeps every
    tensor of the way. Both axes are free, and what is compared with PyTorch afterwards is the whole ``example``."""
    of_events = [axes.get(name, (0, ""))[1] in ("history", "encoded") for name in names]
    if max((x.shape[1] for x, cut in zip(example, of_events, strict=True) if cut), default=0) <= TRACED_EVENTS:
        return example
    return tuple(x[:2, -TRACED_EVENTS:] if cut else x[:2] for x, cut in zip(example, of_events, strict=True))


def export_checked(
    stage: str,
    graph: nn.Module,
    inputs: tuple[contract.WireTensor, ...],
    outputs: tuple[contract.WireTensor, ...],
    example: tuple[Tensor, ...],
    path: Path,
    reference: nn.Module | None = None,
    write: Export | None = None,
) -> dict[str, float]:
    """Exports a stage (by ``write``; ``export`` if none) and compares it with PyTorch (``reference``; the graph itself
    if none) on ``example``; the differences. Raises ValueError beyond them, also where they are NaN."""
    names_in, names_out = names_of(inputs), names_of(outputs)
    axes = RANKING_AXES if stage == contract.RANKING else RETRIEVAL_AXES
    (write or export)(graph, _traced(example, names_in, axes), names_in, names_out, path, axes)
    with torch.no_grad():
        expected = (reference or graph).eval()(*example)
    answer = open_session(path).run(names_out, {n: x.numpy() for n, x in zip(names_in, example, strict=True)})
    apart = difference([e.numpy() for e in expected], answer, names_out)
    _check(stage, apart)
    return apart


def export_alike(
    graph: nn.Module, given: Sequence[Tensor], names: Sequence[str], output: str, path: Path,
    free: Mapping[str, tuple[int, str]],
) -> float:  # fmt: skip
    """One graph of fresh items; how far ONNX is from PyTorch. Raises ValueError where they differ."""
    export(graph, tuple(given), names, [output], path, free)
    answer = open_session(path).run(
        None, {name: value.detach().numpy() for name, value in zip(names, given, strict=True)}
    )
    with torch.no_grad():
        apart = float(np.abs(graph(*given).numpy() - answer[0]).max())
    if not apart <= TOLERANCE:
        raise ValueError(
            f"fresh: {output}: PyTorch and ONNX differ by {apart:.3g}, expected at most {TOLERANCE}; not published"
        )
    return apart


def export_steps(model: RetrievalModel, s: contract.StageTensors, example: Sequence[Tensor], folder: Path) -> None:
    """ENCODER_STEP and SCORING; ``example``: inputs of the retrieval graph."""
    history_BT, exclude, *more = example
    b, states = len(history_BT), states_of_event(model.config)
    given = [history_BT[:, -2:], torch.ones(b, 3, dtype=torch.bool), torch.zeros(b, 3, states)]
    left = list(more)
    if s.timed:
        times_BT = left.pop(0)
        given += [times_BT[:, -2:], times_BT[:, -5:-2]]
    if s.types:
        given.append(left.pop(0)[:, -2:])
    inputs, outputs = step_inputs(s, states), step_outputs(s, states)
    free = {t.name: (1, "new") for t in (*inputs, *outputs)}
    free |= {t.name: (1, "earlier") for t in inputs if t.name.startswith("EARLIER")}
    export(EncoderStepGraph(model), tuple(given), names_of(inputs), names_of(outputs), folder / ENCODER_STEP, free)
    newest_BD = torch.zeros(b, s.width)
    export(
        ScoringGraph(model, s.candidates, s.rising), (history_BT, exclude, newest_BD, *left),
        names_of(scoring_inputs(s)), names_of(scoring_outputs(s)), folder / SCORING,
    )  # fmt: skip


def check_steps(
    folder: Path, s: contract.StageTensors, example: Sequence[Tensor], answer: Sequence[Tensor]
) -> dict[str, float]:
    """How far the graphs are, the newest events appended to the others' states, from the one graph's answer
    ``answer`` to ``example``, its inputs. Raises ValueError beyond rounding."""
    given, expected = [x.numpy() for x in example], [x.numpy() for x in answer]
    of_events = {0, *range(2, 2 + s.timed + s.types)}
    before = [np.roll(x, HELD_BACK, 1) if i in of_events else x for i, x in enumerate(given)]
    for i in of_events:
        before[i][:, :HELD_BACK] = contract.PADDING_ID
    with tempfile.TemporaryDirectory() as name:
        grown = GrownRetrieval(folder, s, StateSettings(CHECK_BYTES, path=f"{name}/states"))
        grown(before)
        ids, scores, encoded = grown(given)
    same, apart = float((ids == expected[0]).mean()), float(np.abs(scores - expected[1]).max())
    encodings = float(np.abs(encoded - expected[2]).max())
    if not (same >= EQUAL_IDS and apart <= TOLERANCE and encodings <= TOLERANCE):
        raise ValueError(
            f"grown histories: {same:.4f} of the ids as one graph answers them, expected {EQUAL_IDS}; scores differ by "
            f"{apart:.3g}, encodings by {encodings:.3g}, expected at most {TOLERANCE}; not published"
        )
    return {"equal ids": same, "scores": apart, "encodings": encodings}
