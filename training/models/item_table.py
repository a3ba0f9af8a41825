"""The embedding of every item: its id, and where the configuration says so its attributes and the words of its text,
so that an item nobody has touched yet is not blank.

Axis legend: V item ids, D width, C categorical and M continuous attributes, A list attributes of K values at most, L
words kept of an item's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from torch import Tensor, nn

from preprocessing.features import Features
from preprocessing.item_lists import stacked
from serving.runtime.new_items import NEIGHBOURS, attribute_shares, nearest
from training.models.encoders import EncoderConfig
from vivace.contract import FIRST_ID, PADDING_ID, TEXT, DataSchema

MAX_WORDS = 20_000
TOWER_POWER = 4  # of similarities that a text tower has a part in: without it all items are alike
SIMILARITY_ROWS = 512  # items compared with all others at once
WORD = r"(?u)\b\w+\b"
MIN_ITEMS = 2  # a word of one item alone says no more than its id


@dataclass(frozen=True)
class ItemLists:
    """``ids`` int32 [V, A, K]: values of each list attribute, then PADDING_ID; ``sizes``: ids of each attribute."""

    ids: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, features: Features) -> ItemLists | None:
        """Those of a prepared catalogue; None for one without list attributes. The special ids have no value."""
        schema = features.schema
        if not schema.item_lists:
            return None
        table, values = features.items(), features.list_values()
        ids = stacked([table[name].tolist() for name in schema.item_lists], len(table))
        sizes = tuple(FIRST_ID + len(values[name]) for name in schema.item_lists)
        return cls(torch.from_numpy(np.pad(ids, ((FIRST_ID, 0), (0, 0), (0, 0)))), sizes)


@dataclass(frozen=True)
class ItemTables:
    """What the ranker reads of every item id: counters and attributes, from training data alone. K: followers kept.

    ``popularity`` float [V]; ``follower_ids`` int64 [V, K] and ``follower_weights`` float [V, K]: the items that most
    often came soon after an item, with their decayed conditional frequency; ``categories`` int64 [V, C] ids of
    categorical attributes with ``category_sizes``; ``numbers`` float [V, M] normalised continuous attributes;
    ``lists``: None without list attributes.
    """

    popularity: Tensor
    follower_ids: Tensor
    follower_weights: Tensor
    categories: Tensor
    category_sizes: tuple[int, ...]
    numbers: Tensor
    lists: ItemLists | None = None


def list_mean(values: nn.Embedding, ids: Tensor) -> Tensor:
    """Mean of the embeddings of ``ids`` [..., K] other than PADDING_ID, [..., D]; zero where there is none."""
    real = (ids != PADDING_ID)[..., None].to(values.weight.dtype)
    return (values(ids) * real).sum(-2) / real.sum(-2).clamp_min(1.0)


@dataclass(frozen=True)
class ItemAttributes:
    """What the catalogue says of every item id.

    ``categories`` int64 [V, C] with ``category_sizes``; ``numbers`` float32 [V, M], normalised; ``words`` int64 [V, L],
    0 where there is none, ids below ``word_count``; ``vectors`` float32 [V, E] of the text encoder, E 0 without one;
    ``lists``: see ``ItemLists``, None without list attributes.
    """

    categories: Tensor
    category_sizes: tuple[int, ...]
    numbers: Tensor
    words: Tensor
    word_count: int
    vectors: Tensor
    lists: ItemLists | None = None


def _counted_words(titles: Sequence[str], keep: int) -> tuple[sparse.csr_matrix | None, list[str]]:
    """(which item's text has which word, the words: word i has the id i + 1); none where no word is in two texts."""
    if not keep or not any(titles):
        return None, []
    vectorizer = CountVectorizer(
        token_pattern=WORD, binary=True, min_df=MIN_ITEMS, max_features=MAX_WORDS, dtype=np.int32
    )
    try:
        counts = vectorizer.fit_transform(titles)
    except ValueError:
        return None, []
    return counts, [str(word) for word in vectorizer.get_feature_names_out()]


def words_by_id(titles: Sequence[str], keep: int) -> list[str]:
    """The words that ``words_of`` numbers: word i has the id i + 1."""
    return _counted_words(titles, keep)[1]


def words_of(titles: Sequence[str], keep: int) -> tuple[Tensor, int]:
    """(word ids int64 [V, keep], number of word ids): the rarest ``keep`` words of each item's text, as rare ones say
    most. Row i belongs to item id FIRST_ID + i's text at i; the special ids have none."""
    counts, _ = _counted_words(titles, keep)
    if counts is None:
        return torch.zeros(len(titles) + FIRST_ID, 0, dtype=torch.long), 1
    frequency = np.asarray(counts.sum(0)).ravel()
    out = np.zeros((len(titles) + FIRST_ID, keep), np.int64)
    for row in range(len(titles)):
        words = counts.indices[counts.indptr[row] : counts.indptr[row + 1]]
        rarest = words[np.lexsort((words, frequency[words]))][:keep]
        out[row + FIRST_ID, : len(rarest)] = rarest + 1
    return torch.from_numpy(out), len(frequency) + 1


def attribute_tables(
    table: pd.DataFrame, categoricals: Sequence[str], continuous: Sequence[str]
) -> tuple[Tensor, tuple[int, ...], Tensor]:
    """(category ids int64 [V, C], number of ids of each attribute, numbers float32 [V, M]) of the rows of ``table``,
    one an item id from FIRST_ID on; zero for the special ids and where a number is missing."""
    items = len(table) + FIRST_ID
    categories = np.zeros((items, len(categoricals)), np.int64)
    numbers = np.zeros((items, len(continuous)), np.float32)
    for i, name in enumerate(categoricals):
        categories[FIRST_ID:, i] = table[name].to_numpy()
    for i, name in enumerate(continuous):
        numbers[FIRST_ID:, i] = table[name].fillna(0.0).to_numpy()
    sizes = tuple(int(categories[:, i].max()) + 1 for i in range(len(categoricals)))
    return torch.from_numpy(categories), sizes, torch.from_numpy(numbers)


def item_attributes(features: Features, config: EncoderConfig) -> ItemAttributes | None:
    """The catalogue of a prepared data set as the retriever's item embeddings want it; None for ids alone."""
    if not config.attributes and not config.text_tokens and not config.text_encoder:
        return None
    table, schema = features.items(), features.schema
    categories, sizes, numbers = attribute_tables(
        table,
        schema.item_categoricals if config.attributes else (),
        schema.item_continuous if config.attributes else (),
    )
    words, count = words_of(table[TEXT].tolist(), config.text_tokens)
    vectors = np.zeros((features.item_count(), 0), np.float32)
    if config.text_encoder:
        from training.models.text_encoder import item_vectors

        vectors = item_vectors(features.folder.parent)
    lists = ItemLists.of(features) if config.attributes else None
    return ItemAttributes(categories, sizes, numbers, words, count, torch.from_numpy(vectors), lists)


@dataclass(frozen=True)
class DescribedItems:
    """Items by their words and attributes: ``matrix`` float32 [V - FIRST_ID, words and names], rows of unit length or,
    where the vocabulary lacks a value, less.

    ``words``: what was fitted, None where the catalogue has no text; ``names``: "attribute=id" of each column behind
    the words."""

    matrix: sparse.csr_matrix
    words: TfidfVectorizer | None
    names: list[str]


def _named(table: pd.DataFrame, schema: DataSchema) -> tuple[sparse.csr_matrix, list[str], np.ndarray] | None:
    """(weights of the catalogue's categories and list values by ``attribute_shares``, the name of each column, which
    items have an attribute: bool [V - FIRST_ID]); None where it has no such columns."""
    attributes = (*schema.item_categoricals, *schema.item_lists)
    if not attributes:
        return None
    columns = [table[name] if name in schema.item_lists else [[id_] for id_ in table[name]] for name in attributes]
    of_items = [attribute_shares(dict(zip(attributes, ids, strict=True))) for ids in zip(*columns, strict=True)]
    names = sorted({name for shares, _ in of_items for name in shares})
    place = {name: i for i, name in enumerate(names)}
    starts = np.concatenate([[0], np.cumsum([len(shares) for shares, _ in of_items])])
    weights = np.array([share for shares, _ in of_items for share in shares.values()], np.float32)
    at = np.array([place[name] for shares, _ in of_items for name in shares], np.int32)
    matrix = sparse.csr_matrix((weights, at, starts), shape=(len(table), len(names)))
    matrix.sort_indices()
    return matrix, names, np.array([described for _, described in of_items])


def described_items(features: Features) -> DescribedItems | None:
    """TF-IDF of the catalogue's text beside its attributes, which have equal parts in an item that has both; None where
    it has neither."""
    table, schema = features.items(), features.schema
    words, parts, there = None, list[sparse.csr_matrix](), list[np.ndarray]()
    if table[TEXT].str.strip().any():
        words = TfidfVectorizer(token_pattern=WORD, sublinear_tf=True, dtype=np.float32)
        parts.append(words.fit_transform(table[TEXT]))
        there.append(parts[0].getnnz(axis=1) > 0)
    named, names = _named(table, schema), list[str]()
    if named is not None:
        names = named[1]
        parts.append(named[0])
        there.append(named[2])
    if not parts:
        return None
    scale = 1 / np.sqrt(np.maximum(np.sum(there, axis=0), 1)).astype(np.float32)
    return DescribedItems((sparse.diags(scale) @ sparse.hstack(parts)).tocsr(), words, names)


def description(features: Features) -> sparse.csr_matrix | None:
    """Rows of the catalogue's items (``DescribedItems``); None where they have neither text nor attributes."""
    described = described_items(features)
    return None if described is None else described.matrix


def nearest_seen(
    features: Features, seen_V: np.ndarray, keep: int = NEIGHBOURS, vectors_VE: np.ndarray | None = None
) -> tuple[np.ndarray, ...]:
    """(ids int64 [U] of the items that are not ``seen_V``, their nearest seen items int64 [U, keep], weights float32
    [U, keep] that sum to one): by TF-IDF cosine of the catalogue's text and attributes, with a text tower's unit
    ``vectors_VE`` (a row an item of the catalogue) by the sum of both cosines to the power of TOWER_POWER. Items that
    share no word with a seen one are left out."""
    unseen = np.flatnonzero(~seen_V[FIRST_ID:])
    seen = np.flatnonzero(seen_V[FIRST_ID:])
    keep = min(keep, len(seen))
    matrix = description(features) if len(unseen) and keep else None
    if matrix is None:
        return np.zeros(0, np.int64), np.zeros((0, keep), np.int64), np.zeros((0, keep), np.float32)
    of_seen, ids, weights = matrix[seen].T.tocsc(), [], []
    for start in range(0, len(unseen), SIMILARITY_ROWS):
        rows = unseen[start : start + SIMILARITY_ROWS]
        close = (matrix[rows] @ of_seen).toarray()
        if vectors_VE is None:  # a server chooses by the same rule
            best = np.stack([nearest(row, keep) for row in close])
        else:
            close = np.maximum(close + vectors_VE[rows] @ vectors_VE[seen].T, 0) ** TOWER_POWER
            best = np.argpartition(-close, keep - 1, axis=1)[:, :keep]
        ids.append(seen[best] + FIRST_ID)
        weights.append(np.take_along_axis(close, best, 1))
    neighbours, weight = np.concatenate(ids), np.concatenate(weights)
    similar = weight.sum(1) > 0
    return unseen[similar] + FIRST_ID, neighbours[similar], weight[similar] / weight[similar].sum(1, keepdims=True)


class ItemTable(nn.Module):
    """Embeddings of all items, float32 [V, D]: ``forward()``."""

    categories: Tensor
    numbers: Tensor
    words: Tensor
    vectors: Tensor
    lists: Tensor

    def __init__(self, items: int, width: int, attributes: ItemAttributes | None, id_dropout: float = 0.0) -> None:
        super().__init__()
        self.id_dropout = id_dropout
        self.id = nn.Embedding(items, width, padding_idx=PADDING_ID)
        self.known = attributes is not None
        if attributes is None:
            return
        for name in ("categories", "numbers", "words", "vectors"):
            value = getattr(attributes, name)
            if len(value) != items:
                raise ValueError(f"ItemTable: {name}: expected {items} rows, one an item id, got {len(value)}")
            self.register_buffer(name, value)
        self.category = nn.ModuleList(nn.Embedding(size, width) for size in attributes.category_sizes)
        self.number = nn.Linear(attributes.numbers.shape[1], width, bias=False) if attributes.numbers.shape[1] else None
        self.vector = nn.Linear(attributes.vectors.shape[1], width, bias=False) if attributes.vectors.shape[1] else None
        self.word = nn.Embedding(attributes.word_count, width, padding_idx=0) if attributes.words.shape[1] else None
        lists = attributes.lists
        self.listed = nn.ModuleList(nn.Embedding(size, width, PADDING_ID) for size in (lists.sizes if lists else ()))
        if lists is not None:
            if len(lists.ids) != items:
                raise ValueError(f"ItemTable: lists: expected {items} rows, one an item id, got {len(lists.ids)}")
            self.register_buffer("lists", lists.ids)
            for i in range(len(lists.sizes)):  # the values alone, one item's after the other: most places are padding
                real_VK = lists.ids[:, i] != PADDING_ID
                starts_V = torch.cumsum(real_VK.sum(1), 0) - real_VK.sum(1)
                self.register_buffer(f"values_{i}", lists.ids[:, i][real_VK].long(), persistent=False)
                self.register_buffer(f"starts_{i}", starts_V, persistent=False)

    def forward(self) -> Tensor:
        table = self.id.weight
        if not self.known:
            return table
        if self.training and self.id_dropout:
            keep = torch.rand(len(table), 1, device=table.device) >= self.id_dropout
            table = table * keep.to(table.dtype)
        described = torch.zeros_like(table)
        for i, embedding in enumerate(self.category):
            described = described + embedding(self.categories[:, i])
        for i, embedding in enumerate(self.listed):  # as ``list_mean``
            assert isinstance(embedding, nn.Embedding)
            values, starts_V = self.get_buffer(f"values_{i}"), self.get_buffer(f"starts_{i}")
            described = described + F.embedding_bag(values, embedding.weight, starts_V, mode="mean")
        if self.number is not None:
            described = described + self.number(self.numbers)
        if self.vector is not None:
            described = described + self.vector(self.vectors) / self.vectors.shape[1] ** 0.5
        if self.word is not None:
            described = described + F.embedding_bag(self.words, self.word.weight, mode="sum", padding_idx=0) / (
                (self.words > 0).sum(1, keepdim=True).clamp_min(1).to(table.dtype).sqrt()
            )
        real = (torch.arange(len(table), device=table.device) >= FIRST_ID)[:, None].to(table.dtype)
        return table + described * real
