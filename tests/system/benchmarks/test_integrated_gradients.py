"""Integrated Gradients of the PyTorch models: of the served score, and complete where nothing jumps."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
import torch

from benchmarks.integrated_gradients import SAME, Gated
from serving.runtime.pipeline import Pipeline
from serving.runtime.stages import Row
from serving.runtime.why import Counterfactuals
from tests.support import users_of_data
from vivace.run import Run
from vivace.store.lmdb_store import LmdbStore


def test_gradients_are_of_the_served_score_and_fall_on_events_alone(root):
    run = Run(root)
    with closing(LmdbStore(root / "feature_store", readonly=True)) as store:
        pipeline = Pipeline.published(root, store)
        items, types, times = store.typed_histories([min(users_of_data(root))])[0]
        row = Row("", items[-6:], 5, types=tuple(types[-6:]), times=tuple(times[-6:]))
        gated, asked = Gated(run, pipeline), Counterfactuals(pipeline, row)
        gated.request(row)
        ids = [id_ for id_ in asked.shown().tolist() if id_ in gated.candidates_1N[0].tolist()][:3]
        places = [gated.candidates_1N[0].tolist().index(id_) for id_ in ids]
        with torch.no_grad():
            whole = gated.scores(torch.ones(1, gated.history_1T.shape[1]))[0, places].numpy()
        np.testing.assert_allclose(whole, [asked.score(id_) for id_ in ids], atol=SAME)
        of_events, changes = gated.attributions(places, steps=64)
        padded_T = gated.history_1T[0].numpy() == 0
        assert padded_T.any() and not of_events[:, padded_T].any() and of_events[:, ~padded_T].all()
        assert np.abs(of_events.sum(1) - changes) == pytest.approx(0, abs=0.25 * np.abs(changes).max())
        of_item_UT = np.stack([~padded_T, padded_T])  # all events at zero are the beginning of the way
        np.testing.assert_allclose(
            gated.switched_off(places, of_item_UT), np.stack([changes, 0 * changes], 1), atol=1e-4
        )
