"""The NVTabular workflows: one for event rows with sequences on top, one for catalogue rows.

Row operators only use what ``transform_onnx`` can compile; hashing operators are left out on purpose: on CPU their
result depends on the row index (NVTabular 23.8).
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from vivace.contract import (
    FIRST_ID,
    ITEM,
    NULL_ID,
    OOV_ID,
    SOURCE_ROW,
    SPLIT,
    TIME,
    TRAIN,
    USER,
    DataSchema,
    cross_name,
    cross_value,
    label_column,
)
from vivace.manifest import read_manifest
from vivace.run import FEATURES, MADE_BY

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import nvtabular as nvt
    from merlin.core.compat import HAS_GPU
    from merlin.core.dispatch import get_lib
    from merlin.dag import ColumnSelector
    from nvtabular import ops

PART_SIZE = "4GB"  # one input file is one partition: its users are complete


class EmptyToNull(ops.Operator):
    """Empty strings become nulls: a request cannot tell one from the other, so training must not either."""

    def transform(self, col_selector, df):  # noqa: ANN001, ANN201 - NVTabular's signature
        df = df.copy()
        for name in col_selector.names:
            column = df[name].astype(object).where(df[name].notna(), None)
            df[name] = column.where(column != "", None)
        return df


class Crossed(ops.Operator):
    """One column of the values of several together (``cross_value``), null where one of them is. Categorify then gives
    it a vocabulary of the pairs that training has: exact, where NVTabular's HashedCross hashes, on CPU with the row's
    index."""

    def transform(self, col_selector, df):  # noqa: ANN001, ANN201 - NVTabular's signature
        names = col_selector.names
        there = df[names].notna().all(axis=1)
        known: dict[tuple[str, ...], str] = {}  # one text of all equal rows
        values = np.full(len(df), None, object)
        values[there.to_numpy()] = [
            known.get(v) or known.setdefault(v, cross_value(v))
            for v in df.loc[there, names].itertuples(index=False, name=None)
        ]
        return type(df)({cross_name(names): values}, index=df.index)

    def column_mapping(self, col_selector):  # noqa: ANN001, ANN201 - NVTabular's signature
        return {cross_name(col_selector.names): col_selector.names}

    @property
    def output_dtype(self):  # noqa: ANN201 - NVTabular's signature
        return np.dtype("O")


class Categorify(ops.Categorify):
    """NVTabular's, except that a column that is all null has an empty vocabulary (23.8 writes no file and stops), and
    that a batch whose column is all null gives null ids (23.8 raises IndexError on CPU)."""

    def fit_finalize(self, categories):  # noqa: ANN001, ANN201 - NVTabular's signature
        super().fit_finalize(categories)
        for name, path in self.categories.items():
            if not Path(path).exists():
                words = {name: np.array([], object), f"{name}_size": np.array([], np.int64)}
                table = pd.DataFrame(words, index=pd.RangeIndex(FIRST_ID, FIRST_ID))
                table.to_parquet(path, schema=pa.schema({name: pa.string(), f"{name}_size": pa.int64()}), index=True)

    def transform(self, col_selector, df):  # noqa: ANN001, ANN201 - NVTabular's signature
        empty = [name for name in col_selector.names if df[name].isna().all()]
        if not empty:
            return super().transform(col_selector, df)
        rest = [name for name in col_selector.names if name not in empty]
        encoded = super().transform(ColumnSelector(rest), df[rest]) if rest else type(df)(index=df.index)
        for name in empty:
            encoded[name] = np.full(len(df), NULL_ID, np.int64)
        return encoded[col_selector.names]


@dataclass(frozen=True)
class VocabularyConfig:
    """Categorify limits of the item vocabulary: items with fewer events than ``freq_threshold`` are out of vocabulary
    (0: keep all), or only the most frequent stay, ``max_size`` ids in all with the special ids (0: no limit).
    NVTabular 23.8 takes one or the other. ``new_items``: items of the catalogue without a training event are in the
    vocabulary too, after the others, unless one of the limits is set."""

    @property
    def with_catalogue(self) -> bool:
        return self.new_items and not self.freq_threshold and not self.max_size

    freq_threshold: int = 0
    max_size: int = 0
    new_items: bool = True

    def __post_init__(self) -> None:
        if self.freq_threshold < 0 or self.max_size < 0:
            raise ValueError(f"VocabularyConfig: expected values >= 0, got {self}")
        if self.freq_threshold and self.max_size:
            raise ValueError("VocabularyConfig: give freq_threshold or max_size; NVTabular takes only one of them")
        if 0 < self.max_size <= OOV_ID + 1:
            raise ValueError(f"VocabularyConfig.max_size: expected more than the 3 special ids, got {self.max_size}")


def _categorical(columns: list[str], vocabulary: VocabularyConfig, out_path: Path):  # noqa: ANN202
    limits: dict[str, dict[str, int]] = {}
    if ITEM in columns and vocabulary.freq_threshold:
        limits["freq_threshold"] = {name: vocabulary.freq_threshold if name == ITEM else 0 for name in columns}
    if ITEM in columns and vocabulary.max_size:
        limits["max_size"] = {name: vocabulary.max_size if name == ITEM else 0 for name in columns}
    return columns >> EmptyToNull() >> Categorify(out_path=str(out_path), **limits)


def _continuous(columns: list[str]):  # noqa: ANN202
    return columns >> ops.FillMissing(fill_val=0.0) >> ops.Normalize(out_dtype=np.float32)


def event_workflow(schema: DataSchema, vocabulary: VocabularyConfig, scratch: Path) -> nvt.Workflow:
    """Raw events to encoded user sequences: one row a user, list columns in time order.

    Output columns: USER (raw), and ``<column>-list`` for ITEM, TIME, SPLIT, each categorical (int64 ids) and each
    continuous column (float32, normalised).
    """
    encoded = _categorical([ITEM, *schema.raw_categoricals], vocabulary, scratch)
    for cross in schema.crosses:
        encoded = encoded + (list(cross) >> EmptyToNull() >> Crossed() >> Categorify(out_path=str(scratch)))
    if schema.event_continuous:
        encoded = encoded + _continuous(list(schema.event_continuous))
    labels = [label_column(head.name) for head in schema.heads]
    rows = encoded + [USER, TIME, SOURCE_ROW, SPLIT, *labels]
    lists = [ITEM, *schema.encoded_categoricals, *schema.event_continuous, TIME, SPLIT, *labels]
    sequences = rows >> ops.Groupby(
        groupby_cols=[USER], sort_cols=[TIME, SOURCE_ROW], aggs={name: ["list"] for name in lists}, name_sep="-"
    )
    return nvt.Workflow(sequences)


def extend_vocabulary(saved: Path, column: str, values: Iterable[str]) -> int:
    """Appends to the vocabulary of a workflow saved in ``saved`` what it lacks of ``values``, in their order, with no
    event counted; returns how many. Fitted statistics stay those of the training rows."""
    file = saved / "categories" / f"unique.{column}.parquet"
    known = pd.read_parquet(file)
    there = set(known[column])
    extra = [v for v in dict.fromkeys(values) if v not in there]
    if extra:
        more = pd.DataFrame({column: np.array(extra, object), f"{column}_size": np.zeros(len(extra), np.int64)})
        whole = pd.concat([known, more], ignore_index=True)
        whole.index = pd.RangeIndex(FIRST_ID, FIRST_ID + len(whole))
        whole.to_parquet(file)
    return len(extra)


def item_workflow(schema: DataSchema, scratch: Path) -> nvt.Workflow | None:
    """Catalogue attributes encoded; None where the data set has none. List attributes come without null lists or empty
    ones, see ``items``."""
    nodes = []
    if schema.item_categoricals:
        nodes.append(_categorical(list(schema.item_categoricals), VocabularyConfig(), scratch))
    if schema.item_lists:
        nodes.append(list(schema.item_lists) >> Categorify(out_path=str(scratch)))
    if schema.item_continuous:
        nodes.append(_continuous(list(schema.item_continuous)))
    if not nodes:
        return None
    return nvt.Workflow(sum(nodes[1:], nodes[0]))


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a saved workflow, by its path in ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def load_workflow(folder: Path, expected: dict[str, str] | None = None) -> nvt.Workflow:
    """A saved workflow, once its files have the checksums that were taken when it was saved: it holds a pickle, and
    loading one runs what is in it. ``expected``: None takes those of the manifest beside ``folder``. Raises ValueError
    where they differ or there are none."""
    if expected is None:
        results = read_manifest(folder.parent, MADE_BY[FEATURES])["results"]
        expected = results.get("checksums", {}).get(folder.name)
    if not expected:
        raise ValueError(
            f"{folder}: the manifest has no checksums of this workflow, a pickle that may run anything; run "
            f"'{MADE_BY[FEATURES]}' again"
        )
    there = checksums(folder)
    changed = sorted(name for name in expected.keys() | there.keys() if expected.get(name) != there.get(name))
    if changed:
        raise ValueError(
            f"{folder}: not loaded, as {', '.join(changed[:5])} changed since 'vivace prepare' wrote it; it holds a "
            f"pickle, which may run anything. Run '{MADE_BY[FEATURES]}' again"
        )
    return nvt.Workflow.load(str(folder))


def dataset(files: list[Path]) -> nvt.Dataset:
    """A lazy NVTabular data set in which each file is exactly one partition.

    Raises ValueError if NVTabular would cut a file (its users would lose events).
    """
    data = nvt.Dataset([str(f) for f in files], engine="parquet", part_size=PART_SIZE)
    if data.npartitions != len(files):
        raise ValueError(
            f"events: expected one partition a file ({len(files)}), NVTabular made {data.npartitions}; "
            "re-run 'vivace prepare' with more --partitions"
        )
    return data


def training_rows(files: list[Path], folder: Path) -> list[Path]:
    """Copies of the event files that hold only rows marked TRAIN, for fitting: the future leaks into no statistic."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kept = []
    for file in files:
        table = pq.read_table(file)
        table = table.filter(pc.equal(table[SPLIT], TRAIN))
        if table.num_rows:
            pq.write_table(table, folder / file.name, row_group_size=max(table.num_rows, 1))
            kept.append(folder / file.name)
    if not kept:
        raise ValueError(
            "events: no row is left for training after the split; the log is too short for this split, or its times "
            "are all the same"
        )
    return kept


@contextlib.contextmanager
def dask_cluster(workers: int, scratch: Path) -> Iterator[str]:
    """A local Dask cluster around NVTabular: CUDA workers where cuDF runs, else ``workers`` processes.

    ``workers`` 0 runs in this process. Yields a description for the log.
    """
    if workers == 0:
        yield "in this process"
        return
    import dask
    from distributed import Client, LocalCluster

    scratch.mkdir(parents=True, exist_ok=True)
    with dask.config.set({"temporary-directory": str(scratch), "distributed.worker.daemon": True}):
        if HAS_GPU and get_lib().__name__ == "cudf":
            from dask_cuda import LocalCUDACluster

            cluster = LocalCUDACluster(local_directory=str(scratch))
        else:
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                dashboard_address=None,
                host="127.0.0.1",
            )
        with cluster, Client(cluster):
            yield f"{len(cluster.workers)} Dask workers ({get_lib().__name__})"
