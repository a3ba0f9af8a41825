"""The compiled graphs of a run as one function, run here as the server runs them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from serving.runtime.by_length import CHUNK, retrieved, rows_at_once
from training.compile.onnx_export import names_of
from vivace import contract
from vivace.onnx_session import open_session

if TYPE_CHECKING:
    from serving.runtime.item_index import IndexedRetrieval
    from serving.runtime.sharded import ShardedRetrieval


class Engine:
    """Two compiled graphs as one function of the retrieval graph's inputs."""

    def __init__(self, folder: Path, tensors: contract.StageTensors, threads: int = 1) -> None:
        self.index: IndexedRetrieval | None = None
        if tensors.indexed:  # imported here: an index needs Faiss, which a machine with a GPU may lack
            from serving.runtime.item_index import IndexedRetrieval

            self.index = IndexedRetrieval(folder, tensors, threads)
        self.sharded: ShardedRetrieval | None = None
        if tensors.shards:
            from training.compile.shards import sharded_engine

            self.sharded = sharded_engine(folder, tensors, threads)
        self.retrieval = None if tensors.lists_seen else open_session(folder / f"{contract.RETRIEVAL}.onnx", threads)
        self.ranking = open_session(folder / f"{contract.RANKING}.onnx", threads)
        self.tensors = tensors
        self.names = [names_of(contract.retrieval_inputs(tensors)), names_of(contract.ranking_inputs(tensors))]

    def retrieve(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs of the retrieval stage: candidate ids and scores, the encoded history; then the inputs of the ranking
        stage that come from the feature transform."""
        given, passed_on = inputs[: len(self.names[0])], inputs[self.tensors.passed_on :]
        if self.index is not None:
            return [*self.index(given), *passed_on]
        if self.sharded is not None:
            return [*self.sharded(given)[0], *passed_on]
        assert self.retrieval is not None
        run = partial(self.retrieval.run, None)
        if rows_at_once(given[0].shape[1]) < CHUNK:  # attention over long histories: a few at a time
            return [*retrieved(run, self.tensors, self.names[0], given), *passed_on]
        candidates: list[np.ndarray] = run(dict(zip(self.names[0], given, strict=True)))
        return [*candidates, *passed_on]

    def __call__(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs of the ranking graph: ids best first, values."""
        rows = (inputs[0], *self.retrieve(inputs))
        ranked: list[np.ndarray] = self.ranking.run(None, dict(zip(self.names[1], rows, strict=True)))
        return ranked
