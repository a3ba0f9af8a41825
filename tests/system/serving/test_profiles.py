"""One repository, other runtimes by profile: OpenVINO, AOTInductor, TensorRT where there is a GPU, else a clear no."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from preprocessing.requests import recorded
from serving.launcher import TritonServer
from serving.server_options import ServerOptions
from serving.wheel import ServerError
from tests.support import NOON, PatientClient, on_free_ports, quiet
from training.compile.compiler import CompileConfig, compile_models
from training.presets import tiny
from vivace import contract
from vivace.client import Recommendation


@pytest.fixture(scope="module")
def targets(features, root, tmp_path_factory):
    """The small shop's run, compiled for OpenVINO and for TensorRT: on the GPU at hand, else ahead of time."""
    own = tmp_path_factory.mktemp("targets") / "shop"
    shutil.copytree(root, own, ignore=shutil.ignore_patterns("compiled", "model_repository", "compressed", "*.log"))
    on_gpu = torch.cuda.is_available()
    kinds = ("openvino", "aoti", *(("cuda", "tensorrt") if on_gpu else ("tensorrt-rtx",)))
    return own, compile_models(features, tiny(), own, 3, quiet, CompileConfig(targets=kinds))


def options(root: Path, profile: str) -> ServerOptions:
    return on_free_ports(root / "model_repository", profile=profile)


def answers(host: str, root: Path) -> list[Recommendation]:
    histories = recorded(root)[contract.ITEM].tolist()[:30]
    with PatientClient(host) as client:
        return [client.recommend("", list(h), 10, context=NOON) for h in histories]


def same(a: list[Recommendation], b: list[Recommendation], tolerance: float) -> None:
    assert sum(list(x.items) == list(y.items) for x, y in zip(a, b, strict=True)) >= len(a) - 2  # ties may swap
    for x, y in zip(a, b, strict=True):
        assert x.scores == pytest.approx(y.scores, abs=tolerance)


def test_targets_are_checked_and_plans_published(targets):
    own, manifest = targets
    made = manifest["results"]["targets"]
    assert made["openvino"]["ranking, RANKED_IDS"] > 0.95  # popular items of equal count change places
    assert made["openvino"]["ranking, RANKED_VALUES"] < 1e-4 > made["openvino"]["retrieval, CANDIDATE_SCORES"]
    assert made["aoti"]["ranking, RANKED_IDS"] > 0.95 and made["aoti"]["retrieval, CANDIDATE_IDS"] > 0.95
    version = str(manifest["results"]["version"])
    for stage in (contract.RETRIEVAL, contract.RANKING):
        for file in ("model.plan", "model.pt2"):
            assert (own / "model_repository" / stage / version / file).stat().st_size > 1000


@pytest.mark.parametrize("profile", ["openvino", "aoti"])
def test_another_runtime_serves_the_same_repository(targets, root, served, profile):
    own, _ = targets
    server, _ = served
    expected = answers(f"{server.host}:{server.grpc_port}", root)
    with TritonServer(options(own, profile)) as other:
        same(answers(f"{other.host}:{other.grpc_port}", own), expected, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("profile", ["gpu", "tensorrt"])
def test_a_gpu_profile_serves_the_same_repository(targets, root, served, profile):
    own, _ = targets
    server, _ = served
    expected = answers(f"{server.host}:{server.grpc_port}", root)
    with TritonServer(options(own, profile)) as other:
        same(answers(f"{other.host}:{other.grpc_port}", own), expected, 1e-2)  # TF32 products


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_tensorrt_says_so(targets):
    own, _ = targets
    server = TritonServer(options(own, "tensorrt"))
    with pytest.raises(ServerError, match="GPU"):
        server.start()
    server.stop()
