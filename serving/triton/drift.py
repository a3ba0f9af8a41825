"""What is counted for drift and sampled for parity, between Triton's requests and the counts of a worker.

Runs inside Triton's Python stub only (it imports ``triton_python_backend_utils``, by ``stage``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serving.runtime.drift import DriftCounts
from serving.runtime.known import Known
from serving.runtime.sampling import Sampling
from serving.triton.stage import ParsedRequest


def count_requests(counts: DriftCounts | None, requests: Sequence[ParsedRequest], inputs: Sequence[np.ndarray]) -> None:
    """``inputs``: the feature transform's tensors of the rows of ``requests``. What a server asks itself is left
    out."""
    if counts is None:
        return
    queried = [bool(row.query) for request in requests for row in request.rows]
    theirs = [not request.itself for request in requests]
    if all(theirs):
        counts.requests(inputs, queried)
    elif any(theirs):
        rows = np.flatnonzero(np.repeat(theirs, [len(request.rows) for request in requests]))
        counts.requests([tensor[rows] for tensor in inputs], [queried[row] for row in rows])


def count_answer(
    counts: DriftCounts | None, itself: bool, shown: Sequence[np.ndarray], status_B: np.ndarray,
    queried: Sequence[bool],
) -> None:  # fmt: skip
    """ITEM_ID and the values of its items, STATUS (object [B] of bytes) and whether each row has a query; ``itself``:
    whether the server asks."""
    if counts is not None and not itself:
        counts.answered(shown, status_B.tolist(), queried)


def sample(
    sampling: Sampling | None, requests: Sequence[ParsedRequest], known: Known, inputs: Sequence[np.ndarray]
) -> None:
    """Puts a share of ``requests`` aside, to be computed again; ``known`` and ``inputs`` are of all their rows."""
    if sampling is None:
        return
    start = 0
    for request in requests:
        if sampling.take() and not request.itself and not any(request.errors):
            sampling.put(request.request.request_id(), request.rows, start, known, inputs)
        start += len(request.rows)
