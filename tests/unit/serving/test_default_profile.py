"""Which profile is served where none is named: by the graphics card, by the version, by its name."""

from __future__ import annotations

import os

import pytest

from serving import repository
from serving.default_profile import default_profile, named_profile
from vivace.shard_contract import SHARD_PREFIX


@pytest.fixture
def compiled(tmp_path):
    repository.write_configs(tmp_path, repository.DEFAULT_SHAPES, repository.DEFAULT_HEADS)
    return tmp_path


@pytest.fixture
def card(tmp_path_factory, monkeypatch):
    """A program in nvidia-smi's place that names one card."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H100, 81559 MiB, 550.54'\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_cpu_takes_one_process_and_says_how_to_get_the_ensemble(compiled, monkeypatch):
    monkeypatch.setenv("PATH", "")  # whatever this machine has, nvidia-smi is not there
    profile, why = default_profile(compiled)
    assert profile == "fused" and "no GPU here; --profile ensemble" in why
    assert default_profile(compiled / "feature_transform")[0] == ""  # has no such profile
    assert named_profile("ensemble") == "" and named_profile("cached") == "cached"
    (compiled / f"{SHARD_PREFIX}0").mkdir()
    assert default_profile(compiled) == ("", "profile ensemble: retrieval asks shards")


def test_with_a_card_the_ensemble_stays(compiled, card):
    assert default_profile(compiled) == ("", "profile ensemble: this machine has a GPU")
