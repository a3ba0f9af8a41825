"""Batches cut into parts of about equal length, so that graphs need not work through the padding of the longest row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vivace.contract import PADDING_ID, StageTensors

CHUNK = 8  # rows that a graph takes at once at most: a batch of 64 needs less memory
PAIRS = CHUNK << 20  # pairs of events of the rows that a graph takes at once: attention's memory goes with them
STEP, SHORT_STEP, SHORT = 16, 8, 64  # events by which padded lengths differ, up to SHORT: few shapes to prepare for
RUN_EVENTS = 64  # a run of retrieval costs as much as it takes to read so many events (290 us, 4 to 7 us an event)
RANKING_RUN_EVENTS = 128  # the same of ranking, which does less with an event


def rows_at_once(length: int) -> int:
    """How many rows of so many events a graph takes at once: CHUNK up to 1,024, at 4,096 one."""
    return max(1, min(CHUNK, PAIRS // max(1, length) ** 2))


def chunks(history_BT: np.ndarray, whole: bool = False, run_events: int = RUN_EVENTS) -> list[tuple[np.ndarray, int]]:
    """(places of rows, newest events to read of them) for ids int64 [B, T], padded on the left: rows of about equal
    length together, at most CHUNK in each, cut where another run costs less than the padding that it saves. ``whole``:
    all T events, in the order that the rows have. ``run_events``: what a run costs beside its events, in events."""
    rows, t = history_BT.shape
    if whole:
        return [(places, t) for places in np.array_split(np.arange(rows), max(1, -(-rows // rows_at_once(t))))]
    known = history_BT != PADDING_ID
    length_B = np.where(known.any(1), t - known.argmax(1), 1)
    order = np.argsort(length_B, kind="stable")
    lengths = [min(t, padded(length)) for length in length_B[order].tolist()]
    ends = cuts(lengths, run_events)
    return [(order[start:end], lengths[end - 1]) for start, end in zip([0, *ends], ends, strict=False)]


def padded(length: int) -> int:
    """The least length for which a graph is run that holds ``length`` events."""
    step = SHORT_STEP if length <= SHORT else STEP
    return -(-length // step) * step


def cuts(lengths: Sequence[int], run_events: int = RUN_EVENTS) -> list[int]:
    """Where runs end, for ascending padded lengths: at the least cost, of events and of ``run_events`` for each run."""
    best, start_of = [0], [0]
    for end in range(1, len(lengths) + 1):
        longest = lengths[end - 1]
        cost, start = min(
            (best[start] + run_events + (end - start) * longest, start)
            for start in range(max(0, end - rows_at_once(longest)), end)
        )
        best.append(cost)
        start_of.append(start)
    ends, end = list[int](), len(lengths)
    while end > 0:
        ends.append(end)
        end = start_of[end]
    return ends[::-1]


def retrieved(
    run: Callable[[dict[str, np.ndarray]], Sequence[np.ndarray]], tensors: StageTensors, names: Sequence[str],
    given: Sequence[np.ndarray], whole: bool = False,
) -> list[np.ndarray]:  # fmt: skip
    """Outputs of the retrieval graph, which ``run`` runs with inputs by ``names``, for rows ``given`` all together."""
    s, parts = tensors, []
    of_events = (s.history_ids.name, s.history_times.name, s.history_types.name)
    for places, t in chunks(given[0], whole):
        named = zip(names, given, strict=True)
        parts.append((places, run({n: v[places, -t:] if n in of_events else v[places] for n, v in named})))
    return together(parts, len(given[0]), s.memory or given[0].shape[1])


def together(parts: Sequence[tuple[np.ndarray, Sequence[np.ndarray]]], rows: int, encoded: int = 0) -> list[np.ndarray]:
    """Outputs of all rows from those of the rows of each chunk. ``encoded``: M, to which the last output [B, <= M, D]
    is padded on the left with the zeros that an encoder gives padding."""
    out = [np.zeros((rows, *v.shape[1:]), v.dtype) for v in parts[0][1]]
    if encoded:
        out[-1] = np.zeros((rows, encoded, out[-1].shape[2]), out[-1].dtype)
    for places, outputs in parts:
        for number, (all_rows, part) in enumerate(zip(out, outputs, strict=True)):
            if encoded and number == len(out) - 1:
                all_rows[places, encoded - part.shape[1] :] = part
            else:
                all_rows[places] = part
    return out
