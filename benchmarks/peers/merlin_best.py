"""Triton Python model: NVTabular's C++ Categorify and PyTorch in one process, on all requests at hand."""

from pathlib import Path

import merlin.dag
import merlin.dag.operator
import numpy as np
import nvtabular as nvt
import torch
import triton_python_backend_utils as pb_utils

torch.set_num_threads(1)
merlin.dag.base_operator = merlin.dag.operator  # the name by which nvtabular_cpp asks for it


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        from merlin.dag.node import iter_nodes

        folder = Path(args["model_repository"]) / args["model_version"]
        workflow = nvt.Workflow.load(str(folder / "workflow"))
        (op,) = (n.op for n in iter_nodes([workflow.output_node]) if isinstance(n.op, nvt.ops.Categorify))
        self.categorify = op.inference_initialize(None, None)
        self.model = torch.jit.load(folder / "model.pt")

    def execute(self, requests: list) -> list:
        rows = [pb_utils.get_input_tensor_by_name(r, "item_id").as_numpy() for r in requests]
        histories = [row for rows_of in rows for row in rows_of]
        values = np.concatenate(histories).astype(str) if histories else np.empty(0, str)
        offsets = np.cumsum([0] + [len(v) for v in histories]).astype(np.int64)
        ids = self.categorify.transform(None, {"item_id": values})["item_id"] if len(values) else np.empty(0, np.int64)
        with torch.inference_mode():
            ranked = self.model(torch.from_numpy(np.ascontiguousarray(ids, np.int64)), torch.from_numpy(offsets))
        arrays = [v.numpy() for v in ranked]
        answers, start = [], 0
        for rows_of in rows:
            stop = start + len(rows_of)
            tensors = [pb_utils.Tensor(n, v[start:stop]) for n, v in zip(("ids", "score"), arrays, strict=True)]
            answers.append(pb_utils.InferenceResponse(tensors))
            start = stop
        return answers
