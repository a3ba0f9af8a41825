"""What a server needs to give a new item the vector that training would: see ``serving.runtime.new_items``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from preprocessing.features import CATALOGUE_FILE, Features
from preprocessing.item_rows import digest, parse_item, to_json
from serving.runtime.new_items import NewItemTables
from training.models.item_table import described_items
from training.models.retrieval import RetrievalModel
from vivace import contract
from vivace.manifest import read_manifest

FRESH, RISING_FRESH = 16, 8


def with_fresh(shapes: contract.StageTensors, features: Features) -> contract.StageTensors:
    """The shapes of a run whose ranked items fresh ones join: none for a catalogue that says nothing of its items."""
    described = bool(features.items()[contract.TEXT].str.strip().any()) or bool(
        features.schema.item_categoricals or features.schema.item_lists
    )
    if not described:
        return shapes
    return replace(shapes, fresh=FRESH, rising_fresh=RISING_FRESH if shapes.rising else 0)


def _raw_rows(features: Features) -> list[dict[str, Any]]:
    """The catalogue's rows by the schema's names, null as None, in the order of ids."""
    frame = pd.read_parquet(features.folder / CATALOGUE_FILE)
    columns = {name: frame[name].astype(object).where(frame[name].notna(), None).tolist() for name in frame}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _categories(features: Features, rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Of each attribute, value to id: those the fitted workflow gave the catalogue's rows."""
    encoded = features.items()
    return {
        name: {
            row[name]: int(id_)
            for row, id_ in zip(rows, encoded[name], strict=True)
            if row.get(name) not in (None, "") and id_ >= contract.FIRST_ID
        }
        for name in features.schema.item_categoricals
    }


def _lists(features: Features) -> dict[str, dict[str, int]]:
    """Of each list attribute, value to id."""
    first = contract.FIRST_ID
    return {name: {value: first + i for i, value in enumerate(of)} for name, of in features.list_values().items()}


def _numbers(features: Features, rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Of each number, slope and intercept of its normalisation, read off the least and the largest value."""
    encoded, out = features.items(), {}
    for name in features.schema.item_continuous:
        raw = np.array([0.0 if row[name] is None else row[name] for row in rows])
        low, high = int(raw.argmin()), int(raw.argmax())
        normalised = encoded[name].fillna(0.0).to_numpy(np.float64)
        spread = raw[high] - raw[low]
        slope = (normalised[high] - normalised[low]) / spread if spread else 0.0
        out[name] = (float(slope), float(normalised[low] - slope * raw[low]))
    return out


def new_item_tables(
    features: Features, retriever: RetrievalModel, counts: np.ndarray, boost: float = 0.0
) -> NewItemTables:
    """The tables of a trained run. ``counts``: events of each item id that the retriever was fitted on, [V];
    ``boost``: what is added to the bias of a new item."""
    described = described_items(features)
    assert described is not None, "fresh_count is 0 for a catalogue without text and attributes"
    rows, schema = _raw_rows(features), features.schema
    seen = np.flatnonzero(counts[contract.FIRST_ID :] > 0)
    words = described.words.get_feature_names_out().tolist() if described.words is not None else []
    with torch.no_grad():
        vectors, biases = retriever.eval().table().cpu().numpy(), retriever.bias.detach().cpu().numpy()
    slope, intercept = 1.0, 0.0
    if retriever.memory is not None:
        memory = retriever.memory
        slope, intercept = float(memory.own), float(memory.weight * memory.floor)
    results = read_manifest(features.folder, "vivace prepare")["results"]
    ids = seen + contract.FIRST_ID
    return NewItemTables(
        sparse.csr_matrix(described.matrix[seen].T.tocsr()),
        described.matrix[:, : len(words)].getnnz(axis=0).astype(np.int32),
        ids.astype(np.int64),
        vectors[ids].astype(np.float32),
        (biases[ids] + boost).astype(np.float32),
        np.array([digest(to_json(parse_item(row, schema))) for row in rows], np.uint64),
        {
            "words": words, "names": described.names, "items": len(rows), "categories": _categories(features, rows),
            "lists": _lists(features), "numbers": _numbers(features, rows), "score": (slope, intercept),
            "catalogue_ms": results.get("catalogue_ms", 0),
        },
    )  # fmt: skip
