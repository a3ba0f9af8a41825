"""The ranking stage where fresh items join: the graph through our ONNX Runtime backend, then what it does not know.

Runs inside Triton's Python stub only (it imports ``triton_python_backend_utils``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from serving.runtime.fresh import FreshRanking
from serving.runtime.live_catalogue import LiveCatalogue
from serving.runtime.stages import ItemVocabulary
from serving.triton.backends.onnxruntime.model import TritonPythonModel, options_of
from serving.triton.graph_model import Tensor, parameters
from vivace import contract
from vivace.store.opening import store_of_worker


class FreshRankingModel(TritonPythonModel):
    """Inputs and outputs: ``contract.ranking_stage_inputs``, ``contract.ranking_outputs``."""

    def initialize(self, args: dict[str, Any]) -> None:
        config = json.loads(args["model_config"])
        config["default_model_filename"] = self.default_file  # the configuration's names this adapter
        self.folder = Path(args["model_repository"]) / args["model_version"]
        super().initialize({**args, "model_config": json.dumps(config)})

    def open(self, path: Path, config: dict[str, Any], kind: str, device: str) -> None:
        super().open(path, config, kind, device)
        settings, repository, version = parameters(config), self.folder.parent.parent, self.folder.name
        shapes = contract.StageTensors(**json.loads(settings["shapes"]))
        store = store_of_worker(repository / settings["feature_store"], readonly=True)
        ids = ItemVocabulary(repository / contract.FEATURE_TRANSFORM / version / "transform.onnx", lazy=True)
        catalogue = LiveCatalogue(store, repository / contract.UPDATE_STORE / version, ids, shapes, ranks=True)
        self.fresh = FreshRanking(self.folder, catalogue, options_of(config))
        self.seen, names = shapes.seen_fresh.name, contract.ranking_inputs(shapes)
        self.rising, self.rising_features = [t.name for t in shapes.rising_of_fresh], shapes.rising_features.name
        self.history, _, self.scores, self.encoded, *_ = (t.name for t in names)

    def signature(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        inputs, outputs = super().signature()
        rising = dict(zip(self.rising, (Tensor("TYPE_INT64", 2), Tensor("TYPE_FP32", 3)), strict=False))
        return inputs | {self.seen: Tensor("TYPE_INT64", 2)} | rising, outputs

    def run(self, outputs: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        seen, rising = feed.pop(self.seen), [feed.pop(name) for name in self.rising]
        rising = [feed[self.rising_features], *rising] if rising else []
        ranked = super().run(outputs, feed)
        self.fresh.catalogue.refresh()
        moment = [feed[tensor.name] for tensor in self.fresh.catalogue.shapes.moment]
        inputs = feed[self.history], feed[self.scores], feed[self.encoded]
        return self.fresh.ranked(*inputs, seen, moment, rising, ranked[0], ranked[1])
