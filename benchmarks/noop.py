"""How much the open-loop generator can offer: against a model that does nothing.

    python -m benchmarks.noop --slo 20

A model of the public call's name and tensors answers empty tensors at once, in batches, on the same Triton. The rate is
doubled and halved until 1 % of the requests come later than the objective; whichever of the two then gives out, the
generator is good for that rate at least. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from loadtest.generate.arrivals import due_times
from loadtest.generate.generator import LoadRun, best, knee, message, run
from loadtest.generate.local_server import grpc_address, on_free_ports
from loadtest.generate.open_loop import HEADER, console, row
from loadtest.reports.record import record_line
from serving.launcher import TritonServer
from serving.repository import pb as model_config, render
from vivace import contract
from vivace.client_request import request_tensors

MODEL = '''"""Answers one empty row."""
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        tensors = [pb_utils.Tensor("SCORE", np.zeros((1, 0), np.float32))]
        return [pb_utils.InferenceResponse(tensors) for _ in requests]
'''


def repository(folder: Path) -> Path:
    """A model repository whose ``recommend`` does nothing."""
    config = model_config.ModelConfig(name=contract.ENSEMBLE, backend="python", max_batch_size=64)
    for side, tensors in ((config.input, contract.REQUEST), (config.output, (contract.SCORE,))):
        for tensor in tensors:
            side.add(
                name=tensor.name, data_type=model_config.DataType.Value(tensor.config_datatype), dims=tensor.dims,
                **({"allow_ragged_batch": True} if tensor.name == contract.HISTORY.name else {}),
            )  # fmt: skip
    config.instance_group.add(count=1, kind=model_config.ModelInstanceGroup.KIND_CPU)
    config.dynamic_batching.max_queue_delay_microseconds = 0
    (folder / contract.ENSEMBLE / "1").mkdir(parents=True)
    (folder / contract.ENSEMBLE / "config.pbtxt").write_text(render(config))
    (folder / contract.ENSEMBLE / "1" / "model.py").write_text(MODEL)
    return folder


def main(
    slo: Annotated[float, typer.Option(help="ms")] = 20.0,
    seconds: Annotated[float, typer.Option(help="of one run")] = 10.0,
    history: Annotated[int, typer.Option(help="events of a request")] = 50,
    first: float = 1000.0,
) -> None:
    sent = message(contract.ENSEMBLE, request_tensors("user-00001", [f"sku-{i:05}" for i in range(history)], 10))
    with tempfile.TemporaryDirectory() as name, TritonServer(on_free_ports(repository(Path(name)))) as server:

        def measure(rate: float) -> LoadRun:
            due = due_times("poisson", rate, seconds, 7)
            outcome = run(grpc_address(server), [sent] * len(due), due, seconds, slo)
            console.print("  ".join(f"{h} {v}" for h, v in zip(HEADER, row(outcome), strict=True)))
            return outcome

        runs = knee(measure, first)
    met = best(runs)
    print(record_line(
        "generator against a no-op model", slo_ms=slo, history=history, knee_qps=met.qps if met else None,
        runs=[asdict(r) for r in runs],
    ))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
