"""A small shop, prepared, trained, compiled and served once for the whole run, by the real Triton."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

warnings.filterwarnings("ignore")

from preprocessing.features import Features  # noqa: E402
from preprocessing.prepare import PrepareConfig, prepare  # noqa: E402
from preprocessing.readers.shop import Shop, ShopConfig  # noqa: E402
from serving.launcher import ServerOptions  # noqa: E402
from serving.service import service  # noqa: E402
from training.compile.export import compile_models  # noqa: E402
from training.judge.evaluate import evaluate  # noqa: E402
from training.learn.ranker import train_ranker  # noqa: E402
from training.learn.retriever import train_retrieval  # noqa: E402
from training.presets import tiny  # noqa: E402

SMALL = ShopConfig(users=700, items=300, events=12_000, seed=3)
SEED = 3


def quiet(_: str) -> None:
    pass


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """artifacts/<name> of the small shop after prepare, train, evaluate and compile."""
    root = tmp_path_factory.mktemp("artifacts") / "shop"
    prepare(Shop(SMALL), PrepareConfig(partitions=3), root, SEED, quiet)
    features = Features(root / "features")
    train_retrieval(features, tiny(), root, SEED, quiet, quiet=True)
    train_ranker(features, tiny(), root, SEED, quiet, quiet=True)
    evaluate(features, tiny(), root, SEED, quiet)
    compile_models(features, tiny(), root, SEED, quiet)
    return root


@pytest.fixture(scope="session")
def features(root: Path) -> Features:
    return Features(root / "features")


@pytest.fixture(scope="session")
def served(root: Path):
    """(server, watchdog) of the small shop on free ports."""
    options = ServerOptions(
        root / "model_repository", http_port=0, grpc_port=0, metrics_port=0, log=root / "triton.log"
    )
    with service(options, quiet) as running:
        yield running


@pytest.fixture(params=["grpc", "http"])
def client(request: pytest.FixtureRequest, served):
    from vivace.client import VivaceClient

    server, _ = served
    port = server.grpc_port if request.param == "grpc" else server.http_port
    with VivaceClient(f"{server.host}:{port}", request.param) as client:
        yield client
