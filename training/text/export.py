"""A text tower's query side as ONNX: what the request path runs with ``tokenizers`` and ONNX Runtime alone."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from tokenizers import Tokenizer

from training.text.tower import TextTower

OPSET = 17
QUERY_TOKENS = 32  # of a query that are read, special tokens included


def query_tokenizer(tower: TextTower, tokens: int = QUERY_TOKENS) -> Tokenizer:
    """The tower's tokenizer, cut at ``tokens`` with the special tokens kept."""
    tokenizer = Tokenizer.from_str(tower.tokenizer.to_str())
    tokenizer.enable_truncation(tokens)
    return tokenizer


def _export_float(tower: TextTower, path: Path) -> None:
    tokens_BS = torch.full((2, 6), tower.pad, dtype=torch.int64)
    for row, text in zip(tokens_BS, ("red lamp", "a tall blue lamp"), strict=True):
        ids = tower.tokenizer.encode(text).ids[: len(row)]
        row[: len(ids)] = torch.tensor(ids)
    free = {0: "batch", 1: "tokens"}
    axes = {"TOKENS": free, "VECTOR": {0: "batch"}, "STATES": free}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracing, which a test holds against the tower
        torch.onnx.export(
            tower.model, (tokens_BS,), str(path), input_names=["TOKENS"], output_names=["VECTOR", "STATES"],
            opset_version=OPSET, dynamo=False,
            dynamic_axes=axes,
        )  # fmt: skip


def export_queries(
    tower: TextTower,
    path: Path,
    features: int,
    tokens: int = QUERY_TOKENS,
    int8: bool = True,
    reduce_range: bool = True,
) -> None:
    """TOKENS int64 [B, S] to VECTOR float32 [B, E] and STATES float32 [B, S, P]; what is needed beside is metadata:
    see ``search.query_encoder``.

    ``int8``: weights of the products by channel, activations scaled as they come; ``reduce_range``: seven bits a
    weight, which processors without VNNI need."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "float.onnx"
        _export_float(tower, whole)
        if int8:
            logger, level = logging.getLogger(), logging.getLogger().level
            logger.setLevel(logging.ERROR)  # the quantizer talks much
            try:
                quantize_dynamic(
                    str(whole), str(path), per_channel=True, weight_type=QuantType.QInt8, reduce_range=reduce_range,
                    op_types_to_quantize=["MatMul", "Gemm", "Gather"], extra_options={"MatMulConstBOnly": True},
                )  # fmt: skip
            finally:
                logger.setLevel(level)
        model = onnx.load(str(path if int8 else whole))
    record = {"attributes": json.dumps({}), "tokens": str(tokens), "features": str(features)}
    for key, value in record.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, str(path))


def overlap(first_QE: np.ndarray, second_QE: np.ndarray, items_VE: np.ndarray, k: int = 100) -> float:
    """Mean share of the ``k`` nearest items that two sets of query vectors have in common."""
    best = lambda q: np.argsort(-(items_VE @ q), kind="stable")[:k]  # noqa: E731
    return float(np.mean([len(set(best(a)) & set(best(b))) / k for a, b in zip(first_QE, second_QE, strict=True)]))
