"""A pretrained text tower (``training.text``) as search's encoder of queries and items.

It sees neither judgments nor clicks; what these teach is the ranker's part. Axis legend: V items, E width of the
vectors, L tokens of a title, P width of a token's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from search.data import Catalogue
from search.query_encoder import ENCODER, TOKENIZER
from search.text import normalise
from training.text.cache import TextCache
from training.text.export import export_queries, query_tokenizer
from training.text.tower import TextTower
from vivace.manifest import Progress, digest

OURS = "ours"  # ``training.search.encoder``: learned from the catalogue alone
TITLE_TOKENS = 40  # L
SAMPLE = 2000  # titles that the projection of their tokens' states is fitted on


@dataclass(frozen=True)
class TowerTexts:
    """What a tower reads of each item: its first field, the same with the values of its attributes, and all fields,
    long texts last, as their end is cut off."""

    titles: list[str]
    named: list[str]
    whole: list[str]

    @classmethod
    def of(cls, catalogue: Catalogue) -> TowerTexts:
        title, *rest = list(catalogue.texts)
        attributes = [n for n in rest if n in catalogue.attributes or n in catalogue.lists]
        long = [n for n in rest if n not in attributes]
        join = lambda names: [  # noqa: E731
            normalise(" ".join(part for part in parts if part))
            for parts in zip(*(catalogue.texts[n] for n in names), strict=True)
        ]
        return cls(join([title]), join([title, *attributes]), join([title, *attributes, *long]))


@dataclass(frozen=True)
class EncodedItems:
    """``vectors`` float32 [V, E], of title and whole text half each, of unit length: the title says what a thing is,
    and in the mean over all tokens alone it drowns. ``states`` int8 [V, L, P]: see ``search.late``."""

    vectors: np.ndarray
    states: np.ndarray


class TowerEncoder:
    """A catalogue's items and queries by one tower. ``cache``: folder of what was encoded, such as a run's ``text``."""

    def __init__(self, tower: TextTower, cache: Path) -> None:
        self.tower, self.cache, self.key = tower, cache, tower.key

    def items(self, catalogue: Catalogue, say: Progress) -> EncodedItems:
        texts, label = TowerTexts.of(catalogue), f"text tower {self.tower.name}"
        vectors = TextCache(self.cache / f"tower-{self.key}", self.tower.encode, label)
        both_VE = vectors(texts.titles, say) + vectors(texts.whole, say)
        length_V1 = np.linalg.norm(both_VE, axis=1, keepdims=True)
        projection_EP = self._projection(texts.titles)
        states = TextCache(
            self.cache / f"states-{self.key}-{digest(projection_EP.tolist())}",
            lambda part: self.tower.encode_states(part, TITLE_TOKENS), f"{label}, words of titles",
        )  # fmt: skip
        return EncodedItems(both_VE / np.maximum(length_V1, 1e-9), states(texts.named, say))

    def _projection(self, titles: Sequence[str]) -> np.ndarray:
        """Fitted once a run: items that come later are projected alike."""
        path = self.cache / f"projection-{self.key}.npy"
        if path.exists():
            self.tower.project(np.load(path))
        else:
            sample = np.random.default_rng(0).permutation(len(titles))[:SAMPLE]
            self.tower.fit_projection([titles[i] for i in sample], TITLE_TOKENS)
            partial = path.with_suffix(".partial.npy")
            np.save(partial, self.tower.model.projection.numpy())
            partial.replace(path)
        return np.asarray(self.tower.model.projection.numpy())

    def export(self, folder: Path, features: int) -> None:
        """The query's side, as it is served; after ``items``."""
        export_queries(self.tower, folder / ENCODER, features)
        query_tokenizer(self.tower).save(str(folder / TOKENIZER))
