"""AOTInductor packages of the graphs: torch.export with a free batch axis, compiled for the device at hand."""

from __future__ import annotations

import copy
import inspect
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
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
from vivace.manifest import CHECKOUT

PACKAGE = "model.pt2"
LOGS = (
    "VIVACE_COMPILE_LOGS"  # variable with a folder in which the compilers' logs stay, with where they are by the time
)
LARGEST = 4096  # rows of a batch that a package takes
# of Inductor: headers compiled beforehand pay where many graphs are compiled on one machine, not for two
SETTINGS: dict[str, Any] = {"aot_inductor.precompile_headers": False, "cpp_cache_precompile_headers": False}


def device_at_hand() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def without_merlin(ranker: RankingModel) -> RankingModel:
    """A copy whose blocks are plain PyTorch: torch.export does not take the wrappers of Merlin's."""
    plain, config = copy.deepcopy(ranker), ranker.config
    plain.towers = blocks.towers(ranker.head_names, plain=True)
    plain.experts = blocks.mixture(
        config.mixture, config.experts, config.expert_width, config.dropout, plain.towers, plain=True
    )
    if ranker.context is not None:
        plain.context = ranker.context.plain_copy()
    plain.to(ranker.popularity.device)
    with torch.no_grad():  # the layers take their input width from the first batch
        plain.eval().head_logits(torch.zeros(2, ranker.mixed_width, device=ranker.popularity.device))
    plain.load_state_dict(ranker.state_dict())
    return plain


def exported(graph: nn.Module, example: Sequence[Tensor], device: torch.device) -> torch.export.ExportedProgram:
    """``graph`` on ``device`` with a free batch axis; ``example``: arguments of at least two rows. Raises ValueError
    where torch.export does not take it."""
    moved = copy.deepcopy(graph).eval().to(device)
    arguments = tuple(x.to(device) for x in example)
    batch = torch.export.Dim("batch", min=1, max=LARGEST)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(moved, arguments, dynamic_shapes=_free_batch(moved, len(arguments), batch))
        except RuntimeError as error:
            raise ValueError(f"--target aoti: {type(graph).__name__}: {str(error).strip().splitlines()[0]}") from error


def _free_batch(graph: nn.Module, count: int, batch: Any) -> tuple[Any, ...]:
    """The axis of the batch of ``count`` arguments, in the form of the graph's own ``forward``."""
    parameters = inspect.signature(graph.forward).parameters.values()
    named = sum(p.kind is not p.VAR_POSITIONAL for p in parameters)
    rest = (tuple({0: batch} for _ in range(count - named)),) if named < len(parameters) else ()
    return (*({0: batch} for _ in range(min(named, count))), *rest)


def package(program: torch.export.ExportedProgram, path: Path) -> None:
    """Compiles an exported program into ``path``."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=SETTINGS)


def build(graphs: Mapping[str, nn.Module], examples: Mapping[str, Sequence[Tensor]], folder: Path) -> dict[str, Path]:
    """Packages of all graphs for the device at hand, each compiled by a process of its own as the compilers of C++ and
    of CUDA take most of the time; their paths by name. Raises ValueError with the last words of one that failed."""
    device, running, packages = device_at_hand(), {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        logs = Path(os.environ.get(LOGS, scratch))
        try:
            for name, graph in graphs.items():
                program, packages[name] = Path(scratch) / f"{name}.pt2", folder / f"{name}.pt2"
                torch.export.save(exported(graph, examples[name], device), program)
                command = [sys.executable, "-m", "training.compile.aoti", str(program), str(packages[name])]
                with (logs / f"{name}.log").open("w") as log:
                    running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=CHECKOUT)
            for name, process in running.items():
                if process.wait():
                    words = (logs / f"{name}.log").read_text(errors="replace").strip().splitlines()
                    raise ValueError(f"--target aoti: {name}: {words[-1] if words else process.returncode}")
        finally:
            for process in running.values():
                process.kill()
    return packages


def on_package(path: Path, rows: int) -> Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]:
    """The package on its device, for inputs in the order of the exported arguments."""
    package = Package(path, largest=rows)
    return lambda feed: package.run(list(feed.values()))


def tell_where(every_s: float = 15.0) -> None:
    """Prints where the compiler is, now and then: what a log says of one that is stopped as its time is over."""
    main = threading.main_thread().ident or 0

    def tell() -> None:
        began = time.monotonic()
        while True:
            time.sleep(every_s)
            stack = traceback.format_stack(sys._current_frames()[main])
            print(f"after {time.monotonic() - began:.0f} s:", *stack[-12:], sep="\n", flush=True)

    threading.Thread(target=tell, daemon=True).start()


if __name__ == "__main__":  # python -m training.compile.aoti EXPORTED PACKAGE
    if LOGS in os.environ:
        tell_where()
    package(torch.export.load(sys.argv[1]), Path(sys.argv[2]))
