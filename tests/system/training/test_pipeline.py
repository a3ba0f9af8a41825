"""What training on the small shop leaves: tables, cards, controls."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from training.checkpoints import load_ranker
from training.data import batches
from training.data.counters import cooccurrence_embeddings, follower_matrix, popularity, top_followers
from training.judge.compare import compare, plot
from training.judge.evaluate import NEIGHBOUR, POPULARITY, RANKED, RETRIEVAL
from training.presets import tiny
from vivace import contract


def test_evaluation_lists_baselines_models_and_protocol(root):
    results = json.loads((root / "evaluation" / "metrics.json").read_text())
    assert {POPULARITY, NEIGHBOUR, RETRIEVAL, RANKED} <= set(results["table"])
    assert results["protocol"]["seen items"] == "filtered" and results["protocol"]["sampled metrics"] == "none"
    assert set(results["gauc"]) == {"click", "buy"}
    assert all(0 <= v <= 1 for row in results["table"].values() for v in row.values())


def test_runs_are_compared_user_by_user(root, tmp_path):
    rows = compare([root, root])
    assert [r.method for r in rows] == [RETRIEVAL, RANKED] * 2
    saved = json.loads((root / "evaluation" / "metrics.json").read_text())["table"]
    for row in rows:
        assert (
            row.ndcg10 == pytest.approx(saved[row.method]["NDCG@10"]) and row.interval[0] < row.ndcg10 < row.interval[1]
        )
    assert rows[0].gain is None and rows[2].gain == 0.0 and rows[2].gain_interval == (0.0, 0.0)
    plot(rows, tmp_path / "runs.png")
    assert (tmp_path / "runs.png").stat().st_size > 1000 and (root / "evaluation" / "reliability.png").exists()


def test_manifests_say_how_things_were_made(root):
    for step in ("features", "retrieval", "ranking", "evaluation", "compiled"):
        manifest = json.loads((root / step / "manifest.json").read_text())
        assert {"config", "seed", "inputs", "versions", "commit", "finished", "key"} <= set(manifest)
    card = json.loads((root / "compiled" / "model_card.json").read_text())
    assert card["quality"]["requests"] > 100 and card["licence"]


def test_windows_cover_every_transition_once():
    sequence = np.arange(10, 33)
    pieces = batches.windows(sequence, 5)
    pairs = [(a, b) for p in pieces for a, b in zip(p, p[1:], strict=False)]
    assert sorted(pairs) == [(a, a + 1) for a in range(10, 32)]
    assert all(len(p) <= 6 for p in pieces)


def test_batches_come_from_the_loader_whole_and_seeded(features):
    files = features.files("train")
    tokens = sum(int((b != contract.PADDING_ID).sum()) for b in batches.training_batches(files, 1000, 16, 1, 0))
    assert tokens == popularity_total(files, features.item_count())
    one, two, other = ([b.tolist() for b in batches.training_batches(files, 20, 16, s, 0)] for s in (1, 1, 2))
    assert one == two and one != other


def popularity_total(files, items) -> int:
    """Training events of users with at least two (a single event is no transition)."""
    lengths = np.concatenate([pc.list_value_length(pq.read_table(f)[contract.ITEM]).to_numpy() for f in files])
    return int(lengths[lengths > 1].sum())


def test_followers_by_hand(tmp_path):
    import pyarrow as pa

    file = tmp_path / "part.parquet"
    pq.write_table(pa.table({contract.ITEM: pa.array([[3, 4, 5], [3, 4]], pa.list_(pa.int64()))}), file)
    matrix = follower_matrix([file], 6).toarray()
    assert popularity([file], 6).tolist() == [0, 0, 0, 2, 2, 1]
    assert matrix[3, 4] == pytest.approx((1 + 1) / (2 + 5))  # twice right after, over the smoothed count of item 3
    assert matrix[3, 5] == pytest.approx((1 / 2) / (2 + 5))
    ids, weights = top_followers(follower_matrix([file], 6), 2)
    assert ids[3].tolist() == [4, 5] and weights[3, 0] > weights[3, 1] and ids[5].tolist() == [0, 0]


def test_starting_embeddings_put_items_together_that_occur_together(tmp_path):
    import pyarrow as pa

    file = tmp_path / "part.parquet"
    lists = [[3, 4, 5]] * 5 + [[6, 7, 8]] * 3  # two groups; of unequal size, or the SVD could mix them
    pq.write_table(pa.table({contract.ITEM: pa.array(lists, pa.list_(pa.int64()))}), file)
    found = cooccurrence_embeddings([file], 10, 2, 0.1)
    assert (found[:3] == 0).all() and (found[9] == 0).all()  # special ids, and an item without events
    assert np.sqrt((found[3:9] ** 2).mean(1)) == pytest.approx(np.full(6, 0.1))
    own, near, far = (float(found[3] @ found[i]) for i in (3, 4, 6))
    assert near > 0.5 * own and abs(far) < 0.1 * own
    pq.write_table(pa.table({contract.ITEM: pa.array([[3], [4]], pa.list_(pa.int64()))}), file)
    assert not cooccurrence_embeddings([file], 10, 4, 0.1).any()


def test_heads_are_calibrated(features, root):
    model = load_ranker(features, tiny(), root)
    assert torch.isfinite(model.calibration).all() and (model.calibration[:, 0] > 0).all()
    assert not torch.equal(model.calibration, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
