"""BM25 by field (Robertson and Zaragoza 2009), Lucene's variant, through ``bm25s``: each field's term weights are
worked out once and kept as a sparse matrix, so that a query is a sum of its rows and every item has a score: filters
then cost nothing and a narrow one still fills the answer. Axis legend: F fields, V items, by their row.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy import sparse

from search.text import terms

FILE = "lexical.npz"
TITLE_TERMS, LEAD = 32, 5
K1 = 1.2
PLACES = ("lead", "phrase", "first", "last word", "last word's place", "share of title", "title length", "density")


@dataclass(frozen=True)
class Field:
    """A text field of the catalogue: ``boost`` its weight in the sum, ``b`` how much length counts (0: not)."""

    name: str
    boost: float = 1.0
    b: float = 0.75


class Lexical:
    """Scores of all items for the terms of a query."""

    def __init__(
        self, fields: Sequence[Field], vocabulary: Sequence[str], weights: Sequence[sparse.csr_matrix],
        titles_VT: np.ndarray, lengths: Sequence[float] = (), k1: float = K1,
    ) -> None:  # fmt: skip
        self.lengths, self.k1 = list(lengths), k1  # terms of each field on average
        self.fields, self.vocabulary = tuple(fields), list(vocabulary)
        self.weights = list(weights)  # of each field: [terms, V]
        for matrix in self.weights:
            matrix.sort_indices()
        self.titles_VT = titles_VT  # the first field's first terms in their order, -1 behind its end
        self.row = {t: i for i, t in enumerate(self.vocabulary)}
        self.items = int(self.weights[0].shape[1])
        anywhere = sparse.csr_matrix(self.weights[0].shape, dtype=np.float32)
        for matrix in self.weights:
            anywhere = anywhere + matrix
        anywhere.sort_indices()
        self._anywhere = anywhere.indptr, anywhere.indices  # items that have a term in any field

    @classmethod
    def build(cls, texts: Mapping[str, Sequence[str]], fields: Sequence[Field], k1: float = K1) -> Lexical:
        """``texts``: raw texts by field, one an item. Raises ValueError for a field without texts."""
        import bm25s

        if not fields or set(f.name for f in fields) - set(texts):
            raise ValueError(f"lexical index: expected texts of {[f.name for f in fields]}, got {sorted(texts)}")
        cut = {f.name: [terms(t) for t in texts[f.name]] for f in fields}
        vocabulary = sorted({t for rows in cut.values() for row in rows for t in row})
        at = {t: i for i, t in enumerate(vocabulary)}
        weights = []
        for f in fields:
            documents = [[at[t] for t in row] for row in cut[f.name]]
            size = (len(vocabulary), len(documents))
            if not any(documents):
                weights.append(sparse.csr_matrix(size, dtype=np.float32))
                continue
            index = bm25s.BM25(k1=k1, b=f.b, method="lucene")
            index.index((documents, at), create_empty_token=False, show_progress=False)
            s = index.scores
            weights.append(sparse.csc_matrix((s["data"], s["indices"], s["indptr"]), shape=size[::-1]).T.tocsr())
        titles_VT = np.full((len(cut[fields[0].name]), TITLE_TERMS), -1, np.int32)
        for row, title in zip(titles_VT, cut[fields[0].name], strict=True):
            row[: len(title)] = [at[t] for t in title[:TITLE_TERMS]]
        lengths = [sum(map(len, cut[f.name])) / max(len(cut[f.name]), 1) for f in fields]
        return cls(fields, vocabulary, weights, titles_VT, lengths, k1)

    def extended(self, texts: Mapping[str, Sequence[str]]) -> Lexical:
        """This index with more items behind its own: their terms weigh as those of its own items do, terms that it does
        not know as those of one item alone."""
        cut = {f.name: [terms(t) for t in texts[f.name]] for f in self.fields}
        row = dict(self.row)
        for rows in cut.values():
            for document in rows:
                for t in document:
                    row.setdefault(t, len(row))
        weights = []
        for f, matrix, length in zip(self.fields, self.weights, self.lengths, strict=True):
            more = self._weights(f, matrix, length, cut[f.name], row)
            whole = sparse.csr_matrix((matrix.data, matrix.indices, _longer(matrix.indptr, len(row))),
                                      shape=(len(row), matrix.shape[1]))  # fmt: skip
            weights.append(_beside(whole, more))
        titles = cut[self.fields[0].name]
        titles_KT = np.full((len(titles), TITLE_TERMS), -1, np.int32)
        for places, title in zip(titles_KT, titles, strict=True):
            places[: min(len(title), TITLE_TERMS)] = [row[t] for t in title[:TITLE_TERMS]]
        return Lexical(
            self.fields, list(row), weights, np.concatenate([self.titles_VT, titles_KT]), self.lengths, self.k1
        )  # fmt: skip

    def _weights(
        self, field: Field, matrix: sparse.csr_matrix, length: float, documents: list[list[str]], row: dict[str, int]
    ) -> sparse.csr_matrix:
        """BM25's weights of more documents of a field, float32 [terms, K]."""
        data, columns, rows = list[float](), list[int](), list[int]()
        for k, document in enumerate(documents):
            norm = self.k1 * (1 - field.b + field.b * len(document) / max(length, 1e-9))
            for t, count in Counter(document).items():
                i = row[t]
                frequency = max(int(matrix.indptr[i + 1] - matrix.indptr[i]), 1) if i < matrix.shape[0] else 1
                idf = math.log(1 + (self.items - frequency + 0.5) / (frequency + 0.5))
                data.append(idf * count / (norm + count))
                columns.append(k)
                rows.append(i)
        shape = (len(row), len(documents))
        return sparse.csr_matrix((np.array(data, np.float32), (rows, columns)), shape=shape)

    def places(self, query: Sequence[str], rows_N: np.ndarray) -> np.ndarray:
        """Where the terms of ``query`` stand in the first field of some items, float32 [N, PLACES]: share of them among
        its first LEAD terms, of neighbours in the query that are neighbours there, 1 / (1 + place of the first),
        whether the query's last term (in English the thing itself) is there, 1 / (1 + its place), share of the field
        that they are, its length, their number within the stretch that has them all."""
        ids = [self.row.get(t, -2) for t in dict.fromkeys(query)]
        titles_NT, n = self.titles_VT[rows_N], max(len(ids), 1)
        hit_NT = np.isin(titles_NT, ids)
        length_N, place_T = np.maximum((titles_NT >= 0).sum(1), 1), np.arange(TITLE_TERMS)
        distinct = lambda part_NT: sum(((part_NT == i).any(1) for i in ids), np.zeros(len(rows_N)))  # noqa: E731
        phrases_N = sum(
            (((titles_NT[:, :-1] == a) & (titles_NT[:, 1:] == b)).any(1) for a, b in zip(ids, ids[1:], strict=False)),
            np.zeros(len(rows_N)),
        )
        any_N, last_NT = hit_NT.any(1), titles_NT == (ids[-1] if ids else -2)
        first_N = np.where(any_N, hit_NT.argmax(1), TITLE_TERMS)
        end_N = np.where(hit_NT, place_T, -1).max(1)
        stretch_N = np.where(any_N, end_N - first_N + 1, TITLE_TERMS)
        last_N = np.where(last_NT.any(1), last_NT.argmax(1), TITLE_TERMS)
        all_N = distinct(titles_NT)
        columns = (
            distinct(titles_NT[:, :LEAD]) / n, phrases_N / max(len(ids) - 1, 1), 1 / (1 + first_N), last_NT.any(1),
            1 / (1 + last_N), all_N / length_N, length_N / TITLE_TERMS, all_N / np.maximum(stretch_N, 1),
        )  # fmt: skip
        return np.stack(columns, 1).astype(np.float32)

    def coverage(self, query: Sequence[str], rows_N: np.ndarray, weight: Sequence[float] | None = None) -> np.ndarray:
        """Share of the query's weight whose terms some items have in the first field, and in any: float32 [2, N]."""
        out_2N = np.zeros((2, len(rows_N)), np.float32)
        weight = list(weight or [1.0] * len(query))
        total = max(sum(weight), 1e-9)
        for t, w in zip(query, weight, strict=True):
            if t not in self.row:
                continue
            first, i = self.weights[0], self.row[t]
            for out_N, (indptr, indices) in zip(out_2N, ((first.indptr, first.indices), self._anywhere), strict=True):
                has = indices[indptr[i] : indptr[i + 1]]  # items with the term, in order
                if len(has):
                    out_N[has[np.minimum(np.searchsorted(has, rows_N), len(has) - 1)] == rows_N] += w / total
        return out_2N

    def covered(self, query: Sequence[str], weight: Sequence[float] | None = None) -> np.ndarray:
        """Share of the query's weight whose terms an item has in any field: float32 [V]."""
        out_V = np.zeros(self.items, np.float32)
        weight = list(weight or [1.0] * len(query))
        indptr, indices = self._anywhere
        for t, w in zip(query, weight, strict=True):
            if t in self.row:
                i = self.row[t]
                out_V[indices[indptr[i] : indptr[i + 1]]] += np.float32(w / max(sum(weight), 1e-9))
        return out_V

    def by_field(self, query: Sequence[str], weight: Sequence[float] | None = None) -> np.ndarray:
        """BM25 of every item float32 [F, V] for ``query``'s terms, each counted ``weight`` times (1)."""
        out_FV = np.zeros((len(self.fields), self.items), np.float32)
        known = [(self.row[t], w) for t, w in zip(query, weight or [1.0] * len(query), strict=True) if t in self.row]
        for row_V, matrix in zip(out_FV, self.weights, strict=True):
            data, indices, indptr = matrix.data, matrix.indices, matrix.indptr
            for t, w in known:
                start, stop = indptr[t], indptr[t + 1]
                row_V[indices[start:stop]] += data[start:stop] * np.float32(w)  # an item is in a column once
        return out_FV

    def __call__(self, query: Sequence[str], weight: Sequence[float] | None = None) -> np.ndarray:
        """Boosted sum over the fields float32 [V]."""
        return self.boosted(self.by_field(query, weight))

    def boosted(self, by_field_FV: np.ndarray) -> np.ndarray:
        total: np.ndarray = np.array([f.boost for f in self.fields], np.float32) @ by_field_FV
        return total

    @property
    def bytes(self) -> int:
        arrays = (*(a for m in self.weights for a in (m.data, m.indices, m.indptr)), *self._anywhere, self.titles_VT)
        return sum(int(a.nbytes) for a in arrays)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {f"{f.name}.{k}": getattr(m, k) for f, m in zip(self.fields, self.weights, strict=True)
                  for k in ("data", "indices", "indptr")}  # fmt: skip
        np.savez(folder / FILE, titles=self.titles_VT, **arrays)
        record = {
            "fields": [asdict(f) for f in self.fields], "vocabulary": self.vocabulary, "items": self.items,
            "lengths": self.lengths, "k1": self.k1,
        }  # fmt: skip
        (folder / "lexical.json").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Lexical:
        record = json.loads((folder / "lexical.json").read_text(encoding="utf-8"))
        fields = [Field(**f) for f in record["fields"]]
        size = (len(record["vocabulary"]), record["items"])
        with np.load(folder / FILE) as a:
            weights = [
                sparse.csr_matrix(tuple(a[f"{f.name}.{k}"] for k in ("data", "indices", "indptr")), shape=size)
                for f in fields
            ]
            titles_VT = a["titles"]
        return cls(fields, record["vocabulary"], weights, titles_VT, record["lengths"], record["k1"])


def _longer(indptr: np.ndarray, rows: int) -> np.ndarray:
    """Row pointers with empty rows at the end."""
    return np.concatenate([indptr, np.full(rows + 1 - len(indptr), indptr[-1], indptr.dtype)])


def _beside(left: sparse.csr_matrix, right: sparse.csr_matrix) -> sparse.csr_matrix:
    """The columns of both, those of ``left`` first: scipy's ``hstack`` takes ten times as long."""
    indptr = left.indptr + right.indptr
    data, indices = np.empty(indptr[-1], np.float32), np.empty(indptr[-1], np.int32)
    for matrix, shift, offset in ((left, right.indptr[:-1], 0), (right, left.indptr[1:], left.shape[1])):
        at = np.arange(matrix.nnz) + np.repeat(shift, np.diff(matrix.indptr))
        data[at], indices[at] = matrix.data, matrix.indices + offset
    return sparse.csr_matrix((data, indices, indptr), shape=(left.shape[0], left.shape[1] + right.shape[1]))
