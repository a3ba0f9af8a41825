"""Why an item is recommended, on the small shop's graphs: reasons are the answer to a shorter history, the smallest
set is the smallest."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from serving.runtime.pipeline import Pipeline
from serving.runtime.stages import Row
from serving.runtime.why import Counterfactuals, because
from tests.support import users_of_data
from vivace.store.lmdb_store import LmdbStore

TOP_K = 5


@pytest.fixture(scope="module")
def pipeline(root):
    store = LmdbStore(root / "feature_store", readonly=True)
    yield Pipeline.published(root, store)
    store.close()


@pytest.fixture(scope="module")
def rows(root):
    return [Row(user, None, TOP_K) for user in sorted(users_of_data(root))[:8]]


def test_reasons_are_answers_to_a_shorter_history(pipeline, rows):
    """Against a history that is sent, by the pipeline itself: the same score wherever what was left out is not shown."""
    checked = 0
    for row in rows:
        stored = pipeline.transform.known([row]).stored[0]
        events = list(zip(*stored, strict=True))[-pipeline.shapes.history :]
        for of in because(pipeline, row, [0]):
            for reason in of.reasons[:2]:
                kept = [event for event in events if event[0] != reason.item]
                sent = Row(
                    "", [e[0] for e in kept], 100, types=tuple(e[1] for e in kept), times=tuple(e[2] for e in kept)
                )
                (ids, values), *_ = pipeline([sent])
                items = [name.decode() for name in pipeline.respond.names_of(ids[0])]
                if of.item in items:
                    score = float(values[0, 0, items.index(of.item)])
                    assert of.score - score == pytest.approx(reason.drop, abs=2e-3)
                    checked += 1
    assert checked > 5


def test_the_smallest_set_is_the_smallest(pipeline, rows):
    sets = 0
    for row in rows[:4]:
        asked = Counterfactuals(pipeline, row, units=6)
        for id_ in asked.shown()[:2].tolist():
            by_size = {
                size: [frozenset(c) for c in itertools.combinations(range(len(asked.units)), size)] for size in (1, 2)
            }
            least = next((size for size in (1, 2) if any(asked.is_gone(id_, left) for left in by_size[size])), 0)
            left = asked.smallest(id_, largest=2)
            assert (len(left) if left else 0) == least
            sets += left is not None and asked.is_gone(id_, left)
    assert sets > 1


def test_what_is_named_matters_more_than_the_rest(pipeline, rows):
    named, others = [], []
    for row in rows:
        asked = Counterfactuals(pipeline, row)
        for id_ in asked.shown()[:3].tolist():
            drops = np.minimum(asked.drops(id_), 100)
            named.append(drops.max())
            others += np.delete(drops, drops.argmax()).tolist()
    assert np.mean(named) > 3 * np.mean(np.abs(others))


def test_what_cannot_be_explained_is_said(pipeline):
    with pytest.raises(ValueError, match="query: "):
        because(pipeline, Row("", ["sku-00001"], 3, "lamp"))
    with pytest.raises(ValueError, match="history: expected events"):
        because(pipeline, Row("nobody", None, 3))
