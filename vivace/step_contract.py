"""The contract of the two graphs that encode new events alone and score what comes of it, in one worker.

Axis legend: S new events (padded on the right), P earlier ones (padded on the left), D width, C states of an event.
"""

from __future__ import annotations

from vivace.contract import ENCODED_HISTORY, StageTensors, WireTensor

ENCODER_STEP, SCORING = "encoder_step.onnx", "scoring.onnx"
EARLIER_STATES, STATES, NEWEST = "EARLIER_STATES", "STATES", "NEWEST"


def step_inputs(s: StageTensors, states: int) -> tuple[WireTensor, ...]:
    """Ids of the new events; which of the earlier ones are padding (False), and their ``states`` numbers each; with
    times those of the new and of the earlier ones in ms; with types those of the new ones."""
    times = (WireTensor("HISTORY_TIMES", "INT64", (-1,)), WireTensor("EARLIER_TIMES", "INT64", (-1,)))
    return (
        WireTensor(s.history_ids.name, "INT64", (-1,)),
        WireTensor("EARLIER_KNOWN", "BOOL", (-1,)),
        WireTensor(EARLIER_STATES, "FP32", (-1, states)),
        *(times if s.timed else ()),
        *([WireTensor(s.history_types.name, "INT64", (-1,))] if s.types else []),
    )


def step_outputs(s: StageTensors, states: int) -> tuple[WireTensor, ...]:
    """Encodings of the new events, and what later events look at."""
    return (WireTensor(ENCODED_HISTORY, "FP32", (-1, s.width)), WireTensor(STATES, "FP32", (-1, states)))


def scoring_inputs(s: StageTensors) -> tuple[WireTensor, ...]:
    """Those of retrieval without what is of events alone, and the newest event's encoding."""
    newest = WireTensor(NEWEST, "FP32", (s.width,))
    return (s.history_ids, s.exclude, newest, *s.moment[s.types :], *([s.rising_ids] if s.rising else []))


def scoring_outputs(s: StageTensors) -> tuple[WireTensor, ...]:
    return (s.candidate_ids, s.candidate_scores)
