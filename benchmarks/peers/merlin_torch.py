"""Triton Python model in the place of the libtorch backend: runs model.pt on the tensors it is sent."""

import json
from pathlib import Path

import torch
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        config = json.loads(args["model_config"])
        self.inputs = [t["name"] for t in config["input"]]
        self.outputs = [t["name"] for t in config["output"]]
        self.model = torch.jit.load(Path(args["model_repository"]) / args["model_version"] / "model.pt")

    def execute(self, requests: list) -> list:
        answers = []
        for request in requests:
            tensors = {n: pb_utils.get_input_tensor_by_name(request, n).as_numpy() for n in self.inputs}
            values, offsets = (next(v for n, v in tensors.items() if n.endswith(e)) for e in ("__values", "__offsets"))
            with torch.inference_mode():
                answer = self.model(torch.from_numpy(values), torch.from_numpy(offsets))
            out = [pb_utils.Tensor(n, v.numpy()) for n, v in zip(self.outputs, answer, strict=True)]
            answers.append(pb_utils.InferenceResponse(out))
        return answers
