"""An item table cut over processes by TorchRec: the losses are those of one process, one that is killed comes back, and
the weights are a retriever that every later step reads. Needs requirements-sharded.txt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

pytest.importorskip("torchrec", reason="pip install --no-deps -r requirements-sharded.txt")

from tests.support import PATIENCE_S, wait_until
from vivace.manifest import read_manifest

SEED = 3
WORKER = """
import json, sys
from pathlib import Path
import torch
from preprocessing.features import Features
from training import distributed
from training.presets import with_values, tiny
from training.sharded.retriever import train_sharded
from training.sharded.config import TableSharding
features, root, values, kind = sys.argv[1:]
with distributed.group() as world:
    sharding = TableSharding(kind=kind, processes=world.size)
    preset = with_values(tiny(), json.loads(values))
    train_sharded(Features(Path(features)), preset, Path(root), 3, sharding, world, print, quiet=True)
"""
VALUES = {"encoder.dropout": 0.0, "encoder.context": False, "retrieval.loss": "sampled", "retrieval.negatives": 64}


def _start(features, root: Path, processes: int, values: dict, kind: str = "row", *flags: str) -> subprocess.Popen:
    root.mkdir(exist_ok=True)
    script = root / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    arguments = [str(script), str(features.folder), str(root), json.dumps({**VALUES, **values}), kind]
    return subprocess.Popen(command + arguments, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _epochs(process: subprocess.Popen, root: Path) -> tuple[list[dict], str]:
    out, _ = process.communicate(timeout=2 * PATIENCE_S)
    assert process.returncode == 0, out[-3000:]
    return read_manifest(root / "retrieval", "train")["results"]["epochs"], out


def _weights(root: Path) -> dict[str, torch.Tensor]:
    return torch.load(root / "retrieval" / "weights.pt", weights_only=True)


@pytest.fixture(scope="module")
def one(features, tmp_path_factory) -> tuple[Path, list[dict]]:
    """One process with the whole table."""
    root = tmp_path_factory.mktemp("one")
    return root, _epochs(_start(features, root, 1, {}), root)[0]


@pytest.mark.parametrize("kind", ["row", "table"])
def test_two_processes_have_the_losses_of_one(features, tmp_path, one, kind):
    epochs, out = _epochs(_start(features, tmp_path, 2, {}, kind), tmp_path)
    for two, alone in zip(epochs, one[1], strict=True):
        for figure in ("loss", "log_loss", "NDCG@10"):
            assert two[figure] == pytest.approx(alone[figure], rel=1e-4), (figure, epochs, one[1])
    items = features.item_count()
    held = -(-items // 2) if kind == "row" else items
    assert f"{items:,} rows over 2 processes, {held:,} of them in the first" in out
    weights = [_weights(root) for root in (tmp_path, one[0])]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-3, rtol=0, msg=name)


def test_a_killed_process_comes_back_and_the_run_is_one_that_later_steps_read(features, tmp_path):
    run = tmp_path / "shop"
    run.mkdir()
    (run / "features").symlink_to(features.folder)
    (run / "feature_store").symlink_to(features.folder.parent / "feature_store")
    preset = {"preset": "tiny", **VALUES, "retrieval.epochs": 6, "retrieval.checkpoint_s": 0.1, "ranking.epochs": 1}
    (tmp_path / "preset.json").write_text(json.dumps(preset))
    command = [sys.executable, "-m", "vivace.cli", "train", "--artifacts", str(tmp_path), "--name", "shop"]
    command += ["--preset", str(tmp_path / "preset.json"), "--seed", str(SEED), "--table-processes", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    checkpoint = run / "retrieval" / "checkpoint"
    wait_until(lambda: checkpoint.exists() or process.poll() is not None, "a checkpoint", 0.02)
    assert process.poll() is None, process.communicate()[0][-3000:]
    torchrun = psutil.Process(process.pid).children()[-1]
    os.kill(torchrun.children()[-1].pid, signal.SIGKILL)
    out, _ = process.communicate(timeout=3 * PATIENCE_S)
    assert process.returncode == 0, out[-3000:]
    assert "resumed at epoch" in out
    results = read_manifest(run / "retrieval", "train")["results"]
    assert len(results["epochs"]) == 6
    assert results["processes"] == 2
    left = {path.name for path in (run / "retrieval").iterdir()}
    assert left == {"manifest.json", "owner.key", "tensorboard", "weights.pt"}
    assert "ranker:" in out  # trained over the table that came back
