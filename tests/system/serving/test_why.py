"""Why an item is recommended, on the small shop's graphs: reasons are the answer to a shorter request, the smallest set
is the smallest, and the served call says the same of the answer that ``recommend`` gives."""

from __future__ import annotations

import itertools
import json
from contextlib import closing

import numpy as np
import pytest

from serving.runtime.paths import Paths, hangs_on
from serving.runtime.pipeline import Pipeline
from serving.runtime.ruled import Rules
from serving.runtime.stages import Row
from serving.runtime.why import Counterfactuals, because, sentence
from tests.support import own_copy, patient, users_of_data
from vivace.client import VivaceError
from vivace.contract import FIRST_ID, RESPONSE
from vivace.explain_contract import CONTEXT, HISTORY, TYPES
from vivace.run import Run
from vivace.store.lmdb_catalogue import Change
from vivace.store.lmdb_store import LmdbStore

TOP_K = 5


@pytest.fixture(scope="module")
def store(root):
    with closing(LmdbStore(root / "feature_store", readonly=True)) as store:
        yield store


@pytest.fixture(scope="module")
def pipeline(root, store):
    return Pipeline.published(root, store)


@pytest.fixture(scope="module")
def paths(root, pipeline):
    return Paths(Run(root).repository / RESPONSE / str(Run(root).version()), pipeline.respond)


@pytest.fixture(scope="module")
def rows(root):
    return [Row(user, None, TOP_K) for user in sorted(users_of_data(root))[:8]]


def score_of(pipeline, row, item, seen) -> float | None:
    """Of an item in the answer to a request; None where it is no candidate."""
    inputs, _ = pipeline.transform([row])
    inputs[1] = seen  # what was seen stays left out, and so no candidate
    ids, values = pipeline.rank(inputs[0], pipeline.retrieve(inputs), pipeline.count_to_rank(TOP_K))
    names = [name.decode() for name in pipeline.respond.names_of(ids[0])]
    return float(values[0, 0, names.index(item)]) if item in names else None


def test_reasons_are_answers_to_a_request_that_is_sent_without_them(pipeline, rows):
    """Each is sent by itself: without an item's events, without types, without a value of the context."""
    checked = dict.fromkeys((HISTORY, TYPES, CONTEXT), 0)
    for row in rows:
        row = Row(row.user_id, None, TOP_K, context={"device": "phone"})
        stored = pipeline.transform.known([row]).stored[0]
        events = list(zip(*stored, strict=True))[-pipeline.shapes.history :]
        seen = pipeline.transform([row])[0][1]
        found, status = because(pipeline, row, [0])
        assert status == "ok"
        for reason in [r for of in found for r in of.reasons]:
            kept = [event for event in events if reason.part.kind != HISTORY or event[0] != reason.part.name]
            items, types, times = (tuple(part) for part in zip(*kept, strict=True))
            types = ("",) * len(items) if reason.part.kind == TYPES else types
            context = {} if reason.part.name == "device" else row.context
            sent = Row(row.user_id, list(items), 100, types=types, times=times, context=context)
            if reason.part.kind == CONTEXT and reason.part.name != "device":  # the clock's, which cannot be unsent
                continue
            score = score_of(pipeline, sent, found[0].item, seen)
            if score is not None:
                assert found[0].score - score == pytest.approx(reason.drop, abs=2e-3), reason
                checked[reason.part.kind] += 1
    reads = {HISTORY, *([TYPES] if pipeline.shapes.types else []), *([CONTEXT] if pipeline.shapes.context else [])}
    assert all(checked[kind] > 3 for kind in reads), checked


def test_the_only_item_of_a_history_is_the_reason_and_not_the_clock(pipeline, rows):
    item = Counterfactuals(pipeline, rows[0]).units[0]
    found, _ = because(pipeline, Row("", [item], TOP_K, context={"hour": "4"}))
    for of in found:
        first = of.reasons[0]  # without it what is popular is answered, whose scores are of another kind
        assert (first.part.kind, first.part.name) == (HISTORY, item) and first.drop == np.inf and first.heads == ()
        assert sentence(of, {}).startswith(f"because of {item}")


def test_a_value_that_training_never_saw_is_no_reason_by_its_name(pipeline, rows):
    for device, unknown in (("phone", False), ("fridge", True)):
        asked = Counterfactuals(pipeline, Row(rows[0].user_id, None, TOP_K, context={"device": device}))
        (part,) = (part for part in asked.parts if part.name == "device")
        assert (part.value, part.unknown) == (device, unknown)


def test_what_a_rule_pins_has_the_score_that_it_is_answered_with(pipeline, rows, root, tmp_path):
    plain = Counterfactuals(pipeline, rows[0])
    pinned = next(i for i in range(FIRST_ID, len(pipeline.respond.names)) if plain.values(i) is None)
    (item,) = (name.decode() for name in pipeline.respond.names_of(np.array([pinned])))
    (tmp_path / "rules.toml").write_text(f'[[rule]]\nname = "shown"\ndo = "pin"\nitems = ["{item}"]\n')
    run = Run(root)
    folder = run.repository / RESPONSE / str(run.version())
    found, status = because(pipeline, rows[0], rules=Rules(tmp_path / "rules.toml", folder, pipeline.respond))
    assert (found[0].item, found[0].ruled, status) == (item, True, "ok; rules: shown")
    assert found[0].score == pytest.approx(plain.score(int(plain.shown()[0])))  # of the one whose place it took
    assert sentence(found[0], {}) == "shown by a business rule"


def test_the_smallest_set_is_the_smallest(pipeline, rows):
    sets = 0
    for row in rows[:4]:
        asked = Counterfactuals(pipeline, row, units=6)
        for id_ in asked.shown()[:2].tolist():
            units = range(len(asked.units))
            by_size = {n: [frozenset(left) for left in itertools.combinations(units, n)] for n in (1, 2)}
            least = next((n for n in (1, 2) if any(asked.is_gone(id_, left) for left in by_size[n])), 0)
            left = asked.smallest(id_, largest=2)
            assert (len(left) if left else 0) == least
            sets += left is not None and asked.is_gone(id_, left)
    assert sets > 1


def test_what_is_named_matters_more_than_the_rest(pipeline, rows):
    named, others = [], []
    for row in rows:
        asked = Counterfactuals(pipeline, row)
        for id_ in asked.shown()[:3].tolist():
            drops = np.minimum(asked.drops(id_)[: len(asked.units)], 100)
            named.append(drops.max())
            others += np.delete(drops, drops.argmax()).tolist()
    assert np.mean(named) > 3 * np.mean(np.abs(others))


def test_a_path_is_in_the_catalogue_and_of_a_reason(root, rows, tmp_path):
    """Then it follows what is put into the catalogue live."""
    import pandas as pd

    frame = pd.read_parquet(root / "features" / "catalogue.parquet").set_index("item_id")
    run = Run(root)
    with closing(LmdbStore(own_copy(root, tmp_path) / "feature_store")) as store:
        pipeline = Pipeline.published(root, store)
        paths = Paths(run.repository / RESPONSE / str(run.version()), pipeline.respond)
        found = [of for row in rows[:4] for of in because(pipeline, row)[0]]
        joined = [(of, path) for of in found if (path := paths(of)) is not None]
        for of, path in joined:
            assert path.item in hangs_on(of) and path.recommended == of.item
            assert all(value == frame.loc[item, relation] for item, relation, value in path.triples)
        assert len(joined) > 3
        of, path = joined[0]
        row = json.loads(frame.loc[[path.item]].reset_index().to_json(orient="records"))[0]
        others = [each.item for each, of_other in joined if of_other.item == path.item]
        store.change_catalogue([Change(path.item, json.dumps({**row, **dict.fromkeys(paths.relations)}))])
        pipeline.respond.catalogue.refresh()
        again = [paths(each) for each, _ in joined]
        assert path.item not in {p.item for p in again if p is not None} and others
        store.change_catalogue([Change(path.item, json.dumps(row))])
        pipeline.respond.catalogue.refresh()
        assert [paths(each) for each, _ in joined] == [path for _, path in joined]


def test_the_served_call_explains_what_recommend_answers(client, rows, pipeline, paths, store):
    checked = joined = 0
    for row in rows[:3]:
        explained = patient(lambda user=row.user_id: client.explain(user, top_k=TOP_K, language="zh"))
        answer = client.recommend(row.user_id, top_k=TOP_K)
        assert [of.item for of in explained.items] == answer.items
        np.testing.assert_allclose([of.score for of in explained.items], answer.scores, atol=1e-4)
        found, _ = because(pipeline, row)
        for of, offline in zip(explained.items, found, strict=True):
            history = [r for r in of.reasons if r["kind"] == HISTORY and r["effect"] is not None]
            drops = {r.part.name: r.drop for r in offline.reasons if r.part.kind == HISTORY}
            assert all(r["effect"] == pytest.approx(drops[r["events"][0]], abs=2e-3) for r in history)
            assert all(set(r["heads"]) == set(answer.heads) for r in history)
            checked += len(history)
            if (path := paths(offline)) is not None:
                titles = dict(zip(names := [path.item, of.item], store.titles(names), strict=True))
                assert of.path == path.record(titles, "zh") and titles[of.item] in of.path["sentence"]
                joined += 1
            else:
                assert of.path == {}
            assert of.sentence.startswith(("因为", "并非"))
    assert checked > 10 and joined


def test_what_cannot_be_explained_is_said(client, served):
    cold = patient(lambda: client.explain("nobody", top_k=2))
    assert "popular items" in cold.status and [of.sentence for of in cold.items] == ["it is popular"] * 2
    with pytest.raises(VivaceError, match=r"TOP_K: expected 1\.\.100"):
        client.explain("nobody", top_k=101)
    with pytest.raises(ValueError, match="language: expected one of en, zh"):
        client.explain("nobody", language="fr")
    metadata = json.dumps(served[1]._client.get_model_config("explain", as_json=True))
    assert '"max_queue_size": 8' in metadata.replace('"8"', "8")
