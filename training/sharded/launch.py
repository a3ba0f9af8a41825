"""Starts the processes that hold a sharded item table, under torchrun, which starts them anew where one dies.

python -m training.sharded.launch ORDER.json      what each of them runs
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from serving.process import end_with_parent
from training.presets import Preset, from_json
from vivace import machine
from vivace.manifest import CHECKOUT, read_manifest
from vivace.run import Run

RESTARTS = 3  # of the group of processes, before the run gives up


def check_installed() -> None:
    """Raises ValueError where TorchRec is not installed."""
    if importlib.util.find_spec("torchrec") is None:
        raise ValueError(
            "--table-processes: the item table is cut by TorchRec, which is not installed; run "
            "'pip install --no-deps -r requirements-sharded.txt' in the checkout"
        )


def launch(root: Path, preset: Preset, seed: int, sharding: dict[str, Any]) -> dict[str, Any]:
    """Trains the retriever of a run in ``sharding["processes"]`` processes of this machine; returns its manifest.
    ``sharding``: fields of ``TableSharding``. Raises ValueError for what cannot be cut, ChildProcessError where
    the processes gave up."""
    check_installed()
    from training.sharded.config import TableSharding
    from training.sharded.retriever import for_sharding

    preset = for_sharding(preset)  # what cannot be cut is refused here, once, and not by every process
    processes = TableSharding(**sharding).processes
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, machine.cores() // processes)))
    order = {"root": str(root.resolve()), "preset": asdict(preset), "seed": seed, "sharding": sharding}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(order, file)
        file.flush()
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
            f"--max-restarts={RESTARTS}", "-m", "training.sharded.launch", file.name,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": _path()}
        code = subprocess.Popen(command, env=environment, preexec_fn=end_with_parent).wait()
    if code:
        raise ChildProcessError(
            f"{processes} processes with the item table ended {RESTARTS + 1} times, last with exit code {code}: see "
            "the first error above. The same command goes on from the last checkpoint"
        )
    return read_manifest(Run(root).retrieval, "vivace train")


def _path() -> str:
    """PYTHONPATH with this checkout first."""
    return os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])


def work(order: dict[str, Any]) -> None:
    """What each process runs."""
    from preprocessing.features import Features
    from training import distributed
    from training.sharded.config import TableSharding
    from training.sharded.retriever import train_sharded

    run = Run(Path(order["root"]))
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # TorchRec calls an older name of torch's
    with distributed.group() as world:
        train_sharded(
            Features(run.features), from_json(order["preset"]), run.root, order["seed"],
            TableSharding(**order["sharding"]), world, print if world.first else lambda _: None,
        )  # fmt: skip


if __name__ == "__main__":
    work(json.loads(Path(sys.argv[1]).read_text()))
