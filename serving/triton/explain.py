"""The model ``explain``: why each item of an answer is there, from Triton's requests to ``serving.runtime.why`` and back.

An instance of its own with a short queue, behind all other workers in priority, so that no flood of these calls keeps
``recommend`` from answering. It opens the graphs when it is first asked, so that a server that nobody asks pays nothing.
Runs inside Triton's Python stub only (it imports ``triton_python_backend_utils``).
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.process import give_way
from serving.triton.batch import overdue_answer
from serving.triton.graph_model import answer, each_by_itself, failure
from serving.triton.stage import Counts, ParsedRequest, Stage, asks_itself, refused, search_options, strings
from vivace import contract
from vivace.context import ContextColumns
from vivace.explain_contract import ENGLISH, LANGUAGE, LANGUAGES

if TYPE_CHECKING:
    from serving.runtime.pipeline import Pipeline
    from serving.runtime.ruled import Rules

