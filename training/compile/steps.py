"""The graphs that encode only what is new of a history, exported and checked against the one that encodes it whole.

Axis legend: B requests, T history events, P earlier events, S new events, C states of an event, N candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from serving.runtime.grown import GrownRetrieval
from training.compile.onnx_export import EQUAL_IDS, TOLERANCE, export, names_of
from training.models.retrieval import RetrievalModel
from training.models.steps import EncoderStepGraph, ScoringGraph, states_of_event
from vivace import contract
from vivace.step_contract import (
    ENCODER_STEP,
    SCORING,
    scoring_inputs,
    scoring_outputs,
    step_inputs,
    step_outputs,
)

CHECK_BYTES = 1 << 28  # of the cache that the check fills
HELD_BACK = 3  # newest events that the check appends


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
    folder: Path, s: contract.StageTensors, given: Sequence[np.ndarray], expected: Sequence[np.ndarray]
) -> dict[str, float]:
    """How far the graphs are, the newest events appended to the others' states, from the one graph's answer
    ``expected`` to ``given``, its inputs. Raises ValueError beyond rounding."""
    grown = GrownRetrieval(folder, s, CHECK_BYTES)
    of_events = {0, *range(2, 2 + s.timed + s.types)}
    before = [np.roll(x, HELD_BACK, 1) if i in of_events else x for i, x in enumerate(given)]
    for i in of_events:
        before[i][:, :HELD_BACK] = contract.PADDING_ID
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
