"""Paths from a history to an item, against the file that they are read from."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from serving.runtime.item_graph import ItemGraph, of_catalogue, of_lines

FILMS = {  # director, genres
    "alien": ("Scott", ["horror", "space"]),
    "blade": ("Scott", ["space"]),
    "heat": ("Mann", ["crime"]),
    "seven": (None, []),
}
TITLES = {"alien": "Alien", "blade": "Blade Runner"}


def films() -> ItemGraph:
    directors, genres = zip(*FILMS.values(), strict=True)
    columns = {"director": list(directors), "genres": [np.array(g, object) for g in genres]}
    return ItemGraph(of_catalogue(list(FILMS), columns))


def test_the_rarest_shared_value_is_named_of_equals_the_newest_item():
    path = films().path(["heat", "alien"], "blade")
    assert path is not None and path.triples == (("alien", "director", "Scott"), ("blade", "director", "Scott"))
    assert path.sentence(TITLES) == "Blade Runner and Alien share director: Scott"
    assert path.sentence(TITLES, "zh") == "Blade Runner与Alien的director相同：Scott"
    many = ItemGraph((i, "tag", "rock") for i in "abc")
    assert many.path(["a", "b"], "c") is None  # all three have it: more than two, and a twentieth
    twice = ItemGraph([("a", "tag", "x"), ("b", "tag", "y"), ("c", "tag", "x"), ("c", "tag", "y")])
    assert [twice.path(h, "c").item for h in (["a", "b"], ["b", "a"])] == ["b", "a"]


def test_what_five_share_is_named_before_a_whim_of_two():
    rows = [*((f"i{n}", "tag", "doom") for n in range(5)), *((f"i{n}", "tag", "gym") for n in range(2))]
    rows += [(f"other{n}", "tag", "rock") for n in range(100)]
    path = ItemGraph(rows).path(["i0"], "i1")
    assert path is not None and (path.value, path.others) == ("doom", 3)


def test_nothing_is_claimed_of_items_that_share_nothing():
    assert films().path(["heat", "seven"], "alien") is None
    assert films().path(["alien"], "alien") is None and films().path(["?"], "blade") is None


def test_a_direct_relation_comes_first_in_either_direction():
    graph = ItemGraph(of_lines(["a bought-with b\n", "a brand X\n", "c brand X\n", "b brand X\n"]))
    for history, recommended in ((["c", "a"], "b"), (["c", "b"], "a")):
        path = graph.path(history, recommended)
        assert path is not None and path.relation == "bought-with" and not path.value
    with pytest.raises(ValueError, match="line 2: expected head, relation and tail"):
        ItemGraph(of_lines(["a b c", "a b"]))


@pytest.mark.skipif("VIVACE_DATA" not in os.environ, reason="VIVACE_DATA does not point to the real data sets")
def test_every_path_of_retailrocket_is_in_its_file():
    file = Path(os.environ["VIVACE_DATA"]) / "retailrocket" / "kg.txt"
    lines = file.read_text().splitlines()
    raw, graph = {tuple(line.split()) for line in lines}, ItemGraph(of_lines(lines))
    heads, named = sorted({head for head, _, _ in raw}), 0
    for drawn in np.random.default_rng(0).integers(0, len(heads), (1_000, 11)):
        *history, recommended = (heads[i] for i in drawn)
        if (path := graph.path(history, recommended)) is not None:
            named += 1
            assert path.item in history
            (a, relation, b), *more = path.triples
            assert raw.issuperset(path.triples) or (not more and (b, relation, a) in raw)
    assert named > 20
