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
    of the ranker that was trained beside it). It runs query by query, as an answer must not depend on who asks beside:
    int8 activations are scaled by all that is in a batch, and a last bit of a vector decides between two items of one
    title."""

    def __init__(self, folder: Path) -> None:
        self._session = open_session(folder / ENCODER)
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.attributes: dict[str, list[str]] = json.loads(metadata["attributes"])
        self.tokens, self.features = int(metadata["tokens"]), int(metadata["features"])
        self._pretrained = not isinstance(self._session.get_inputs()[0].shape[1], int)  # tokens are a free axis

    def understood(self, queries: Sequence[Understood]) -> EncodedQueries:
        """What queries mean. An encoder of the catalogue's own words reads them mended. A pretrained one knows words
        that the catalogue does not have, so it reads them as typed, with the mended forms behind."""
        if self._pretrained:
            return self([" ".join([u.text, *(normalise(w) for w in u.corrected.values())]) for u in queries])
        return self([normalise(u.mended) for u in queries])

    def __call__(self, texts: Sequence[str]) -> EncodedQueries:
        runs = [self._encode(encoding.ids[: self.tokens]) for encoding in self._tokenizer.encode_batch(list(texts))]
        vectors, logits, states = ([run[k] for run in runs] for k in range(3))
        return EncodedQueries(np.stack(vectors), np.stack(logits), states)

    def _encode(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(vector [E], logits [K], states [S, P]) of one query."""
        if self._pretrained:
            vector_1E, states_1SP = self._session.run(["VECTOR", "STATES"], {"TOKENS": np.array([ids], np.int64)})
            return vector_1E[0], np.zeros(0, np.float32), states_1SP[0][np.any(states_1SP[0] != 0, axis=1)]
        tokens_1S = np.zeros((1, self.tokens), np.int64)
        tokens_1S[0, : len(ids)] = ids
        vector_1E, logits_1K = self._session.run(["VECTOR", "INTENTS"], {"TOKENS": tokens_1S})
        return vector_1E[0], logits_1K[0], np.empty((0, 0), np.float32)
