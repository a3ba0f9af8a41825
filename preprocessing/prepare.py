"""``vivace prepare``: raw logs to encoded sequences, held-out requests, compiled transform and feature store.

Out of core: the log is read in chunks and dealt to partition files by user, so each later step holds one partition
(or, on Dask, one a worker) in memory. NVTabular fits on rows marked TRAIN only.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.cleaning import (
    DUPLICATE,
    EVENT_HINTS,
    ITEM_HINTS,
    SEARCH_HINTS,
    USER_HINTS,
    clean_interactions,
    clean_items,
    clean_searches,
    clean_users,
    drop_duplicates,
    joined_users,
)
from preprocessing.events import write_events
from preprocessing.features import (
    CATALOGUE_FILE,
    EVENTS_FILE,
    LAYOUT,
    MINUTE_EVENTS,
    REQUEST_GRAPH,
    SCHEMA_FILE,
    SEARCHES_FILE,
    SHOWN_FILE,
    Features,
)
from preprocessing.items import ITEM_WORKFLOW, items_table
from preprocessing.readers.base import Chunk, SearchSource, Source, UserSource
from preprocessing.readers.tables import Tables
from preprocessing.rejects import Rejects
from preprocessing.sequences import write_requests
from preprocessing.shown import of_partitions, only_shown, shown_apart, write_shown
from preprocessing.splits import LEAVE_ONE_OUT, SplitConfig, Ties, TimeSample, mark
from preprocessing.workflow import (
    VocabularyConfig,
    checksums,
    dask_cluster,
    dataset,
    event_workflow,
    extend_vocabulary,
    load_workflow,
    nvt,
    training_rows,
)
from vivace import contract
from vivace.context import CONTEXT_FILE, CONTEXT_GRAPH, TYPES_GRAPH, ContextColumns
from vivace.manifest import Progress, Step, replaced
from vivace.run import Run
from vivace.store.lmdb_store import fill_store
from vivace.suspects import most_a_minute

WORKFLOW = "workflow"
WORKFLOWS = (WORKFLOW, ITEM_WORKFLOW)  # folders of what NVTabular fitted


@dataclass(frozen=True)
class PrepareConfig:
    """What ``prepare`` does. ``partitions`` files by user; ``workers`` Dask processes (0: none)."""

    split: SplitConfig = field(default_factory=SplitConfig)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    partitions: int = 4
    workers: int = 0

    def __post_init__(self) -> None:
        if self.partitions < 1 or self.workers < 0:
            raise ValueError(f"PrepareConfig: expected partitions >= 1 and workers >= 0, got {self}")


# -- 1. ingest -------------------------------------------------------------------------------------
class _Partitions:
    """Parquet files by user; rows arrive in chunks."""

    def __init__(self, folder: Path, count: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.files = [folder / f"part-{i:03d}.parquet" for i in range(count)]
        self._writers: dict[int, pq.ParquetWriter] = {}

    def add(self, frame: pd.DataFrame) -> None:
        part = (pd.util.hash_array(frame[contract.USER].to_numpy(object)) % len(self.files)).astype(int)
        for i in np.unique(part):
            rows = frame[part == i].reset_index(drop=True)
            if i not in self._writers:
                fields = [
                    (n, pa.string() if t == np.dtype(object) else pa.from_numpy_dtype(t))
                    for n, t in rows.dtypes.items()
                ]
                self._writers[i] = pq.ParquetWriter(self.files[i], pa.schema(fields))
            self._writers[i].write_table(pa.Table.from_pandas(rows, self._writers[i].schema, preserve_index=False))

    def close(self) -> list[Path]:
        for writer in self._writers.values():
            writer.close()
        return [self.files[i] for i in sorted(self._writers)]


def _catalogue(source: Source, rejects: Rejects) -> tuple[pd.DataFrame, pd.Index | None]:
    """(the catalogue, its item ids); an empty one and None where the data set has none."""
    raw = source.items()
    if raw is None:
        return pd.DataFrame(
            {name: pd.Series(dtype=object) for name in (contract.ITEM, contract.TITLE, contract.TEXT)}
        ), None
    catalogue = clean_items(raw if isinstance(raw, list) else [Chunk(raw)], source.schema, rejects)
    rejects.refuse_nearly_all("items", ITEM_HINTS)
    return catalogue, pd.Index(catalogue[contract.ITEM])


def _users(source: Source, rejects: Rejects) -> pd.DataFrame | None:
    """The table of users by id; None where the data set has none."""
    chunks = source.users() if source.schema.user_columns and isinstance(source, UserSource) else None
    if chunks is None:
        return None
    users = clean_users(chunks, source.schema, rejects)
    rejects.refuse_nearly_all("users", USER_HINTS)
    return users


def _ingest(
    source: Source, config: PrepareConfig, catalogue: pd.Index | None, users: pd.DataFrame | None, folder: Path,
    rejects: Rejects, say: Progress,
) -> tuple[list[Path], list[Path], TimeSample]:  # fmt: skip
    """(files of events, files of what was shown, the times of the events)."""
    partitions, times = _Partitions(folder, config.partitions), TimeSample()
    impressions = _Partitions(folder.with_name("shown"), config.partitions)
    for chunk in source.interactions():
        clean, shown = shown_apart(clean_interactions(chunk, source.schema, catalogue, rejects), source.schema)
        clean = joined_users(clean, users)
        if len(shown):
            impressions.add(shown)
        if len(clean):
            times.add(clean[contract.TIME].to_numpy(), clean.get(contract.SPLIT))
            partitions.add(clean)
        if chunk.read:
            say(f"read {rejects.read['interactions']:,} rows, rejected {sum(rejects.counts.values()):,}")
    files, shown_files, read = partitions.close(), impressions.close(), rejects.read["interactions"]
    rejects.refuse_nearly_all("interactions", EVENT_HINTS)
    if not files and shown_files:
        raise ValueError(f"interactions: {only_shown(shown_files, source.schema, read)}")
    if not files:
        why = ", ".join(f"{reason} {n:,}" for reason, n in rejects.summary().items())
        refused = f"rejected {why}; see {rejects.path} and the mapping" if why else "the files of the mapping are empty"
        raise ValueError(f"interactions: expected rows of events, got no good row in {read:,}; {refused}")
    return files, shown_files, times


def _events(
    files: list[Path],
    folder: Path,
    schema: contract.DataSchema,
    split: SplitConfig,
    times: TimeSample,
    rejects: Rejects,
) -> tuple[list[Path], dict[str, int]]:
    """Partition by partition: duplicates out, in time order, split marked, labels set."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    out, totals = [], {"events": 0, "users": 0, "given": 0}
    positives, ties = dict.fromkeys((h.name for h in schema.heads), 0), Ties()
    for file in files:
        frame = drop_duplicates(pd.read_parquet(file), rejects)
        frame = frame.sort_values([contract.USER, contract.TIME, contract.SOURCE_ROW], kind="stable").reset_index(
            drop=True
        )
        frame[contract.SPLIT] = mark(frame, split, times)
        if split.kind == LEAVE_ONE_OUT:
            ties.add(frame)
        for head in schema.heads:
            weight = (
                frame[contract.WEIGHT].fillna(-np.inf)
                if contract.WEIGHT in frame
                else pd.Series(0.0, index=frame.index)
            )
            frame[contract.label_column(head.name)] = (weight >= head.min_weight).astype("int64")
            positives[head.name] += int(frame[contract.label_column(head.name)].sum())
        frame.to_parquet(folder / file.name, row_group_size=max(len(frame), 1), index=False)
        out.append(folder / file.name)
        totals["events"] += len(frame)
        totals["given"] += int((frame[contract.SPLIT] >= contract.GIVEN).sum())
        totals["users"] += frame[contract.USER].nunique()
    _check_labels(positives, schema, rejects)
    rejects.notes.extend(ties.notes())
    return out, totals


def _check_labels(positives: dict[str, int], schema: contract.DataSchema, rejects: Rejects) -> None:
    """Notes each head that no event is a positive of. Raises ValueError where that is so of every head."""
    least = {h.name: h.min_weight for h in schema.heads}
    silent = [name for name, count in positives.items() if not count]
    if len(silent) == len(positives):
        raise ValueError(
            f"heads: no event has the weight that any of {least} asks for, so every label would be 0; check weight or "
            f"weights and [heads]; {'; '.join(rejects.notes) or 'changed ' + str(rejects.changes())}"
        )
    rejects.notes.extend(
        f"head {name!r}: no event has a weight of {least[name]:g} or more, so all its labels are 0" for name in silent
    )


# -- 2. catalogue and feature store --------------------------------------------------------------------
def _searches(source: Source, items: pd.Series, folder: Path, rejects: Rejects, say: Progress) -> int:
    """Writes the log of searches, if there is one; how many lists it has. ``items``: raw ids in the order of ids."""
    (folder / SEARCHES_FILE).unlink(missing_ok=True)
    log = source.searches() if isinstance(source, SearchSource) else None
    if log is None:
        return 0
    known, parts = pd.Index(items), []
    for chunk in log:
        parts.append(clean_searches(chunk, known, rejects))
    rejects.refuse_nearly_all("searches", SEARCH_HINTS)
    if not parts:
        return 0
    frame = pd.concat(parts, ignore_index=True)
    again = frame.duplicated([contract.SEARCH, contract.ITEM], keep="first")
    rejects.add("searches", DUPLICATE, frame[again])
    frame = frame[~again]
    frame[contract.TIME] = frame.groupby(contract.SEARCH)[contract.TIME].transform(
        "min"
    )  # clicks may have been logged with their own
    frame = frame.sort_values([contract.TIME, contract.SEARCH, contract.POSITION], kind="stable").reset_index(drop=True)
    frame[contract.ITEM] = known.get_indexer(frame[contract.ITEM]) + contract.FIRST_ID
    frame.to_parquet(folder / SEARCHES_FILE, index=False)
    lists = int(frame[contract.SEARCH].nunique())
    say(f"{lists:,} searches, {int(frame[contract.CLICKED].sum()):,} clicks")
    return lists


def _held_out_items(files: list[Path]) -> list[str]:
    """Items of held-out events, in the order of the log's files: where there is no catalogue, a final fit meets them.
    Those of a test set that came with the log stay out."""
    names: dict[str, None] = {}
    for file in files:
        frame = pd.read_parquet(file, columns=[contract.ITEM, contract.SPLIT])
        own = frame[contract.SPLIT].between(contract.VALID, contract.CONTEXT)
        names.update(dict.fromkeys(frame.loc[own, contract.ITEM]))
    return list(names)


def _histories(file: Path) -> Iterator[tuple[str, list[str], list[str], list[int]]]:
    """(user, items, event types, times) of each user of the log; a test set that came with it is nobody's history."""
    frame = pd.read_parquet(file)
    frame = frame[frame[contract.SPLIT] < contract.GIVEN]
    kinds = frame[contract.EVENT].fillna("") if contract.EVENT in frame else pd.Series("", index=frame.index)
    frame = frame.assign(**{contract.EVENT: kinds})
    for user, rows in frame.groupby(contract.USER, sort=False):
        yield (
            str(user),
            rows[contract.ITEM].tolist(),
            rows[contract.EVENT].tolist(),
            [int(t) for t in rows[contract.TIME]],
        )


def _attributes(users: pd.DataFrame | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(user, what the table of users says of him, without what it does not know)."""
    if users is not None:
        for user, row in zip(users.index, users.to_dict("records"), strict=True):
            yield user, {name: value for name, value in row.items() if not pd.isna(value)}


def compile_transforms(workflow: nvt.Workflow, schema: contract.DataSchema, folder: Path) -> None:
    """Writes the fitted workflow as graphs: of all columns, and of those that a request has, by what has as many rows:
    the items of histories, the types of their events, and the context."""
    from preprocessing.workflow_onnx import compile_workflow, event_vocabulary, save

    columns = [contract.ITEM, *schema.encoded_categoricals, *schema.event_continuous]
    save(compile_workflow(workflow, columns), folder / "transform.onnx")
    save(compile_workflow(workflow, [contract.ITEM]), folder / REQUEST_GRAPH)
    sizes = [len(event_vocabulary(workflow, n)) + contract.FIRST_ID for n in schema.context_categoricals]
    types = 0
    if contract.EVENT in schema.event_categoricals:
        words = len(event_vocabulary(workflow, contract.EVENT))
        types = words + contract.FIRST_ID if words > 1 else 0
    columns_of_request = ContextColumns.of(schema, tuple(sizes), types)
    columns_of_request.save(folder / CONTEXT_FILE)
    if types:
        save(compile_workflow(workflow, [contract.EVENT]), folder / TYPES_GRAPH)
    if columns_of_request.names:
        save(compile_workflow(workflow, columns_of_request.names), folder / CONTEXT_GRAPH)


def _minute_events(folder: Path) -> int:
    """See ``vivace.suspects``."""
    events = pq.read_table(folder / EVENTS_FILE, columns=[contract.USER, contract.TIME])
    return most_a_minute(*(events[name].to_numpy() for name in (contract.USER, contract.TIME)))


# -- the step -----------------------------------------------------------------------------------------
def prepare(source: Source, config: PrepareConfig, root: Path, seed: int, say: Progress) -> dict[str, Any]:
    """Runs the step unless its artifact is there; returns its manifest."""
    schema = source.schema
    inputs = {"data": source.fingerprint()}
    settings = {"schema": schema.to_json(), "layout": LAYOUT, **asdict(config)}
    step = Step(root / "features", "prepare", settings, seed, inputs)
    there = (root / "feature_store" / "data.mdb").exists() and (step.folder / CATALOGUE_FILE).exists()
    if step.done() and there:
        say("features are there: nothing to do")
        assert step.manifest is not None
        return step.manifest
    with replaced(step.folder) as folder:  # features that are there stay whole until the new ones are
        return _build(source, config, root, replace(step, folder=folder), say)


def _build(source: Source, config: PrepareConfig, root: Path, step: Step, say: Progress) -> dict[str, Any]:
    """Writes ``step``'s folder and the feature store; returns the manifest."""
    schema, started = source.schema, time.monotonic()
    folder, scratch = step.folder, step.folder / "scratch"
    step.reset()
    (folder / SCHEMA_FILE).write_text(json.dumps(schema.to_json(), indent=2))
    rejects = Rejects(folder / "rejects.csv")
    catalogue, known = _catalogue(source, rejects)
    users = _users(source, rejects)
    files, shown_files, times = _ingest(source, config, known, users, scratch / "raw", rejects, say)
    events, totals = _events(files, scratch / "events", schema, config.split, times, rejects)
    rejects.refuse_nearly_all("interactions", EVENT_HINTS)
    rejects.notes.extend(times.doubts())
    say(f"{totals['events']:,} events of {totals['users']:,} users; fitting NVTabular")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with dask_cluster(config.workers, scratch / "dask") as where:
            workflow = event_workflow(schema, config.vocabulary, scratch / "categories")
            workflow.fit(dataset(training_rows(events, scratch / "fit")))
            workflow.save(str(folder / WORKFLOW))
            if config.vocabulary.with_catalogue:
                later = _held_out_items(events) if known is None else catalogue[contract.ITEM]
                added = extend_vocabulary(folder / WORKFLOW, contract.ITEM, later)
                say(f"{added:,} items of the {'log' if known is None else 'catalogue'} have no training event")
            saved = checksums(folder / WORKFLOW)
            workflow = load_workflow(folder / WORKFLOW, saved)
            say(f"fitted {where}; encoding")
            workflow.transform(dataset(events)).to_parquet(str(scratch / "encoded"))
        counts: dict[str, int] = {}
        partitions = sorted((scratch / "encoded").glob("*.parquet"))
        of_events = schema.context_categoricals
        write_events(partitions, totals["events"] - totals["given"], folder / EVENTS_FILE, of_events)
        for i, encoded in enumerate(partitions):
            for name, n in write_requests(encoded, folder, schema, config.split.every).items():
                counts[name] = counts.get(name, 0) + n
            say(f"sequences of partition {i + 1} of {len(events)}")
        items, notes = items_table(workflow, catalogue, schema, folder)
        rejects.notes.extend(notes)
        items.to_parquet(folder / "items.parquet", index=False)
        shown = 0
        if schema.shown_types:
            of_log = of_partitions(shown_files, pd.Index(items[contract.ITEM]), rejects)
            shown = write_shown([of_log], folder / SHOWN_FILE)
            if not shown:
                rejects.notes.append(f"shown_types: no event has one of {list(schema.shown_types)}")
        searches = _searches(source, items[contract.ITEM], folder, rejects, say)
        compile_transforms(workflow, schema, folder)
    histories = (row for file in events for row in _histories(file))
    stored = fill_store(
        Run(root).feature_store, histories, zip(catalogue[contract.ITEM], catalogue[contract.TITLE], strict=True),
        _attributes(users),
    )  # fmt: skip
    shutil.rmtree(scratch)
    return step.finish(
        time.monotonic() - started,
        rows_read=rejects.read["interactions"],
        read=rejects.read,
        rejected=rejects.summary(),
        changed=rejects.changes(),
        notes=rejects.notes,
        **totals,
        requests=counts,
        items_in_vocabulary=Features(folder).item_count() - contract.FIRST_ID,
        items_in_catalogue=len(catalogue),
        catalogue_ms=source.catalogue_ms() if isinstance(source, Tables) else 0,
        split=config.split.describe(times),
        given_test=times.given,
        feature_store=stored,
        searches=searches,
        shown=shown,
        licence=schema.licence,
        **{MINUTE_EVENTS: _minute_events(folder)},
        checksums={name: checksums(folder / name) for name in WORKFLOWS if (folder / name).is_dir()},
    )
