"""What stands for an item that the models have not been trained on: a vector from the seen items nearest to it by text
and attributes, as training gives it to items of the catalogue without an event (``training.learn.warm_start``).

The row counts itself among the documents of the TF-IDF, as it would at ``vivace prepare``; the weights of the other
items stay those of the compiled catalogue. Axis legend: I new items, S seen items, W words and names, D width,
C categorical, A list and M continuous attributes, K neighbours.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from preprocessing.item_lists import list_ids, padded
from preprocessing.item_rows import digest, sold_out
from vivace.contract import FIRST_ID, MAX_FRESH, NULL_ID, OOV_ID, TEXT
from vivace.store.lmdb_catalogue import Change

TABLES, NAMES = FILES = ("new_items.npz", "new_items.json")  # of a published version
WORD = re.compile(r"(?u)\b\w+\b")
NEIGHBOURS = 10
TIED = 1e-3
KEPT_TEXT = 2000  # characters of a text up to which what was made of it is kept


def nearest(close: np.ndarray, count: int, places: np.ndarray | None = None) -> np.ndarray:
    """Positions of the ``count`` largest of ``close`` float32 [n], equal ones (to three digits) by their ``places``
    int [n] (None: positions): training and a server must choose the same."""
    if count >= len(close):
        return np.arange(len(close))
    least = np.partition(close, len(close) - count)[len(close) - count]
    near = np.flatnonzero(close >= least - 2 * TIED)
    by = near if places is None else places[near]
    chosen: np.ndarray = near[np.lexsort((by, -np.round(close[near] / TIED)))[:count]]
    return chosen


def attribute_shares(ids: Mapping[str, Sequence[int]]) -> tuple[dict[str, float], bool]:
    """({"attribute=id": weight}, whether it has any attribute) of one item, by the ids of each attribute: training and
    a server must weigh the same. The attributes that it has take equal parts of the length 1, the values of a list
    share its part. What is null takes none and is like nothing; a value that the vocabulary lacks takes its part, and
    is like no other."""
    known = {name: values for name, values in ids.items() if list(values) != [NULL_ID]}
    shares = {
        f"{name}={id_}": 1 / math.sqrt(len(known) * len(values))
        for name, values in known.items()
        for id_ in values
        if id_ >= FIRST_ID
    }
    return shares, bool(known)


@dataclass(frozen=True)
class NewItemTables:
    """What is needed of a trained run. ``terms_WS``: the seen items' weights of words and names; ``frequency_W``: items
    of the catalogue that have a word; ``seen_ids`` int64 [S] with their ``vectors_SD`` and ``biases_S``; ``digests``
    uint64: of the rows of the compiled catalogue, in the order of ids."""

    terms_WS: sparse.csr_matrix
    frequency_W: np.ndarray
    seen_ids: np.ndarray
    vectors_SD: np.ndarray
    biases_S: np.ndarray
    digests: np.ndarray
    names: dict[str, Any]
    """``words`` and ``names``: the rows of ``terms_WS``; ``items``: of the catalogue; ``categories``: of each
    attribute, value to id; ``lists``: the same of each list attribute; ``numbers``: of each, slope and intercept of its
    normalisation; ``score``: slope and intercept of the retrieval score over the inner product; ``catalogue_ms``: when
    the catalogue was written, Unix ms."""

    def save(self, folder: Path) -> None:
        t = self.terms_WS
        np.savez(
            folder / TABLES, data=t.data.astype(np.float32), indices=t.indices.astype(np.int32), indptr=t.indptr,
            frequency=self.frequency_W, seen_ids=self.seen_ids, vectors=self.vectors_SD, biases=self.biases_S,
            digests=self.digests,
        )  # fmt: skip
        (folder / NAMES).write_text(json.dumps(self.names, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> NewItemTables:
        """Raises FileNotFoundError that names the command to run."""
        if not (folder / TABLES).exists():
            raise FileNotFoundError(f"live catalogue: nothing at {folder / TABLES}; run 'vivace compile' again")
        names = json.loads((folder / NAMES).read_text(encoding="utf-8"))
        with np.load(folder / TABLES, allow_pickle=False) as a:
            shape = (len(names["words"]) + len(names["names"]), len(a["seen_ids"]))
            terms = sparse.csr_matrix((a["data"], a["indices"], a["indptr"]), shape=shape)
            return cls(
                terms, a["frequency"], a["seen_ids"], a["vectors"], a["biases"], a["digests"], names
            )  # fmt: skip


@dataclass(frozen=True)
class CompiledRows:
    """Which changes of the catalogue a version holds already. ``digests``: as in ``NewItemTables``; ``written_ms``:
    when its catalogue was written, Unix ms."""

    digests: np.ndarray
    written_ms: int

    @classmethod
    def load(cls, folder: Path) -> CompiledRows:
        with np.load(folder / TABLES, allow_pickle=False) as a:
            digests = a["digests"]
        return cls(digests, int(json.loads((folder / NAMES).read_text(encoding="utf-8"))["catalogue_ms"]))

    def hold(self, change: Change, id_: int) -> bool:
        """Whether the compiled catalogue has the row that ``change`` puts in, of the item of ``id_``, or a later one;
        or does not know the item that it takes out. What was taken out or is sold out stays so as long as the
        catalogue names it."""
        if id_ < FIRST_ID:
            return change.removed
        if change.removed:
            return False
        held = change.came_ms < self.written_ms or digest(change.row) == int(self.digests[id_ - FIRST_ID])
        return held and not sold_out(json.loads(change.row))


_HEAD = struct.Struct("<fq")  # bias and nearest, before the vector


@dataclass(frozen=True)
class NewItem:
    """``vector`` float32 [D], the retriever's ``bias``, and the id of the ``nearest`` seen item."""

    vector: np.ndarray
    bias: float
    nearest: int

    def to_bytes(self) -> bytes:
        return _HEAD.pack(self.bias, self.nearest) + self.vector.tobytes()

    @classmethod
    def from_bytes(cls, raw: bytes) -> NewItem:
        bias, nearest = _HEAD.unpack_from(raw)
        return cls(np.frombuffer(raw, np.float32, -1, _HEAD.size), bias, nearest)


class Attributes(NamedTuple):
    """Of one row: ``categories`` int64 [C], ``lists`` int32 [A, MAX_VALUES], normalised ``numbers`` float32 [M]."""

    categories: np.ndarray
    lists: np.ndarray
    numbers: np.ndarray

    @classmethod
    def none(cls) -> Attributes:
        return _NO_ATTRIBUTES


_NO_ATTRIBUTES = Attributes(np.zeros(0, np.int64), padded([]), np.zeros(0, np.float32))


class NewItems:
    """Rows of new items to what stands for them, by the tables of one version."""

    def __init__(self, tables: NewItemTables) -> None:
        self.tables, self.names = tables, tables.names
        self._word = {word: i for i, word in enumerate(self.names["words"])}
        self._name = {name: len(self._word) + i for i, name in enumerate(self.names["names"])}
        self._lists: dict[str, dict[str, int]] = self.names.get("lists", {})  # an older version's have none
        self._made: dict[tuple[Any, ...], NewItem | None] = {}  # of late: prices and stocks change, words seldom do
        lengths_S = np.linalg.norm(tables.vectors_SD, axis=1)
        of_seen = [tables.vectors_SD, lengths_S[:, None], tables.biases_S[:, None]]
        self._of_seen_SE = np.concatenate(of_seen, 1, dtype=np.float32)

    @classmethod
    def load(cls, folder: Path) -> NewItems:
        return cls(NewItemTables.load(folder))

    @staticmethod
    def key_of(folder: Path) -> str:
        """A name for the tables in ``folder``: a vector that was made with others must be made anew."""
        sums = [hashlib.sha256((folder / name).read_bytes()).digest() for name in FILES]
        return hashlib.sha256(b"".join(sums)).hexdigest()[:16]

    def _terms(self, row: Mapping[str, Any]) -> tuple[list[int], list[float]]:
        """Columns and weights of the words and names of one row that the catalogue knows; those that it does not know
        take their part of the length."""
        columns, weights, parts = list[int](), list[float](), 0
        counts = Counter(WORD.findall(row[TEXT].lower())) if self._word else {}
        if counts:
            items, frequency = self.names["items"] + 1, self.tables.frequency_W
            of_word = {}
            for word, count in counts.items():
                at = self._word.get(word)
                seen = 1 + (int(frequency[at]) if at is not None else 0)  # with this row
                of_word[word] = (1 + math.log(count)) * (math.log((1 + items) / (1 + seen)) + 1)
            length = math.sqrt(sum(w * w for w in of_word.values()))
            known = [(self._word[word], w / length) for word, w in of_word.items() if word in self._word]
            columns += [at for at, _ in known]
            weights += [w for _, w in known]
            parts += 1
        ids = {attribute: [self._category(attribute, row)] for attribute in self.names["categories"]}
        ids |= {attribute: self._list(attribute, row) for attribute in self._lists}
        shares, described = attribute_shares(ids)
        places = {at: share for name, share in shares.items() if (at := self._name.get(name)) is not None}
        columns += places
        weights += places.values()
        parts += described
        return columns, [w / math.sqrt(parts) for w in weights]

    def _category(self, attribute: str, row: Mapping[str, Any]) -> int:
        value = row.get(attribute)
        if value is None or value == "":
            return NULL_ID
        return int(self.names["categories"][attribute].get(value, OOV_ID))

    def _list(self, attribute: str, row: Mapping[str, Any]) -> list[int]:
        values = row.get(attribute) or []
        return list_ids((self._lists[attribute].get(value, OOV_ID) for value in values), len(values))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[NewItem | None]:
        """What stands for each row; None for one that shares no word and no attribute with a seen item."""
        keys = [self._described_by(row) for row in rows]
        anew = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._made}
        made = dict(zip(anew, self._make(list(anew.values())), strict=True)) if anew else {}
        items = [made[key] if key in made else self._made[key] for key in keys]
        if len(self._made) + len(made) > MAX_FRESH:
            self._made.clear()
        self._made.update((key, item) for key, item in made.items() if len(key[0]) <= KEPT_TEXT)
        return items

    def _described_by(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        """All of a row that its vector depends on: text first, then attributes."""
        lists = [tuple(row.get(attribute) or ()) for attribute in self._lists]
        return (row[TEXT], *(row.get(attribute) for attribute in self.names["categories"]), *lists)

    def _make(self, rows: Sequence[Mapping[str, Any]]) -> list[NewItem | None]:
        described = [self._terms(row) for row in rows]
        lengths = [len(columns) for columns, _ in described]
        shape = (len(rows), self.tables.terms_WS.shape[0])
        columns = np.array([c for columns, _ in described for c in columns], np.int32)
        weights = np.array([w for _, weights in described for w in weights], np.float32)
        row_WI = sparse.csr_matrix((weights, columns, np.concatenate([[0], np.cumsum(lengths)])), shape=shape)
        return self._of_neighbours((row_WI @ self.tables.terms_WS).tocsr())

    def _of_neighbours(self, close_IS: sparse.csr_matrix) -> list[NewItem | None]:
        """``close_IS``: similarity of each row to the seen items that share a term with it. What stands for a row does
        not depend on those beside it, to the last bit."""
        rows, t = close_IS.shape[0], self.tables
        places_IK, close_IK = np.zeros((rows, NEIGHBOURS), np.int64), np.zeros((rows, NEIGHBOURS), np.float32)
        for i, (start, stop) in enumerate(itertools.pairwise(close_IS.indptr.tolist())):
            places, close = close_IS.indices[start:stop], close_IS.data[start:stop]
            best = nearest(close, NEIGHBOURS, places)
            places_IK[i, : len(best)], close_IK[i, : len(best)] = places[best], close[best]
        share_IK = close_IK / np.maximum(close_IK.sum(1, keepdims=True), 1e-30)
        mean_IE = (share_IK[:, None] @ self._of_seen_SE[places_IK])[:, 0]  # vector, its length, bias
        mean_ID, length_I = mean_IE[:, :-2], mean_IE[:, -2]
        vector_ID = mean_ID / np.maximum(np.linalg.norm(mean_ID, axis=1), 1e-9)[:, None] * length_I[:, None]
        largest_I = close_IK.max(1)
        first_I = np.where(close_IK == largest_I[:, None], places_IK, len(t.seen_ids)).min(1)
        return [
            NewItem(vector_ID[i], float(mean_IE[i, -1]), int(t.seen_ids[first_I[i]])) if largest_I[i] > 0 else None
            for i in range(rows)
        ]

    def attributes(self, row: Mapping[str, Any]) -> Attributes:
        """Of a row, as ``vivace prepare`` encodes."""
        ids = [self._category(attribute, row) for attribute in self.names["categories"]]
        numbers = []
        for name, (slope, intercept) in self.names["numbers"].items():
            value = row.get(name)
            numbers.append(slope * (0.0 if value is None else value) + intercept)
        lists_AK = padded([self._list(attribute, row) for attribute in self._lists])
        return Attributes(np.array(ids, np.int64), lists_AK, np.array(numbers, np.float32))
