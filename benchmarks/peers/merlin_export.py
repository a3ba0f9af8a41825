"""Merlin Systems 23.8 on the same weights: writes a Triton repository with its own code. Run with the Python of its own
environment by ``benchmarks.peers.compare``. Arguments: the run's folder, an empty folder, "stock" or "best".

"stock": a TransformWorkflow (NVTabular's Categorify) and a PredictPyTorch, exported by ``Ensemble.export``. Its PyTorch
stage asks for Triton's libtorch backend, which this server does not have: a Python model with torch.jit.load takes its
place. "best": what a team could make of it by hand: one Python model that batches, with NVTabular's C++ Categorify.
"""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import nvtabular as nvt  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from google.protobuf import text_format  # noqa: E402
from merlin.schema import ColumnSchema, Schema  # noqa: E402
from tritonclient.grpc import model_config_pb2 as pb  # noqa: E402

from benchmarks.peers.eager import EagerRecommender  # noqa: E402
from vivace import contract  # noqa: E402

HERE = Path(__file__).resolve().parent
NAME, TOP_K = "item_id", 10
MODEL = contract.ENSEMBLE


class Ranked(torch.nn.Module):
    """Ragged item ids to the TOP_K item ids and their scores: values int64 [L], offsets [B + 1]."""

    def __init__(self, model: EagerRecommender) -> None:
        super().__init__()
        self.length, self.items = model.length, model.items
        history = torch.zeros(2, self.length, dtype=torch.int64)
        history[:, -3:] = torch.tensor([[3, 4, 5], [6, 7, 8]])
        exclude = torch.zeros(2, self.items, dtype=torch.bool)
        with torch.inference_mode(False), torch.no_grad():
            retrieved = model.retrieval(history, exclude)
            self.retrieval = torch.jit.trace(model.retrieval, (history, exclude), check_trace=False)
            self.ranking = torch.jit.trace(model.ranking, (history, *retrieved), check_trace=False)

    def forward(self, values: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = offsets.size(0) - 1
        history = torch.zeros([rows, self.length], dtype=torch.int64)
        exclude = torch.zeros([rows, self.items], dtype=torch.bool)
        for i in range(rows):
            row = values[int(offsets[i]) : int(offsets[i + 1])].to(torch.int64)
            exclude[i, row] = True
            last = row[-self.length :]
            if last.size(0) > 0:
                history[i, self.length - last.size(0) :] = last
        exclude[:, :3] = False  # padding, null and out of vocabulary are nobody's items
        candidates, scores, encoded = self.retrieval(history, exclude)
        ids, ranked = self.ranking(history, candidates, scores, encoded)
        return ids[:, :10].contiguous(), ranked[:, 0, :10].contiguous()


def workflow(model: EagerRecommender) -> nvt.Workflow:
    """Item ids by the vocabulary of the run, on a list column."""
    names = pd.Series(model.names[contract.FIRST_ID :])
    columns = [NAME] >> nvt.ops.Categorify(vocabs={NAME: names})
    made = nvt.Workflow(columns)
    frame = pd.DataFrame({NAME: [[str(n) for n in names[:5]], [str(names[0])]]})
    made.fit(nvt.Dataset(frame, cpu=True))
    ids = made.transform(nvt.Dataset(frame, cpu=True)).to_ddf().compute()[NAME]
    if [int(i) for i in ids[0]] != list(range(contract.FIRST_ID, contract.FIRST_ID + 5)):
        raise ValueError(f"Categorify: expected ids {contract.FIRST_ID}.. of the run, got {list(ids[0])}")
    return made


def python_config(folder: Path) -> pb.ModelConfig:
    config = text_format.Parse((folder / "config.pbtxt").read_text(), pb.ModelConfig())
    config.backend, config.platform = "python", ""
    config.parameters.clear()
    return config


def stock(root: Path, out: Path) -> None:
    from merlin.systems.dag.ensemble import Ensemble
    from merlin.systems.dag.ops.pytorch import PredictPyTorch
    from merlin.systems.dag.ops.workflow import TransformWorkflow

    model = EagerRecommender(root)
    steps_of_ids = workflow(model)
    scripted = torch.jit.script(Ranked(model))
    kinds = {"ids": np.int64, "score": np.float32}
    outputs = Schema([ColumnSchema(n, dtype=kind, dims=(None, TOP_K)) for n, kind in kinds.items()])
    predict = PredictPyTorch(scripted, steps_of_ids.output_schema, outputs)
    steps = steps_of_ids.input_schema.column_names >> TransformWorkflow(steps_of_ids) >> predict
    Ensemble(steps, steps_of_ids.input_schema).export(str(out), name=MODEL)
    (torch_stage,) = out.glob("*_predictpytorchtriton")
    shutil.copy(HERE / "merlin_torch.py", torch_stage / "1" / "model.py")
    (torch_stage / "config.pbtxt").write_text(text_format.MessageToString(python_config(torch_stage)))


def best(root: Path, out: Path) -> None:
    model = EagerRecommender(root)
    folder = out / MODEL / "1"
    folder.mkdir(parents=True)
    workflow(model).save(str(folder / "workflow"))
    torch.jit.script(Ranked(model)).save(str(folder / "model.pt"))
    shutil.copy(HERE / "merlin_best.py", folder / "model.py")
    config = pb.ModelConfig(name=MODEL, backend="python", max_batch_size=64)
    entry = config.input.add(name=NAME, data_type=pb.TYPE_STRING, dims=[-1])
    entry.allow_ragged_batch = True
    config.output.add(name="ids", data_type=pb.TYPE_INT64, dims=[TOP_K])
    config.output.add(name="score", data_type=pb.TYPE_FP32, dims=[TOP_K])
    config.instance_group.add(count=2, kind=pb.ModelInstanceGroup.KIND_CPU)
    config.dynamic_batching.max_queue_delay_microseconds = 0
    (out / MODEL / "config.pbtxt").write_text(text_format.MessageToString(config))


if __name__ == "__main__":
    {"stock": stock, "best": best}[sys.argv[3]](Path(sys.argv[1]), Path(sys.argv[2]))
