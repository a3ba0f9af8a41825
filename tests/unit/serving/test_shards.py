"""The parts of retrieval in shards by hand: whose rows are whose, how answers are merged, how addresses are read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from serving import repository
from serving.door.options import AccessOptions
from serving.runtime.encoded import EXCLUDED
from serving.runtime.sharded import LEAST_SEEN, merged, rows_of_shards
from serving.shard_addresses import ShardAddresses
from serving.start_checks import check_exposure
from serving.wheel import ServerError
from vivace import contract
from vivace.shard_contract import shard_model

SHARDED = replace(repository.DEFAULT_SHAPES, items=10, candidates=4, shards=3, seen=5)  # ids 3..9: 3, 2 and 2 of them


def test_a_seen_item_is_a_row_of_its_shard():
    rows = rows_of_shards(np.array([[0, 0, 3, 6, 9], [0, 0, 0, 0, 5]]), 3)
    assert [r.shape for r in rows] == [(2, LEAST_SEEN)] * 3
    assert [[sorted(row[row > 0].tolist()) for row in r] for r in rows] == [[[1, 2, 3], []], [[], []], [[], [1]]]
    many = rows_of_shards(np.arange(3, 63)[None], 2)
    assert many[0].shape == (1, 4 * LEAST_SEEN) and sorted(many[1][0][:30].tolist()) == list(range(1, 31))


def test_the_best_of_all_come_first_and_of_equal_ones_the_lower_id():
    first = np.array([[6, 3, 9]]), np.array([[2.0, 1.0, 1.0]], np.float32)
    second = np.array([[4, 7]]), np.array([[1.0, 0.5]], np.float32)
    third = np.array([[5, 0]]), np.array([[2.0, EXCLUDED]], np.float32)
    ids, scores = merged([first, second, third], 1, 6)
    assert ids.tolist() == [[5, 6, 3, 4, 9, 7]] and scores.tolist() == [[2, 2, 1, 1, 1, 0.5]]
    ids, scores = merged([None, second, None], 1, 4)
    assert ids.tolist() == [[4, 7, 0, 0]] and scores[0, 2] == np.float32(EXCLUDED)


def test_addresses_are_read_or_refused():
    text = "a:8101|b:8101,unix:/run/x/http"
    addresses = ShardAddresses.parse(text, 2)
    assert addresses.twins == (("a:8101", "b:8101"), ("unix:/run/x/http",)) and str(addresses) == text
    for wrong, words in (
        ("a:1", "addresses of 2 shards"),
        ("a,b:1", "expected host:port"),
        ("a:1,b:70000", "host:port"),
    ):
        with pytest.raises(ValueError, match=words):
            ShardAddresses.parse(wrong, 2)


def test_a_shard_that_others_reach_wants_a_trusted_network():
    check_exposure("10.0.0.5", "10.0.0.5", False, AccessOptions(insecure_network=True), shard=True)
    check_exposure("127.0.0.1", "127.0.0.1", False, shard=True)
    with pytest.raises(ServerError, match="--insecure-network"):
        check_exposure("10.0.0.5", "10.0.0.5", False, shard=True)
    with pytest.raises(ServerError, match="guard"):
        check_exposure("10.0.0.5", "10.0.0.5", False, AccessOptions(insecure_network=True))


def test_the_configurations_of_a_sharded_run():
    configs = repository.model_configs(SHARDED, repository.DEFAULT_HEADS, repository.PROFILES["cached"])
    counts = [configs[shard_model(i)].output[0].dims[0] for i in range(3)]
    assert counts == [3, 2, 2] and shard_model(3) not in configs, "fewer items than candidates"
    assert not configs[contract.RETRIEVAL].response_cache.enable, "an answer without a shard would stay"
    steps = {step.model_name: step for step in configs[contract.ENSEMBLE].ensemble_scheduling.step}
    assert steps[contract.FEATURE_TRANSFORM].output_map["STATUS_BEFORE"] == "STATUS_BEFORE"
    assert steps[contract.RETRIEVAL].output_map["STATUS_SO_FAR"] == "STATUS_SO_FAR"
    with pytest.raises(ValueError, match="shards"):
        replace(SHARDED, shards=8)
