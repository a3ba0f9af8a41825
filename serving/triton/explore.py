"""What is explored of a request's answer.

Runs inside Triton's Python stub only (it imports ``triton_python_backend_utils``, by ``stage``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from serving.runtime.drift import is_counted
from serving.runtime.explore import Explorer
from serving.runtime.response import ResponseStage
from serving.triton.stage import asks_itself


def explored(
    explorer: Explorer, respond: ResponseStage, request: Any, ranked_BN: np.ndarray, values_BCN: np.ndarray,
    top_k_B: np.ndarray, status_B: np.ndarray, queried: Sequence[bool],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Ids, values and propensities (see ``Explorer``) of a request's rows: answers to a query, to someone without a
    history, and what is answered with less for load stay as they are, as does what a server asks itself."""
    ranked_BN, values_BCN = respond.without_gone(ranked_BN, values_BCN)
    theirs = not asks_itself(request)
    may_B = [theirs and is_counted(status) and not query for status, query in zip(status_B, queried, strict=True)]
    return explorer(ranked_BN, values_BCN, top_k_B, may_B)
