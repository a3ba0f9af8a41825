"""The model ``update_store``: from Triton's requests to ``serving.runtime.updates`` and back.

Runs inside Triton's Python stub only (it imports ``triton_python_backend_utils``).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from serving.runtime.stages import ItemVocabulary
from serving.runtime.updates import Updates
from serving.triton.graph_model import answer, each_by_itself
from serving.triton.stage import Stage, strings, tensor_of
from vivace import contract
from vivace.impressions.queue import folder_of


class UpdateStoreModel(Stage):
    """ACTION and RECORD to STATUS; all requests at hand are one transaction."""

    def setup(self) -> None:
        ids = ItemVocabulary(self.beside(contract.FEATURE_TRANSFORM) / "transform.onnx")
        followed = self.parameters["followed"] == "true"
        shown = folder_of(self.folder.parent.parent / self.parameters["feature_store"])
        self.updates = Updates(self.store(readonly=False), self.folder, ids, followed, shown)

    @each_by_itself
    def execute(self, requests: list[Any]) -> list[Any]:
        actions, records = (np.concatenate([tensor_of(r, t)[:, 0] for r in requests]) for t in contract.UPDATE)
        statuses, responses, start = self.updates(actions.tolist(), records.tolist()), [], 0
        for request in requests:
            stop = start + len(tensor_of(request, contract.ACTION))
            of_request, start = statuses[start:stop], stop
            responses.append(answer(request, self.outputs, [strings(of_request)]))
        return responses
