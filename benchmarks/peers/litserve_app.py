"""LitServe and PyTorch eager: batches of up to 16, two workers. Arguments: the run's folder, a port."""

import sys
from pathlib import Path
from typing import Any

import litserve as ls
import torch

from benchmarks.peers.eager import EagerRecommender


class Api(ls.LitAPI):
    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        self.model = EagerRecommender(Path(sys.argv[1]))

    def decode_request(self, request: dict[str, Any]) -> tuple[list[str], int]:
        return request["history"], request["top_k"]

    def batch(self, inputs: list[tuple[list[str], int]]) -> tuple[list[list[str]], list[int]]:
        return [h for h, _ in inputs], [k for _, k in inputs]

    def predict(self, inputs: tuple[list[list[str]], list[int]]) -> list[dict[str, Any]]:
        return self.model(*inputs)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    api = Api(max_batch_size=16, batch_timeout=0.002)
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=2)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="warning")
