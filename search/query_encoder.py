"""Queries to vectors at request time: a tokenizer and an ONNX graph, nothing else. Axis legend: B queries, S tokens,
E width of the vectors, K attribute values, P width of a token's state.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from search.text import normalise
from search.understanding import Understood
from vivace.onnx_session import open_session

ENCODER, TOKENIZER = "query_encoder.onnx", "tokenizer.json"


@dataclass(frozen=True)
class EncodedQueries:
    """Of B queries: unit vectors float32 [B, E]; intent logits float32 [B, K], K 0 of an encoder without intents; of
    each query the unit states of its tokens float32 [S, P], S 0 of an encoder without late interaction."""

    vectors: np.ndarray
    logits: np.ndarray
    states: list[np.ndarray]


class QueryEncoder:
    """The query's side of a text encoder, from the files ENCODER and TOKENIZER of a folder.

    The graph's metadata: ``attributes`` (values by name, JSON), ``tokens`` (that are read of a query), ``features`` (X
    of the ranker that was trained beside it). A graph whose tokens are a free axis runs query by query, as int8
    activations are scaled by all that is in a batch, and an answer must not depend on who asks beside."""

    def __init__(self, folder: Path) -> None:
        self._session = open_session(folder / ENCODER)
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.attributes: dict[str, list[str]] = json.loads(metadata["attributes"])
        self.tokens, self.features = int(metadata["tokens"]), int(metadata["features"])
        self._alone = not isinstance(self._session.get_inputs()[0].shape[1], int)
        self._outputs = [o.name for o in self._session.get_outputs()]

    def understood(self, queries: Sequence[Understood]) -> EncodedQueries:
        """What queries mean. An encoder of the catalogue's own words reads them mended. A pretrained one knows words
        that the catalogue does not have, so it reads them as typed, with the mended forms behind."""
        if self._alone:
            return self([" ".join([u.text, *(normalise(w) for w in u.corrected.values())]) for u in queries])
        return self([normalise(u.mended) for u in queries])

    def __call__(self, texts: Sequence[str]) -> EncodedQueries:
        ids = [e.ids[: self.tokens] for e in self._tokenizer.encode_batch(list(texts))]
        if self._alone:
            return self._one_by_one(ids)
        tokens_BS = np.zeros((len(texts), self.tokens), np.int64)
        for row, row_ids in zip(tokens_BS, ids, strict=True):
            row[: len(row_ids)] = row_ids
        vectors, logits = self._session.run(["VECTOR", "INTENTS"], {"TOKENS": tokens_BS})
        return EncodedQueries(vectors, logits, [np.empty((0, 0), np.float32)] * len(texts))

    def _one_by_one(self, ids: Sequence[Sequence[int]]) -> EncodedQueries:
        vectors, states = [], []
        for row in ids:
            vector_1E, states_1SP = self._session.run(["VECTOR", "STATES"], {"TOKENS": np.array([row], np.int64)})
            vectors.append(vector_1E[0])
            states.append(states_1SP[0][np.any(states_1SP[0] != 0, axis=1)])
        return EncodedQueries(np.stack(vectors), np.zeros((len(ids), 0), np.float32), states)
