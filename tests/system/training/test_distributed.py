"""Two gloo processes take the steps of one at the same global batch; one that is killed comes back and finishes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from tests.support import PATIENCE_S, wait_until
from training import distributed
from training.data import batches
from training.learn.retriever import train_retrieval
from training.presets import tiny

WORKER = """
import json, sys, time
from dataclasses import replace
from pathlib import Path
from preprocessing.features import Features
from training import distributed
from training.presets import tiny
from training.learn.retriever import train_retrieval
preset = tiny()
preset = replace(preset, encoder=replace(preset.encoder, dropout=0.0),
                 retrieval=replace(preset.retrieval, **json.loads(sys.argv[3])))
with distributed.group() as world:
    train_retrieval(Features(Path(sys.argv[1])), preset, Path(sys.argv[2]), 3, lambda _: None, True, world=world)
"""


def _start(features, root: Path, training: dict, *flags: str) -> subprocess.Popen:
    script = root / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *flags, str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    arguments = [str(features.folder), str(root), json.dumps(training)]
    return subprocess.Popen(command + arguments, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(process: subprocess.Popen, root: Path) -> list[dict]:
    out, _ = process.communicate(timeout=2 * PATIENCE_S)
    assert process.returncode == 0, out[-3000:]
    return json.loads((root / "retrieval" / "manifest.json").read_text())["results"]["epochs"]


def _alone(features, root: Path, training: dict) -> list[dict]:
    preset = tiny()
    encoder = replace(preset.encoder, dropout=0.0)
    preset = replace(preset, encoder=encoder, retrieval=replace(preset.retrieval, **training))
    return train_retrieval(features, preset, root, 3, lambda _: None, quiet=True)["results"]["epochs"]


@pytest.mark.parametrize("shard_model", [False, True], ids=["DDP", "FSDP"])
def test_two_processes_take_the_steps_of_one(features, tmp_path, shard_model):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    two = _finish(_start(features, tmp_path / "two", {"shard_model": shard_model}), tmp_path / "two")
    one = _alone(features, tmp_path / "one", {})
    for mine, reference in zip(two, one, strict=True):
        assert mine["loss"] == pytest.approx(reference["loss"], rel=2e-4)
        assert mine["log_loss"] == pytest.approx(reference["log_loss"], rel=2e-4)
    weights = [
        torch.load(tmp_path / n / "retrieval" / "weights.pt", weights_only=True)["items.id.weight"]
        for n in ("one", "two")
    ]
    torch.testing.assert_close(*weights, atol=2e-3, rtol=0)


@pytest.mark.parametrize("shard_model", [False, True], ids=["DDP", "FSDP"])
def test_a_killed_process_comes_back_and_the_run_ends_as_well(features, tmp_path, shard_model):
    training = {"epochs": 6, "checkpoint_s": 0.1, "shard_model": shard_model}
    (tmp_path / "alone").mkdir()
    (tmp_path / "killed").mkdir()
    process = _start(features, tmp_path / "killed", training, "--max-restarts=2")
    checkpoint = tmp_path / "killed" / "retrieval" / "checkpoint.pt"
    wait_until(lambda: checkpoint.exists() or process.poll() is not None, "a checkpoint", 0.02)
    assert process.poll() is None, process.communicate()[0][-3000:]
    victim = psutil.Process(process.pid).children()[-1]
    os.kill(victim.pid, signal.SIGKILL)
    epochs = _finish(process, tmp_path / "killed")
    reference = _alone(features, tmp_path / "alone", training)
    assert len(epochs) == 6
    assert epochs[-1]["log_loss"] == pytest.approx(reference[-1]["log_loss"], rel=0.02)


def test_processes_meet_in_a_store_that_the_dead_have_written_to():
    store = torch.distributed.HashStore()
    world = [distributed.World(rank, 2) for rank in range(2)]
    found = []
    for _ in range(3):  # starts of one run, all in the same store; the greeting of the last one is always there
        with ThreadPoolExecutor() as pool:
            first = pool.submit(distributed.fresh_store, store, world[0], PATIENCE_S)
            time.sleep(0.1)
            second = pool.submit(distributed.fresh_store, store, world[1], PATIENCE_S)
            stores = [first.result(), second.result()]
        stores[0].set("address", f"start {len(found)}")
        assert stores[1].get("address") == f"start {len(found)}".encode()
        found.append(stores[0])
    store.set("hello/1", "of one that died before it was welcomed")
    with pytest.raises(TimeoutError, match=r"ranks \[1\] did not come"):
        distributed.fresh_store(store, world[0], 0.2)


def test_sharded_reading_covers_every_row_once(features):
    files = features.files("train")
    seen = []
    for rank in range(2):
        for batch in batches.training_batches(
            files, 1000, 16, 1, 0, world=distributed.World(rank, 2), shard_reading=True
        ):
            seen += [tuple(row[row > 0].tolist()) for row in batch]
    whole = [tuple(r[r > 0].tolist()) for b in batches.training_batches(files, 1000, 16, 1, 0) for r in b]
    assert sorted(seen) == sorted(whole)
