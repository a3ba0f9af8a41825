"""Which profile a server takes where none is named."""

from __future__ import annotations

from pathlib import Path

from serving.profiles import ENSEMBLE, ONE_PROCESS
from serving.repository import profiles
from serving.shards.servers import shard_count
from vivace.machine import gpu


def default_profile(repository: Path) -> tuple[str, str]:
    """(profile of ``repository``, why, in words for whoever starts the server): all stages in one process where the
    graphs run on the CPU, which takes less processor time for the same answers. "" is ``config.pbtxt``, the ensemble:
    with a GPU, for a version in shards, whose retrieval asks other servers, and for one that has nothing else."""
    if gpu():
        return "", f"profile {ENSEMBLE}: this machine has a GPU"
    if ONE_PROCESS not in profiles(repository):
        return "", f"profile {ENSEMBLE}: this version has no other" if repository.exists() else ""
    if shard_count(repository):
        return "", f"profile {ENSEMBLE}: retrieval asks shards"
    return ONE_PROCESS, (
        f"profile {ONE_PROCESS}: all stages in one process, as there is no GPU here; --profile {ENSEMBLE} has one "
        "process a stage"
    )


def named_profile(name: str) -> str:
    """What ``--profile`` asks a repository for: ENSEMBLE is its ``config.pbtxt``."""
    return "" if name == ENSEMBLE else name
