"""A catalogue as search sees it, and judgments of what answers a query."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Catalogue:
    """Items in the order of their rows. ``texts`` by field, ``attributes`` by name ("" where not known), ``numbers``
    such as a price (NaN where not known); ``popularity`` float32 [V], any rising measure; ``lists``: attributes of
    several values an item."""

    items: list[str]
    texts: dict[str, list[str]]
    attributes: dict[str, list[str]] = field(default_factory=dict)
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    popularity: np.ndarray | None = None
    lists: dict[str, list[list[str]]] = field(default_factory=dict)

    def values(self) -> dict[str, list[str]]:
        """Of each attribute, all values that items have, as often as they have them."""
        return self.attributes | {a: [value for row in rows for value in row] for a, rows in self.lists.items()}

    def __post_init__(self) -> None:
        columns: dict[str, Mapping[str, Any]] = {
            "texts": self.texts, "attributes": self.attributes, "numbers": self.numbers, "lists": self.lists,
        }  # fmt: skip
        for kind, named in columns.items():
            for name, values in named.items():
                if len(values) != len(self.items):
                    raise ValueError(
                        f"Catalogue.{kind}[{name!r}]: expected {len(self.items)} values, one an item, got {len(values)}"
                    )


@dataclass(frozen=True)
class Judgments:
    """``gains``: of each query, item to gain; items that are not named gain nothing."""

    queries: list[str]
    gains: list[dict[str, float]]

    def folds(self, count: int, seed: int) -> Iterator[tuple[list[int], list[int]]]:
        """(train, test) positions of queries: each is in one test."""
        order = np.random.default_rng(seed).permutation(len(self.queries))
        for k in range(count):
            test = sorted(order[k::count].tolist())
            yield sorted(set(range(len(self.queries))) - set(test)), test


GAINS = {100.0: 1.0, 10.0: 0.1, 1.0: 0.01, 0.0: 0.0}  # exact, substitute, complement, irrelevant


def read_esci(folder: Path) -> tuple[Catalogue, Judgments]:
    """Amazon's shopping queries, the subset with every judged product's text (Apache-2.0)."""
    packed = folder / "esci_us_ecommerce_shrunk.ndjson.zip"
    if not packed.exists():
        raise FileNotFoundError(f"esci: expected {packed}; --path names the folder of the data set")
    with zipfile.ZipFile(packed) as z, z.open(z.namelist()[0]) as lines:
        rows = [r for r in map(json.loads, lines) if "index" not in r]
    products = {str(r["asin"]): r for r in rows}
    text = lambda name: [str(r.get(name) or "") for r in products.values()]  # noqa: E731
    catalogue = Catalogue(
        list(products),
        {"title": text("title"), "bullets": text("bullet_points"), "description": text("description"),
         "brand": text("brand"), "colour": text("color")},
        {"brand": text("brand"), "colour": text("color")},
        {"price": np.array([float(r.get("price") or np.nan) for r in products.values()], np.float32)},
        np.log1p(np.array([float(r.get("rating_count") or 0) for r in products.values()], np.float32)),
    )  # fmt: skip
    record = json.loads((folder / "esci_us_judgments.json").read_text(encoding="utf-8"))["judgmentRatings"]
    gains = [{str(j["docId"]): GAINS[float(j["rating"])] for j in q["ratings"]} for q in record]
    return catalogue, Judgments([str(q["query"]) for q in record], gains)
