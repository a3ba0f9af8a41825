"""The search ranker as boosted trees (Friedman 2001): least squares on the gains, by scikit-learn's histograms.

On a hundred judged queries it learns more of three dozen features than the network of ``training.search.ranker``: a
split needs no scale and no start. Exported as one ``TreeEnsembleRegressor``. Axis legend: B requests, N candidates,
X features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from sklearn.ensemble import HistGradientBoostingRegressor

from vivace.checks import check_fields, check_minimum, check_positive

OPSET, ML_OPSET = 17, 3


@dataclass(frozen=True, kw_only=True)
class TreesConfig:
    """Size and training of the boosted trees."""

    trees: int = 150
    """Of each member."""
    learning_rate: float = 0.05
    """Of each tree."""
    leaves: int = 12
    """Of a tree at most."""
    leaf_candidates: int = 40
    """Candidates of a leaf at least."""
    l2: float = 5.0
    """On the values of leaves."""
    columns: float = 0.3
    """Share of the features that a split chooses among, 0 < x <= 1."""
    members: int = 4
    """Ensembles that chose other features, their scores averaged."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_minimum(self, 1, "trees", "leaf_candidates", "members")
        check_minimum(self, 2, "leaves")
        check_minimum(self, 0, "l2")
        check_positive(self, "learning_rate", "columns")


class Trees:
    """Mean of the members' predictions."""

    def __init__(self, members: Sequence[HistGradientBoostingRegressor]) -> None:
        self.members = list(members)

    def score(self, features_NX: np.ndarray) -> np.ndarray:
        """float32 [N] of one query's candidates."""
        if not len(features_NX):
            return np.zeros(0, np.float32)
        return np.mean([m.predict(features_NX) for m in self.members], 0).astype(np.float32)

    def export(self, inputs: int, path: Path) -> None:
        """FEATURES float32 [B, N, X] to SCORES float32 [B, N]."""
        nodes = [
            helper.make_node("Reshape", ["FEATURES", "flat"], ["rows"]),
            self._regressor(),
            helper.make_node("Shape", ["FEATURES"], ["size"], start=0, end=2),
            helper.make_node("Reshape", ["scores", "size"], ["SCORES"]),
        ]
        graph = helper.make_graph(
            nodes,
            "search_ranking",
            [helper.make_tensor_value_info("FEATURES", TensorProto.FLOAT, ["batch", "items", inputs])],
            [helper.make_tensor_value_info("SCORES", TensorProto.FLOAT, ["batch", "items"])],
            [helper.make_tensor("flat", TensorProto.INT64, [2], [-1, inputs])],
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", ML_OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        onnx.checker.check_model(model)
        onnx.save(model, str(path))

    def _regressor(self) -> onnx.NodeProto:
        """All trees as one node; leaves are divided by the number of members."""
        parts: dict[str, list[np.ndarray]] = {}
        trees = [stage[0].nodes for m in self.members for stage in m._predictors]
        for tree, nodes in enumerate(trees):
            leaf = nodes["is_leaf"].astype(bool)
            columns = {
                "nodes_treeids": np.full(len(nodes), tree), "nodes_nodeids": np.arange(len(nodes)),
                "nodes_featureids": np.where(leaf, 0, nodes["feature_idx"]),
                "nodes_values": np.where(leaf, 0, _at_most(nodes["num_threshold"])),
                "nodes_truenodeids": np.where(leaf, 0, nodes["left"]),
                "nodes_falsenodeids": np.where(leaf, 0, nodes["right"]),
                "nodes_missing_value_tracks_true": np.where(leaf, 0, nodes["missing_go_to_left"]),
                "nodes_modes": np.where(leaf, "LEAF", "BRANCH_LEQ"),
                "target_treeids": np.full(leaf.sum(), tree), "target_nodeids": np.flatnonzero(leaf),
                "target_ids": np.zeros(leaf.sum(), int), "target_weights": nodes["value"][leaf] / len(self.members),
            }  # fmt: skip
            for name, column in columns.items():
                parts.setdefault(name, []).append(column)
        base = float(np.mean([np.ravel(m._baseline_prediction)[0] for m in self.members]))
        attributes = {name: np.concatenate(column).tolist() for name, column in parts.items()}
        return helper.make_node(
            "TreeEnsembleRegressor", ["rows"], ["scores"], domain="ai.onnx.ml", n_targets=1, base_values=[base],
            **attributes,
        )  # fmt: skip


def _at_most(thresholds: np.ndarray) -> np.ndarray:
    """The largest float32 that is at most each float64: for a float32 x, x <= one is x <= the other."""
    near = thresholds.astype(np.float32)
    return np.where(near > thresholds, np.nextafter(near, np.float32(-np.inf)), near)


def train_trees(
    lists: Sequence[np.ndarray], gains: Sequence[np.ndarray], config: TreesConfig, seed: int,
    weights: Sequence[float] | None = None,
) -> Trees:  # fmt: skip
    """As ``training.search.ranker.train_search_ranker``; a list's gains count by their share of its largest.

    Raises ValueError where no query has a candidate that gains."""
    taught = [i for i, g in enumerate(gains) if g.sum() > 0]
    if not taught:
        raise ValueError("search ranker: expected at least one query with a candidate that gains, got none")
    x_PX = np.concatenate([lists[i] for i in taught])
    y_P = np.concatenate([gains[i] / gains[i].max() for i in taught])
    weight_P = np.concatenate([np.full(len(lists[i]), 1.0 if weights is None else weights[i]) for i in taught])
    members = [
        HistGradientBoostingRegressor(
            max_iter=config.trees, learning_rate=config.learning_rate, max_leaf_nodes=config.leaves,
            min_samples_leaf=config.leaf_candidates, l2_regularization=config.l2, max_features=config.columns,
            early_stopping=False, random_state=seed * 1000 + member,
        ).fit(x_PX, y_P, sample_weight=weight_P / weight_P.mean())
        for member in range(config.members)
    ]  # fmt: skip
    return Trees(members)
