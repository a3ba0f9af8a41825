"""The query's branch of a request: understood, encoded, its items found by words and meaning at once, with features.

Runs in the stage ``query_search`` and in the fused pipeline; needs neither torch nor NVTabular. Axis legend: B rows,
N candidates, X features, S tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from search.changes import ChangingIndex, LiveChanges
from search.data import Catalogue
from search.features import features, personal
from search.hybrid import Filters, HybridIndex, diversify
from search.late import FILE as STATES, LateInteraction
from search.lexical import FILE as LEXICAL_FILE, Lexical
from search.listed import shown
from search.query_encoder import ENCODER, TOKENIZER, EncodedQueries, QueryEncoder
from search.text import normalise, words
from search.understanding import FILE as UNDERSTANDING_FILE, QueryUnderstanding, Understood, likely
from vivace import contract
from vivace.onnx_session import open_session

VECTORS, CATALOGUE, RANKER = "vectors.npy", "catalogue.json", "search_ranking.onnx"
INDEX_FILES = (ENCODER, TOKENIZER, VECTORS, CATALOGUE, LEXICAL_FILE, "lexical.json", UNDERSTANDING_FILE)
OPTIONAL_INDEX_FILES = (STATES,)  # of an encoder with late interaction
RANKER_FILES = (RANKER, VECTORS)


EXAMPLE = '{"values": {"brand": ["Alto"]}, "ranges": {"price": [5, null]}, "seen": false}'


def searchable(query: str) -> bool:
    """Whether a QUERY has anything to search for."""
    return bool(query) and bool(words(normalise(query)))


@dataclass(frozen=True)
class SearchOptions:
    """What a request asks of the answer to its query."""

    filters: Filters = field(default_factory=Filters)
    diversity: float = 0.0
    seen: bool = True  # items of the history may be found

    @classmethod
    def parse(cls, parameters: Mapping[str, Any]) -> SearchOptions:
        """Of a request's parameters. Raises ValueError naming the parameter."""
        try:
            record = json.loads(parameters.get(contract.FILTERS) or "{}")
            values, ranges, seen = record.pop("values", {}), record.pop("ranges", {}), record.pop("seen", True)
            if record or not all(isinstance(v, list) for v in (*values.values(), *ranges.values())):
                raise ValueError
            if not isinstance(seen, bool):
                raise ValueError
            filters = Filters(
                {str(a): [str(v) for v in allowed] for a, allowed in values.items()},
                {str(n): (_number(low), _number(high)) for n, (low, high) in ranges.items()},
            )
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            raise ValueError(
                f"{contract.FILTERS}: expected JSON such as {EXAMPLE}, "
                f"got {str(parameters.get(contract.FILTERS))[:200]!r}"
            ) from None
        try:
            diversity = float(parameters.get(contract.DIVERSITY) or 0)
        except ValueError:
            diversity = -1.0
        if not 0 <= diversity <= 1:
            raise ValueError(f"{contract.DIVERSITY}: expected 0..1, got {parameters.get(contract.DIVERSITY)!r}")
        return cls(filters, diversity, seen)


def _number(value: Any) -> float | None:
    """A bound of a range; None for none. Raises TypeError or ValueError for what is no number."""
    if isinstance(value, bool | str) or value != value:
        raise TypeError(f"expected a number or null, got {value!r}")
    return None if value is None else float(value)


def write_catalogue(catalogue: Catalogue, folder: Path) -> None:
    """What is needed of a catalogue at request time: ids, attributes, numbers, popularity."""
    record = {
        "items": catalogue.items,
        "attributes": catalogue.attributes,
        "lists": catalogue.lists,
        "numbers": {n: [None if np.isnan(x) else float(x) for x in v] for n, v in catalogue.numbers.items()},
        "popularity": [] if catalogue.popularity is None else [float(x) for x in catalogue.popularity],
    }
    (folder / CATALOGUE).write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")


def read_catalogue(folder: Path) -> Catalogue:
    record = json.loads((folder / CATALOGUE).read_text(encoding="utf-8"))
    numbers = {n: np.array([np.nan if x is None else x for x in v], np.float32) for n, v in record["numbers"].items()}
    popularity = np.array(record["popularity"], np.float32) if record["popularity"] else None
    lists = record.get("lists", {})  # an older version's has none
    return Catalogue(record["items"], {}, record["attributes"], numbers, popularity, lists)


SearchResult = tuple[np.ndarray, np.ndarray, str]  # ids int64 [n], best first; features float32 [n, X]; UNDERSTOOD
NOTHING: SearchResult = (np.empty(0, np.int64), np.empty((0, 0), np.float32), "")  # of a row without a query


def pack(ids_N: np.ndarray, features_NX: np.ndarray, understood: str) -> bytes:
    """What a query found as one string: a line of n and UNDERSTOOD, then ids and features as they lie in memory; "" for
    NOTHING."""
    if not understood:
        return b""
    return b"".join((f"{len(ids_N)} {understood}\n".encode(), ids_N.tobytes(), features_NX.tobytes()))


def unpack(packed: bytes) -> SearchResult:
    """The reverse of ``pack``."""
    if not packed:
        return NOTHING
    head, _, rest = packed.partition(b"\n")
    count, _, understood = head.partition(b" ")
    n = int(count)
    x = (len(rest) - 8 * n) // (4 * n) if n else 0
    features_NX = np.frombuffer(rest, np.float32, n * x, 8 * n).reshape(n, x)
    return np.frombuffer(rest, np.int64, n), features_NX, understood.decode()


class QuerySearch:
    """Queries to items with features. ``candidates`` N; ``live``: changes of the catalogue, where they are followed."""

    def __init__(self, folder: Path, candidates: int, live: LiveChanges | None = None) -> None:
        self.candidates = candidates
        late = LateInteraction.load(folder)
        self.index = HybridIndex(read_catalogue(folder), Lexical.load(folder), np.load(folder / VECTORS), late=late)
        self._learned: dict[str, Mapping[str, Any]] = {}  # rows whose words are known
        self._changing = None
        if live is not None:
            self._changing = ChangingIndex(self.index, lambda texts: self.encode(texts).vectors, live)
        self.understanding = QueryUnderstanding.load(folder)
        self.encode = QueryEncoder(folder)
        self.width = self.encode.features

    def understand(self, queries: Sequence[str]) -> tuple[list[Understood], EncodedQueries]:
        """What each query means, and its encoding."""
        plain = [self.understanding(q) for q in queries]
        encoded = self.encode.understood(plain)
        full = [
            u.with_intents(likely(self.encode.attributes, row)) for u, row in zip(plain, encoded.logits, strict=True)
        ]
        return full, encoded

    def __call__(
        self,
        queries: Sequence[str],
        options: Sequence[SearchOptions | None],
        histories: Sequence[np.ndarray] | None = None,
    ) -> list[SearchResult]:
        """What each of B queries finds, up to N items. ``histories``: ids of each row, for options of nothing seen.

        A row without a query finds NOTHING, and needs no options. Raises ValueError for a filter that the catalogue
        does not have.
        """
        out = [NOTHING] * len(queries)
        rows = [i for i, q in enumerate(queries) if searchable(q)]
        if not rows:
            return out
        self._refresh()
        understood, encoded = self.understand([queries[i] for i in rows])
        for i, meaning, vector_E, states in zip(rows, understood, encoded.vectors, encoded.states, strict=True):
            option = options[i] or SearchOptions()
            filters = option.filters
            if not option.seen and histories is not None:
                filters = replace(filters, without=self._rows_of(histories[i].tolist()))
            out[i] = self._find(meaning, vector_E, states, filters)
        return out

    def _refresh(self) -> None:
        """Takes in what changed of the catalogue."""
        if self._changing is None:
            return
        if self._changing.refresh():
            added, lists = self._changing.added, self.index.listed
            rows = [row for item, row in added.items() if self._learned.get(item) is not row]
            self._learned = dict(added)
            fields = [field.name for field in self.index.lexical.fields]
            self.understanding.learn_more(
                [shown(row.get(name)) for row in rows for name in fields],
                {name: [str(row.get(name) or "") for row in rows] for name in self.index.codes}
                | {name: [value for row in rows for value in row.get(name) or []] for name in lists},
            )
        self.index = self._changing.index

    def _rows_of(self, ids: Sequence[int]) -> list[int]:
        if self._changing is not None:
            return self._changing.rows_of(ids)
        return [id_ - contract.FIRST_ID for id_ in ids if id_ >= contract.FIRST_ID]

    def _find(
        self, understood: Understood, vector_E: np.ndarray, states_SP: np.ndarray, filters: Filters
    ) -> SearchResult:
        """What one query finds."""
        constrained = filters.values or filters.ranges or filters.without
        allowed = self.index.allowed(filters) if constrained or self.index.shut_V is not None else None
        candidates = self.index.candidates(understood, vector_E, self.candidates, allowed)
        rows = candidates.rows
        branches = [candidates.found_by(k) for k in range(min(len(rows), contract.MAX_TOP_K))]
        record = {
            **json.loads(understood.to_json()),
            "facets": self.index.facets(candidates.matches),
            "found_by": {self.index.catalogue.items[r]: b for r, b in zip(rows, branches, strict=False)},
        }
        return (
            rows + contract.FIRST_ID if self._changing is None else self._changing.ids(rows),
            features(self.index, understood, vector_E, candidates, states_SP),
            json.dumps(record, ensure_ascii=False, separators=(",", ":")),
        )


class SearchRanking:
    """Where query and history meet: orders what the query found."""

    def __init__(self, folder: Path) -> None:
        self._session = open_session(folder / RANKER)
        self._vectors = np.load(folder / VECTORS, mmap_mode="r")

    def __call__(
        self,
        query_N: np.ndarray,
        features_NX: np.ndarray,
        ranked_M: np.ndarray,
        values_CM: np.ndarray,
        options: SearchOptions,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 [N], best first, and values float32 [C, N] of one row: the score, and each head's probability
        where the recommendation knows the item (0 elsewhere)."""
        x, at_N = personal(features_NX, query_N, ranked_M, values_CM[0])
        scores = self._session.run(None, {"FEATURES": x[None]})[0][0]
        order = np.argsort(-scores, kind="stable")
        if options.diversity:
            rows_N = query_N - contract.FIRST_ID
            known_N = rows_N < len(self._vectors)  # an item that was put in later is like no other
            vectors = np.asarray(self._vectors[np.where(known_N, rows_N, 0)]) * known_N[:, None]
            order = diversify(scores, vectors, len(query_N), options.diversity)
        values = np.zeros((len(values_CM), len(query_N)), np.float32)
        values[0] = scores[order]
        known = at_N[order] >= 0
        values[1:, known] = values_CM[1:, at_N[order][known]]
        return query_N[order], values

    def rows(
        self,
        results: Sequence[SearchResult],
        ranked_BM: np.ndarray,
        values_BCM: np.ndarray,
        options: Sequence[SearchOptions | None],
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same for a batch, PADDING_ID where a row has fewer; rows without a query stay as they were
        recommended. A query whose filters leave nothing is answered by nothing."""
        searched = [i for i, (_, _, understood) in enumerate(results) if understood]
        if not searched:
            return ranked_BM, values_BCM
        wide = max(ranked_BM.shape[1], *(len(results[i][0]) for i in searched))
        ids = np.full((len(ranked_BM), wide), contract.PADDING_ID, np.int64)
        values = np.zeros((len(ranked_BM), values_BCM.shape[1], wide), np.float32)
        ids[:, : ranked_BM.shape[1]], values[:, :, : ranked_BM.shape[1]] = ranked_BM, values_BCM
        for i in searched:
            n = len(results[i][0])
            ids[i], values[i] = contract.PADDING_ID, 0
            if not n:
                continue
            ids[i, :n], values[i, :, :n] = self(
                *results[i][:2], ranked_BM[i], values_BCM[i], options[i] or SearchOptions()
            )
        return ids, values
