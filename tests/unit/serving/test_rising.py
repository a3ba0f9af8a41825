"""Rising items join what an index or shards found as they join in the graph that scores every item."""

from __future__ import annotations

import numpy as np
import torch

from serving.runtime.encoded import EXCLUDED, with_rising
from training.models.retrieval import propose
from vivace.contract import FIRST_ID, PADDING_ID

ROWS, ITEMS, COUNT, RISING = 40, FIRST_ID + 30, 10, 8


def test_joined_as_one_graph_joins_them():
    rng = np.random.default_rng(5)
    scores_BV = rng.standard_normal((ROWS, ITEMS)).astype(np.float32)
    scores_BV[:, :FIRST_ID] = EXCLUDED
    seen_BS = np.zeros((ROWS, 28), np.int64)
    rising_BM = np.zeros((ROWS, RISING), np.int64)
    for row in range(ROWS):
        seen = rng.permutation(np.arange(FIRST_ID, ITEMS))[: rng.integers(0, 28)]  # some leave fewer than are asked for
        seen_BS[row, 28 - len(seen) :] = seen
        rising = rng.permutation(np.arange(FIRST_ID, ITEMS))[: rng.integers(0, RISING + 1)]
        rising_BM[row, : len(rising)] = rising
    of_rising_BM = np.take_along_axis(scores_BV, rising_BM, 1)
    exact_BV = scores_BV.copy()
    for row in range(ROWS):
        exact_BV[row, seen_BS[row]] = EXCLUDED
    expected = propose(torch.from_numpy(exact_BV), COUNT, torch.from_numpy(rising_BM))

    others_BV = exact_BV.copy()
    np.put_along_axis(others_BV, rising_BM, EXCLUDED, 1)
    order_BN = np.argsort(-others_BV, axis=1, kind="stable")[:, :COUNT]
    scores_BN = np.take_along_axis(others_BV, order_BN, 1)
    ids_BN = np.where(scores_BN > EXCLUDED / 2, order_BN, PADDING_ID)
    ids, scores = with_rising(rising_BM, of_rising_BM, seen_BS, ids_BN, scores_BN)
    assert ids.tolist() == expected[0].tolist() and scores.tobytes() == expected[1].numpy().tobytes()
    first = ids[:, 0] == rising_BM[:, 0]
    assert first.any() and not first.all() and (ids[:, -1] == PADDING_ID).any()
