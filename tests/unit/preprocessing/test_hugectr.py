"""What is written for HugeCTR is what its documentation asks for: docs/source/api/python_interface.md of HugeCTR 23."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocessing.features import Features
from preprocessing.hugectr import PREVIOUS, write_hugectr
from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers.shop import Shop, ShopConfig
from vivace import contract

SCRIPT = Path(__file__).resolve().parents[3] / "deploy" / "hugectr" / "train.py"
# Arguments of the calls, as documented; of Input with several labels, by samples/mmoe/mmoe_parquet.py. A network's
# tensors are read once each, and losses come last.
DOCUMENTED = {
    "CreateSolver": {
        "batchsize", "batchsize_eval", "lr", "vvgpu", "repeat_dataset", "max_eval_batches", "i64_input_key",
    },
    "DataReaderParams": {"data_reader_type", "source", "eval_source", "check_type", "slot_size_array"},
    "CreateOptimizer": {"optimizer_type", "update_type", "beta1", "beta2", "epsilon"},
    "Input": {"label_dims", "label_names", "dense_dim", "dense_name", "data_reader_sparse_param_array"},
    "SparseEmbedding": {
        "embedding_type", "workspace_size_per_gpu_in_mb", "embedding_vec_size", "combiner", "sparse_embedding_name",
        "bottom_name", "optimizer",
    },
    "DenseLayer": {
        "layer_type", "bottom_names", "top_names", "num_output", "num_layers", "leading_dim", "ranges", "dropout_rate",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Features:
    root = tmp_path_factory.mktemp("hugectr")
    shop = Shop(ShopConfig(users=120, items=60, events=2000, seed=4))
    prepare(shop, PrepareConfig(partitions=2), root, 0, lambda _: None)
    return Features(root / "features")


@pytest.fixture(scope="module")
def folder(features) -> Path:
    folder = features.folder.parent / "hugectr"
    write_hugectr(features, folder, lambda _: None)
    return folder


def _rows(folder: Path, part: str) -> pd.DataFrame:
    count, *paths = (folder / part / "_file_list.txt").read_text().split()
    assert int(count) == len(paths)
    return pd.concat([pd.read_parquet(folder / path) for path in paths], ignore_index=True)


@pytest.mark.parametrize("part", ["train", "valid"])
def test_files_are_as_documented(folder, part):
    metadata = json.loads((folder / part / "_metadata.json").read_text())
    slots = json.loads((folder / "slots.json").read_text())
    assert [c["col_name"] for c in metadata["cats"]] == slots["slots"]
    assert len(slots["slot_size_array"]) == len(metadata["cats"])
    assert sum(f["num_rows"] for f in metadata["file_stats"]) == slots["events"][part]
    listed = (folder / part / "_file_list.txt").read_text().split()[1:]
    assert [Path(path).name for path in listed] == [f["file_name"] for f in metadata["file_stats"]]
    for file in metadata["file_stats"]:
        table = pq.read_table(folder / part / file["file_name"])
        assert len(table) == file["num_rows"]
        for kind, dtype in (("labels", pa.float32()), ("conts", pa.float32()), ("cats", pa.int64())):
            for column in metadata[kind]:
                assert table.column_names[column["index"]] == column["col_name"]
                assert table.schema.field(column["col_name"]).type == dtype, column
        assert not any(column.null_count for column in table.columns)
    rows = _rows(folder, part)
    for name, size in zip(slots["slots"], slots["slot_size_array"], strict=True):
        assert rows[name].between(0, size - 1).all(), name


def test_rows_are_the_events_of_the_features(features, folder):
    rows, items = _rows(folder, "train"), features.items()
    start = 0
    for file in features.files("train"):
        for row in pq.read_table(file).to_pylist():
            history = row[contract.ITEM]
            of_user = rows.iloc[start : start + len(history)]
            start += len(history)
            assert of_user[contract.ITEM].tolist() == history
            assert of_user[PREVIOUS].tolist() == [contract.PADDING_ID, *history[:-1]]
            assert of_user["label_buy"].tolist() == row["label_buy"]
            assert of_user["device"].tolist() == row["device"]
            assert of_user[contract.USER].nunique() == 1
    assert start == len(rows)
    known = items.loc[rows[contract.ITEM] - contract.FIRST_ID]
    assert rows["category"].tolist() == known["category"].tolist()
    np.testing.assert_allclose(rows["price"], known["price"], rtol=1e-6)
    ids = rows.groupby((rows[PREVIOUS] == 0).cumsum())[contract.USER].first()
    users = dict(zip(_users(features, "train"), ids, strict=True))
    held_out, requests = _rows(folder, "valid"), _requests(features)
    assert held_out[contract.ITEM].tolist() == requests[contract.TARGET].tolist()
    assert held_out[PREVIOUS].tolist() == [history[-1] for history in requests[contract.ITEM]]
    assert held_out[contract.USER].tolist() == [users.get(u, contract.OOV_ID) for u in requests[contract.USER]]


def _requests(features: Features) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(f) for f in features.files("valid")], ignore_index=True)


def _users(features: Features, part: str) -> list[str]:
    return [u for f in features.files(part) for u in pq.read_table(f)[contract.USER].to_pylist()]


class _Described:
    """Stands where the script expects ``hugectr``: keeps what is described, refuses what is not documented."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict]] = []
        names = ("DataReaderType_t", "Check_t", "Optimizer_t", "Update_t", "Embedding_t", "Layer_t")
        for name in names:
            setattr(self, name, _Names())

    def __getattr__(self, name: str):
        def call(*given, **arguments):
            if name in DOCUMENTED:
                assert set(arguments) <= DOCUMENTED[name], (name, arguments)
            self.calls.append((name, arguments))
            return SimpleNamespace(add=lambda layer: None, compile=lambda **how: self.calls.append(("compile", how)))

        return call


class _Names:
    def __getattr__(self, name: str) -> str:
        return name


@pytest.mark.parametrize("labels", [["label_buy"], ["label_click", "label_buy"]])
@pytest.mark.parametrize("continuous", [[], ["price"]])
def test_the_training_script_describes_a_network_that_hugectr_documents(folder, labels, continuous):
    spec = importlib.util.spec_from_file_location("hugectr_train", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    slots = json.loads((folder / "slots.json").read_text()) | {"labels": labels, "continuous": continuous}
    described = _Described()
    options = argparse.Namespace(gpus="0,1", batch=64, rate=1e-3, distributed=False)
    script.build(described, slots, options)
    reader = dict(described.calls)["DataReaderParams"]
    assert reader["slot_size_array"] == slots["slot_size_array"]
    assert (folder / reader["source"][0]).exists() and (folder / reader["eval_source"]).exists()
    there = {"embedding", *labels, *(["dense"] if continuous else [])}
    layers = [how for name, how in described.calls if name == "DenseLayer"]
    for layer in layers:
        assert set(layer["bottom_names"]) <= there, layer  # each tensor is there, and read once
        there = there - set(layer["bottom_names"]) | set(layer["top_names"])
    assert [x["layer_type"] for x in layers[-len(labels) :]] == ["BinaryCrossEntropyLoss"] * len(labels)
    assert there == {f"loss_{label}" for label in labels}
    assert described.calls[-1] == ("compile", {"loss_names": labels, "loss_weights": [1 / len(labels)] * len(labels)})
