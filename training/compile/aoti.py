"""AOTInductor packages of the graphs: torch.export with a free batch axis, compiled for the device at hand."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from serving.runtime.aoti_package import Package
from training.models import blocks
from training.models.ranking import RankingModel

PACKAGE = "model.pt2"
LARGEST = 4096  # rows of a batch that a package takes


def device_at_hand() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def without_merlin(ranker: RankingModel) -> RankingModel:
    """A copy whose mixture and towers are plain PyTorch: torch.export does not take the wrappers of Merlin's."""
    plain, config = copy.deepcopy(ranker), ranker.config
    plain.towers = blocks.towers(ranker.head_names, plain=True)
    plain.experts = blocks.mixture(
        config.mixture, config.experts, config.expert_width, config.dropout, plain.towers, plain=True
    )
    plain.to(ranker.popularity.device)
    with torch.no_grad():  # the layers take their input width from the first batch
        plain.eval()._heads(torch.zeros(2, 3 * ranker.width + 32, device=ranker.popularity.device))
    plain.load_state_dict(ranker.state_dict())
    return plain


def build(
    graph: nn.Module, example: Sequence[Tensor], path: Path, device: torch.device, settings: dict[str, Any] | None = None
) -> None:
    """Writes the package of ``graph`` for ``device``; ``example``: arguments of at least two rows. ``settings``: of
    Inductor, by its names. Raises ValueError where the graph is not taken."""
    moved = copy.deepcopy(graph).eval().to(device)
    arguments = tuple(x.to(device) for x in example)
    batch = torch.export.Dim("batch", min=1, max=LARGEST)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            exported = torch.export.export(moved, arguments, dynamic_shapes=tuple({0: batch} for _ in arguments))
            torch._inductor.aoti_compile_and_package(
                exported, package_path=str(path), inductor_configs={"fx_graph_cache": False, **(settings or {})}
            )
        except RuntimeError as error:
            raise ValueError(f"--target aoti: {path.stem}: {str(error).strip().splitlines()[-1][:300]}") from error


def on_package(path: Path, rows: int) -> Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]:
    """The package on its device, for inputs in the order of the exported arguments."""
    package = Package(path, largest=rows)
    return lambda feed: package.run(list(feed.values()))
