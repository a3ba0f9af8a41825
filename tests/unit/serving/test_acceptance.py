"""What a newer version must find of what users took next, before it may take callers."""

import json

import numpy as np
import pytest

from serving.acceptance import LEAST, Answers, clearly_less, judged
from vivace.client import Recommendation


def answer(*items: str) -> Recommendation:
    return Recommendation(list(items), np.zeros(len(items), np.float32), {}, "ok")


def test_ndcg_is_that_of_the_one_item_taken_next():
    answers = Answers([answer("a", "b"), answer("x", "a"), answer("x", "y"), answer()], [])
    assert answers.ndcg(["a", "a", "a", "a"]) == pytest.approx([1, 0.6309297, 0, 0])  # 1 / log2(3)


def test_what_is_past_the_first_ten_does_not_count():
    ten = answer(*"bcdefghijk", "a")
    assert Answers([ten], []).ndcg(["a"]) == [0] and Answers([ten], []).ndcg(["k"]) == pytest.approx(1 / np.log2(11))


def of_hits(rng: np.random.Generator, share: float, count: int = 256) -> np.ndarray:
    return np.where(rng.random(count) < share, rng.choice(1 / np.log2(np.arange(2, 12)), count), 0)


def test_a_list_that_finds_little_is_refused_and_one_that_is_as_good_never():
    rng, refused = np.random.default_rng(7), 0
    for _ in range(200):
        before = of_hits(rng, 0.3)
        assert clearly_less(of_hits(rng, 0.01), LEAST * before)  # as ids that mean other items do
        refused += clearly_less(of_hits(rng, 0.3), LEAST * before)
    assert refused == 0
    nothing = np.zeros(256)
    assert not clearly_less(nothing, LEAST * nothing) and not clearly_less(np.ones(1), LEAST * np.ones(1))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [("none: served as judged",) * 2 + (True,), ("final fit on all events", "none: served as judged", False),
     ("none: served as judged", "final fit on all events", True)],
)  # fmt: skip
def test_a_version_is_not_judged_on_what_only_the_other_has_learned(tmp_path, old, new, expected):
    releases = [tmp_path / f"model_repository.{n}" for n in (1, 2)]
    for release, final in zip(releases, (old, new), strict=True):
        (release / "recommend" / "1").mkdir(parents=True)
        (release / "recommend" / "1" / "model_card.json").write_text(json.dumps({"final_fit": final}))
    assert judged(*releases) is expected
    assert not judged(*releases[::-1]), "going back is always free"
