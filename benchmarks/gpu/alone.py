"""The graphs of a compiled run in this process, as its server runs them, one request at a time from host memory to host
memory: what a server's answer takes beyond them is its overhead."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.turns import milliseconds
from preprocessing.features import Features
from serving.runtime.aoti_package import Package
from training.compile.aoti import PACKAGE
from training.compile.onnx_export import example_requests
from training.presets import from_json
from vivace import contract
from vivace.onnx_session import open_session
from vivace.run import Run

Graph = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
PROVIDERS = {"": "CPUExecutionProvider", "gpu": "CUDAExecutionProvider"}


def graph_of(run: Run, stage: str, profile: str) -> Graph:
    """A stage's graph as ``profile`` runs it: "" or "gpu" by ONNX Runtime, "aoti" as a package."""
    path = run.compiled / f"{stage}.onnx"
    if profile == "aoti":
        return Package(path.with_suffix(Path(PACKAGE).suffix)).run
    session = open_session(path, providers=[PROVIDERS[profile]])
    names = [given.name for given in session.get_inputs()]
    return lambda inputs: session.run(None, dict(zip(names, inputs, strict=True)))  # type: ignore[no-any-return]


def graphs_ms(run: Run, profile: str, seconds: float) -> float:
    """Median time of retrieval and ranking of one request, called directly."""
    preset, features = from_json(json.loads(run.preset.read_text())), Features(run.features)
    retrieval, ranking = (graph_of(run, stage, profile) for stage in (contract.RETRIEVAL, contract.RANKING))
    s, example = run.shapes(), [x.numpy()[:1] for x in example_requests(features, preset)]
    given, passed_on = example[: len(contract.retrieval_inputs(s))], example[s.passed_on :]
    return milliseconds(lambda _: ranking([example[0], *retrieval(given), *passed_on]), seconds)
