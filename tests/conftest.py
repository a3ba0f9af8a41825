"""A small shop, prepared, trained, compiled and served once for the whole run, by the real Triton.

Heavy modules are imported by the fixtures that need them: unit tests ask for none of these.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# No handlers of gRPC around a fork: they revive its threads in the child, whose descriptors are about to be closed, and
# it may abort before it has become a server.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# One thread: the models are tiny, so a second one costs time, and beside other jobs OpenMP's threads wait by spinning
# (20 times the processor time). Before torch is imported; what a test starts inherits it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from preprocessing.features import Features
    from serving.fleet import Fleet
    from serving.launcher import TritonServer
    from serving.watchdog import Watchdog
    from tests.support import PatientClient

SEED = 3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if "gpu" in item.keywords]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """artifacts/<name> of the small shop after prepare, train, evaluate and compile."""
    from preprocessing.features import Features
    from preprocessing.prepare import PrepareConfig, prepare
    from preprocessing.readers.shop import Shop, ShopConfig
    from tests.support import quiet, untouched_store
    from training.compile.compiler import compile_models
    from training.judge.evaluate import evaluate
    from training.learn.ranker import train_ranker
    from training.learn.retriever import train_retrieval
    from training.presets import tiny

    root = tmp_path_factory.mktemp("artifacts") / "shop"
    small = Shop(ShopConfig(users=700, items=300, events=12_000, seed=SEED))
    prepare(small, PrepareConfig(partitions=3), root, SEED, quiet)
    features = Features(root / "features")
    train_retrieval(features, tiny(), root, SEED, quiet, quiet=True)
    train_ranker(features, tiny(), root, SEED, quiet, quiet=True)
    evaluate(features, tiny(), root, SEED, quiet)
    compile_models(features, tiny(), root, SEED, quiet)
    shutil.copytree(root / "feature_store", untouched_store(root))
    return root


@pytest.fixture(scope="session")
def features(root: Path) -> Features:
    from preprocessing.features import Features

    return Features(root / "features")


@pytest.fixture(scope="session")
def fleet(root: Path) -> Fleet:
    """The small shop's one server behind the guard, on free ports, which logs what it shows."""
    from serving.fleet import Fleet
    from tests.support import LOGS, on_free_ports, quiet

    with Fleet(on_free_ports(root / "model_repository", guard=True, **LOGS), quiet) as running:
        yield running


@pytest.fixture(scope="session")
def served(fleet: Fleet) -> tuple[TritonServer, Watchdog]:
    """(server, watchdog) of the small shop."""
    return fleet.replicas[0].server, fleet.replicas[0].watchdog


@pytest.fixture(params=["grpc", "http"])
def client(request: pytest.FixtureRequest, served: tuple[TritonServer, Watchdog]) -> PatientClient:
    from tests.support import PatientClient

    server, _ = served
    port = server.grpc_port if request.param == "grpc" else server.http_port
    with PatientClient(f"{server.host}:{port}", request.param) as client:
        yield client
