"""The one place that opens ONNX Runtime sessions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort


def session_options(threads: int = 1, spinning: bool = True) -> ort.SessionOptions:
    """Options of a session with ``threads`` threads within and between operators. ``spinning`` False: threads that wait
    sleep, which leaves the cores to other sessions of the machine."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def open_session(
    graph: Path | bytes,
    threads: int = 1,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    options: ort.SessionOptions | None = None,
) -> ort.InferenceSession:
    """A session of a graph (file or serialized model) on the CPU unless ``providers`` say otherwise."""
    source = graph if isinstance(graph, bytes) else str(graph)
    return ort.InferenceSession(source, options or session_options(threads), providers=list(providers))
