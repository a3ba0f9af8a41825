"""What answers are kept, for how long, and what an entry must agree with to be given again."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import replace

import numpy as np
import pytest

from serving.releases import CHECKSUMS
from serving.runtime import answer_memory
from serving.runtime.answer_cache import AnswerCache, Repeats, identity, packed, unpacked
from serving.runtime.answer_memory import AnswerMemory
from serving.runtime.cache_settings import LEAST_BYTES, CacheSettings
from serving.runtime.known import Known
from serving.runtime.stages import Row

ROW = Row("user", None, 3)
KNOWN = Known({0: (["a", "b"], ["view", "buy"], [5, 9])}, [{"hour": "9", "device": "phone"}], set(), "", 4)
VALUES = [
    np.array([[b"x", b"y"]], object), np.array([[0.1, 1e-7]], np.float32), np.array([[0.5, 0.25]], np.float32),
]  # fmt: skip


@pytest.fixture
def memory(tmp_path):
    opened = AnswerMemory(tmp_path / "answers", LEAST_BYTES)
    yield opened
    opened.close()


def recalled(cache: AnswerCache, row: Row = ROW, known: Known = KNOWN, parameters=()):
    question = cache.question(row, dict(parameters))
    cache.recall([question], known, [0], [])
    return question


def test_an_answer_is_given_again_bit_by_bit_and_only_where_all_it_went_by_is_the_same(memory):
    cache = AnswerCache(memory, None, b"models", 60)
    question = recalled(cache)
    assert question.answer is None
    cache.keep([(question, VALUES)], [question], share=False)
    again = recalled(cache)
    assert again.tier == "memory" and again.answer[-1].tolist() == [[b"ok"]]
    for kept, value in zip(again.answer[:-1], VALUES, strict=True):
        np.testing.assert_array_equal(kept, value)
        assert kept.dtype == value.dtype

    changed = {
        "an event": {"stored": {0: (["a", "b", "c"], ["view", "buy", ""], [5, 9, 11])}},
        "an event's type": {"stored": {0: (["a", "b"], ["view", "view"], [5, 9])}},
        "a user who was forgotten": {"stored": {0: None}},
        "another hour": {"values": [{"hour": "10", "device": "phone"}]},
        "the catalogue": {"number": 5},
        "the live counters": {"epoch": "this process 2"},
        "the data set's event types": {"event_types": {"view"}},
    }
    for what, change in changed.items():
        assert recalled(cache, known=replace(KNOWN, **change)).answer is None, what
    others = [replace(ROW, unknown_context=("colour",)), replace(ROW, context={"device": "phone"})]
    others += [Row("other", None, 3), Row("user", None, 4), Row("user", ["a", "b"], 3), Row("user", None, 3, "shoe")]
    assert not any(recalled(cache, row).answer for row in others)
    assert recalled(cache, parameters={"diversity": ".5"}).answer is None
    assert recalled(AnswerCache(memory, None, b"other models", 60)).answer is None
    assert recalled(cache).answer is not None  # all that left it there
    old = AnswerCache(memory, None, b"models", -1)
    old.keep([(recalled(old), VALUES)], [], share=False)
    assert recalled(cache).answer is None  # it holds no longer


def test_what_was_read_least_recently_goes_and_the_room_is_kept(memory, tmp_path):
    favourite, value = b"favourite", b"v" * 1000
    memory.put([(favourite, value)])
    for number in range(5_000):  # five times the room
        memory.put([(b"%08d" % number, value)])
        if number % 50 == 0:
            assert memory.get([favourite]) == [value]
    assert memory.get([b"%08d" % 4_999, b"%08d" % 0]) == [value, None]
    assert memory.evicted > 3_000 and 0 < memory.size() <= LEAST_BYTES
    assert (tmp_path / "answers").stat().st_size <= LEAST_BYTES
    memory.put([(b"%08d" % n, value) for n in range(2_000)])  # more at once than there is room for: none of it
    assert memory.get([favourite]) == [None] and memory.size() < LEAST_BYTES
    memory.put([(favourite, value)])
    assert memory.get([favourite]) == [value]


def test_where_almost_nothing_repeats_one_user_in_sixteen_is_looked_up_until_something_does():
    repeats, rows = Repeats(), [Row(f"user {n}", None, 3) for n in range(4_000)]
    for _ in range(Repeats.WINDOW):
        assert repeats.worth(ROW)
        repeats.seen(False)
    looked_up = [row for row in rows if repeats.worth(row)]
    assert 200 < len(looked_up) < 300
    for number in range(Repeats.FEWER):
        assert not all(map(repeats.worth, rows))
        repeats.seen(number % 5 == 0)
    assert all(map(repeats.worth, rows))


def _claims(path, claims, pipe):
    memory = AnswerMemory(path, LEAST_BYTES)
    pipe.send(memory.claim(claims))
    pipe.recv()
    memory.put([(b"k", b"v")], [claims[0]])
    pipe.send("done")


def test_another_process_waits_for_what_is_claimed_and_not_for_ever(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(answer_memory, "CLAIM_S", 30.0)
    here, there = multiprocessing.get_context("fork").Pipe()
    memory.close()
    other = multiprocessing.get_context("fork").Process(
        target=_claims, args=(tmp_path / "answers", [b"a", b"b"], there)
    )
    other.start()
    assert here.recv() == [True, True]
    memory = AnswerMemory(tmp_path / "answers", LEAST_BYTES)
    assert memory.claim([b"a", b"b", b"c"]) == [False, False, True]
    assert memory.claim([b"c"]) == [True]  # one's claim is no hindrance to oneself
    assert memory.claimed([b"a", b"b", b"c"]) == [True, True, False]
    here.send("go on")
    assert here.recv() == "done"
    assert memory.claimed([b"a", b"b"]) == [False, True] and memory.get([b"k"]) == [b"v"]
    other.join()
    monkeypatch.setattr(answer_memory, "CLAIM_S", 0.01)  # it died before it was done with b
    time.sleep(0.02)
    assert memory.claimed([b"b"]) == [False] and memory.claim([b"b"]) == [True]


def test_models_and_settings_tell_versions_apart(tmp_path):
    (tmp_path / CHECKSUMS).write_text("{}")
    assert identity(tmp_path, {"ranked": "0"}) == identity(tmp_path, {"ranked": "0"})
    assert identity(tmp_path, {"ranked": "0"}) != identity(tmp_path, {"ranked": "20"})
    before = identity(tmp_path, {})
    (tmp_path / CHECKSUMS).write_text('{"a": 1}')
    assert identity(tmp_path, {}) != before
    assert identity(tmp_path / "unsealed", {}) != identity(tmp_path / "unsealed", {})  # what it is, nobody can say


def test_texts_of_a_search_are_packed_too():
    understood = np.array([[b'{"words": ["shoe"]}']], object)
    *values, text, status = unpacked(packed([*VALUES, understood]))
    assert text.tolist() == understood.tolist() and status.tolist() == [[b"ok"]] and len(values) == len(VALUES)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((1000, 60.0), "--answer-cache-mb: expected 1 and more"),
        ((LEAST_BYTES, 0.0), "--answer-cache-s: expected seconds"),
    ],
)
def test_settings_that_are_none_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        CacheSettings(*settings)
    assert CacheSettings.read(CacheSettings(LEAST_BYTES, 5.0, path="/dev/shm/x").text()).path == "/dev/shm/x"
